//! When the demo gives up. Hosts differ in speed by a factor of a hundred and more, so that the demo follows
//! progress: it ends when nothing has moved for a while, however long everything takes.

use std::time::{Duration, Instant};

/// How long nothing may move.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// How far one phase of the demo is, and since when.
pub(super) struct Patience {
    /// The furthest that the phase was.
    furthest: u64,
    since: Instant,
}

impl Patience {
    /// Begins a phase.
    pub(super) fn new(now: Instant) -> Self {
        Self { furthest: 0, since: now }
    }

    /// Takes in how far the phase is, in steps of any unit. Returns whether nothing has moved for [`PATIENCE`]. What
    /// falls back and rises again does not count, since that could go on without end.
    pub(super) fn is_over(&mut self, steps: u64, now: Instant) -> bool {
        if steps > self.furthest {
            *self = Self { furthest: steps, since: now };
        }
        now.saturating_duration_since(self.since) > PATIENCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn slow_progress_is_waited_for() {
        let start = Instant::now();
        let mut patience = Patience::new(start);
        for step in 1..1000 {
            let now = start + PATIENCE * step;
            assert!(!patience.is_over(step.into(), now), "step {step}");
        }
    }

    #[test]
    fn a_standstill_ends_it() {
        let start = Instant::now();
        let mut patience = Patience::new(start);
        assert!(!patience.is_over(0, start + PATIENCE));
        assert!(patience.is_over(0, start + PATIENCE + SECOND));

        let mut patience = Patience::new(start);
        assert!(!patience.is_over(7, start + SECOND));
        assert!(!patience.is_over(7, start + SECOND + PATIENCE));
        assert!(patience.is_over(7, start + SECOND + PATIENCE + SECOND));
    }

    #[test]
    fn what_falls_back_and_rises_again_has_not_moved() {
        let start = Instant::now();
        let mut patience = Patience::new(start);
        assert!(!patience.is_over(10, start));
        let end =
            (1..1000).find(|&second| patience.is_over(9 + u64::from(second % 2), start + SECOND * second));
        assert_eq!(end.map(|second| SECOND * second), Some(PATIENCE + SECOND));
    }
}
