//! Every call that the engine makes of the kernel, and of a log of changes, fails in its turn: alone, and with
//! those after it, which are what the engine falls back to. Guests stay whole, or the one that cannot is told.
//!
//! With `SAMEPAGE_TEST_EVERY_CALL` set each call has its turn with each number of others, which takes minutes.

mod common;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use common::Fault;
use common::followed::following;
use common::world::World;
use common::world::weather::{Plan, Weather};
use parking_lot::Mutex;
use samepage_sharing::blocks::CacheSize;
use samepage_sharing::engine::Settings;

const PAGES: u32 = 72;
/// How many calls fail in a row.
const COUNTS: [u64; 4] = [1, 2, 3, 5];

/// What the calls of one play came to.
#[derive(Default)]
struct Played {
    calls: u64,
    names: BTreeMap<&'static str, u64>,
}

/// Fails `count` calls from the one with this number on, of the calls that are made between the start and the
/// end of a play.
fn failing(first: u64, count: u64, tear: bool, played: &Arc<Mutex<Played>>) -> Plan {
    let played = Arc::clone(played);
    Arc::new(Mutex::new(move |name| {
        let mut played = played.lock();
        let number = played.calls;
        played.calls += 1;
        *played.names.entry(name).or_default() += 1;
        if !(first..first + count).contains(&number) {
            return Fault::None;
        }
        let tears = tear && ["map", "restore"].contains(&name);
        if tears { Fault::Tear } else { Fault::Refuse }
    }))
}

/// All that rearranges memory, once.
fn play(world: &mut World) {
    world.every_kind_of_work();
    world.end();
}

fn play_with(first: u64, count: u64, tear: bool) -> Played {
    let settings = Settings {
        block_cache: CacheSize::Bytes(40 * 4096),
        few_holes: 8,
        shortest_mapping: 1,
        ..following()
    };
    let played = Arc::new(Mutex::new(Played::default()));
    let plan = failing(first, count, tear, &played);
    let mut world = World::new(&settings, Arc::new(Weather::default()), plan, 77, PAGES);
    let outcome = catch_unwind(AssertUnwindSafe(|| play(&mut world)));
    if let Err(panic) = outcome {
        eprintln!("{}", world.told.join("\n"));
        eprintln!("{count} calls fail from call {first} on, torn {tear}");
        std::mem::forget(world);
        std::panic::resume_unwind(panic);
    }
    drop(world);
    std::mem::take(&mut played.lock())
}

#[test]
fn any_call_may_fail_with_those_after_it() {
    let whole = play_with(u64::MAX / 2, 0, false);
    println!("{} calls: {:?}", whole.calls, whole.names);
    for name in [
        "register",
        "protect",
        "unprotect",
        "wake",
        "map",
        "discard",
        "stage",
        "restore",
        "unstage",
        "clean",
        "punch",
    ] {
        assert!(whole.names.contains_key(name), "{name} is never called: {:?}", whole.names);
    }
    for name in ["collect", "arm", "note"] {
        assert!(whole.names.contains_key(name), "the log is never asked to {name}: {:?}", whole.names);
    }
    if std::env::var_os("SAMEPAGE_TEST_EVERY_CALL").is_some() {
        for (number, count) in (0..whole.calls).flat_map(|number| COUNTS.map(|count| (number, count))) {
            play_with(number, count, false);
            play_with(number, count, true);
        }
        return;
    }
    // Each kind of call is met in many states all the same.
    let stride = 1 + whole.calls / 250;
    for (turn, number) in (0..whole.calls).step_by(stride as usize).enumerate() {
        play_with(number, COUNTS[turn % COUNTS.len()], turn % 3 == 0);
    }
}
