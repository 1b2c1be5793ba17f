//! All kinds of work in one table: what each is called, who does a piece of it, and when there may be some where there
//! is none now.
//!
//! Each kind has the same share of the time ([`turns`](crate::engine::turns)). A piece is about a millisecond, and ends
//! earlier where somebody waits for the engine that a guest waits for ([`Engine::spent`]).

use std::time::Instant;

use crate::engine::Engine;
use crate::engine::turns::{KINDS, Kind};

/// One kind of work.
pub(crate) struct Task {
    kind: Kind,
    /// What people call it.
    pub(crate) name: &'static str,
    /// Does a piece of the work. Returns whether there was any.
    pub(crate) step: fn(&mut Engine, Instant) -> bool,
    /// Returns when there may be work again. `None` where only another kind's work, or a device, brings some.
    pub(crate) due: fn(&Engine) -> Option<Instant>,
}

/// The due time of work that does not come by itself.
fn never(_: &Engine) -> Option<Instant> {
    None
}

/// All kinds, in the order of [`Kind`].
pub(crate) const TASKS: [Task; KINDS] = [
    Task { kind: Kind::Hints, name: "hints of devices", step: |engine, _| engine.take_hints(), due: never },
    Task {
        kind: Kind::Claims,
        name: "page types from guests",
        step: Engine::take_claims,
        due: Engine::claims_due,
    },
    Task {
        kind: Kind::Changes,
        name: "ends of intervals",
        step: Engine::end_an_interval,
        due: Engine::interval_due,
    },
    Task {
        kind: Kind::GiveBack,
        name: "freeing free pages",
        step: |engine, _| engine.give_back_step(),
        due: never,
    },
    Task { kind: Kind::Idle, name: "idle pages", step: |engine, _| engine.scan_rested(), due: never },
    Task { kind: Kind::Evictions, name: "evictions", step: |engine, _| engine.shrink_cache(), due: never },
    Task {
        kind: Kind::Limit,
        name: "limit of the cache",
        step: |engine, now| engine.rest_cache(now) || engine.follow_limit(now),
        due: Engine::cache_turn_due,
    },
    Task {
        kind: Kind::Splits,
        name: "splits of huge pages",
        step: |engine, _| engine.split_step(),
        due: never,
    },
    Task { kind: Kind::Unshare, name: "ends of sharing", step: Engine::unshare, due: Engine::unshare_due },
    Task {
        kind: Kind::Unmerge,
        name: "unmerging for better runs",
        step: |engine, _| engine.unmerge_for_better_runs(),
        due: never,
    },
    Task {
        kind: Kind::Compaction,
        name: "compaction",
        step: |engine, now| engine.compact_step(now) || engine.reclaim_step(),
        due: never,
    },
    Task { kind: Kind::Passes, name: "full passes", step: Engine::go_on_with_pass, due: Engine::pass_due },
];

const _: () = {
    let mut index = 0;
    while index < KINDS {
        assert!(TASKS[index].kind as usize == index, "the table is not in the order of the kinds");
        index += 1;
    }
};

impl Kind {
    /// Returns its line of the table.
    pub(crate) fn task(self) -> &'static Task {
        const TABLE: &[Task; KINDS] = &TASKS;
        &TABLE[self as usize]
    }
}
