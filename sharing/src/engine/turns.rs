//! Whose turn it is: each kind of the engine's work has its share of the time, whatever there is of others.
//!
//! Guests decide how much work of a kind there is: they read disks, write memory, say what pages are for. So no
//! kind goes before all others. A kind is charged for the time of each step, and the kind with work that has
//! had least goes next: start-time fair queueing (Goyal, Vin and Cheng, 1996). A kind without work costs a look
//! and saves nothing up; its first step comes soon, since it starts level with the others.

use std::time::Duration;

use crate::numbers::Slot;

/// Kinds of work, in the order in which kinds that had the same are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// What devices say about pages.
    Hints,
    /// What guests say about pages.
    Claims,
    /// Ends of intervals: what was written.
    Changes,
    /// Free pages of guests are freed on the host.
    GiveBack,
    /// Idle pages are scanned.
    Idle,
    /// Cached blocks beyond the limit are dropped.
    Evictions,
    /// The limit follows what is free; memory kept for reads from disks goes back.
    Limit,
    /// Huge pages are split.
    Splits,
    /// VMs that are not to share any more get memory of their own.
    Unshare,
    /// Runs are unmerged for better ones.
    Unmerge,
    /// Holes in the store are closed.
    Compaction,
    /// VMs without a change log are scanned.
    Passes,
}

impl Kind {
    /// All kinds.
    pub(crate) const ALL: [Self; KINDS] = [
        Self::Hints,
        Self::Claims,
        Self::Changes,
        Self::GiveBack,
        Self::Idle,
        Self::Evictions,
        Self::Limit,
        Self::Splits,
        Self::Unshare,
        Self::Unmerge,
        Self::Compaction,
        Self::Passes,
    ];
}

/// How many kinds there are.
pub(crate) const KINDS: usize = 12;

/// A step is charged so much at least and at most. A step is meant to take a millisecond; one that lost its
/// processor took longer through no fault of its kind.
const CHARGED: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(2));

/// What all kinds were charged, in microseconds.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// The start of the last step that was served.
    now: u64,
    /// Up to when each kind has had its share.
    until: [u64; KINDS],
    /// The slot that each kind last worked for.
    slots: [Slot; KINDS],
}

impl Turns {
    /// The kinds in the order in which they are to be asked for work.
    pub(crate) fn order(&self) -> [Kind; KINDS] {
        let mut kinds = Kind::ALL;
        kinds.sort_by_key(|&kind| self.start(kind));
        kinds
    }

    /// When the next step of a kind would start.
    fn start(&self, kind: Kind) -> u64 {
        self.until[kind as usize].max(self.now)
    }

    /// The first kind in the order that had work was served.
    pub(crate) fn served(&mut self, kind: Kind, took: Duration) {
        self.now = self.start(kind);
        self.until[kind as usize] = self.now + took.clamp(CHARGED.0, CHARGED.1).as_micros() as u64;
    }

    /// The slot that a kind last worked for: others come first.
    pub(crate) fn slot(&self, kind: Kind) -> Slot {
        self.slots[kind as usize]
    }

    pub(crate) fn set_slot(&mut self, kind: Kind, slot: Slot) {
        self.slots[kind as usize] = slot;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// No kind with work waits for more steps of others than this.
    const BOUND: usize = (KINDS - 1) * 5;

    proptest! {
        /// Kinds have work at times or always, and their steps take any time.
        #[test]
        fn a_kind_with_work_is_served_within_a_bound(
            steps in prop::collection::vec(prop::array::uniform12((any::<bool>(), 0..20_000_u64)), 1..500),
            always in 0..KINDS,
            flood in 0..KINDS,
        ) {
            let mut turns = Turns::default();
            let mut waited = 0;
            for step in steps {
                let work = |kind: Kind| [always, flood].contains(&(kind as usize)) || step[kind as usize].0;
                let kind = turns.order().into_iter().find(|&kind| work(kind)).expect("one always has");
                turns.served(kind, Duration::from_micros(step[kind as usize].1));
                waited = if kind as usize == always { 0 } else { waited + 1 };
                prop_assert!(waited <= BOUND, "{waited} steps of others");
            }
        }
    }

    #[test]
    fn time_is_shared_evenly_by_kinds_whose_steps_differ() {
        let mut turns = Turns::default();
        let mut spent = [Duration::ZERO; 2];
        for _ in 0..10_000 {
            let kind =
                turns.order().into_iter().find(|kind| [Kind::Hints, Kind::Passes].contains(kind)).unwrap();
            let took = Duration::from_micros(if kind == Kind::Hints { 600 } else { 1800 });
            turns.served(kind, took);
            spent[usize::from(kind == Kind::Passes)] += took;
        }
        let ratio = spent[0].as_secs_f64() / spent[1].as_secs_f64();
        assert!((0.95..1.05).contains(&ratio), "{ratio}");
    }

    #[test]
    fn what_was_idle_is_served_at_once_and_has_saved_nothing_up() {
        let mut turns = Turns::default();
        for _ in 0..100 {
            turns.served(Kind::Passes, Duration::from_millis(1));
        }
        assert_eq!(turns.order()[0], Kind::Hints);
        let both = |turns: &Turns| {
            turns.order().into_iter().find(|kind| [Kind::Hints, Kind::Passes].contains(kind)).unwrap()
        };
        let mut hints = 0;
        for _ in 0..100 {
            let kind = both(&turns);
            turns.served(kind, Duration::from_millis(1));
            hints += u32::from(kind == Kind::Hints);
        }
        assert!((49..=51).contains(&hints), "{hints} of 100");
    }
}
