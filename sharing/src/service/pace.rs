//! A ceiling of CPU time for all sharing threads together.
//!
//! Time that is not used is saved up, to some seconds' worth, so that a burst of work, such as VMs that
//! have just booted, is done at once and not at a trickle: the ceiling holds on average.

use std::time::{Duration, Instant};

/// So many seconds' worth of CPU time can be saved up.
const SAVED: Duration = Duration::from_secs(10);
/// Rests shorter than this are put together: a wake-up costs as much as a small piece of work.
const SHORTEST_REST: Duration = Duration::from_millis(4);

/// CPU time to be spent.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Of one core.
    share: f64,
    /// Seconds of CPU time; negative when too much was spent.
    saved: f64,
    since: Instant,
}

impl Pace {
    /// A ceiling in percent of one core, with all that can be saved up saved.
    pub(crate) fn new(percent: f64, now: Instant) -> Self {
        let share = (percent / 100.0).max(0.001);
        Self { share, saved: share * SAVED.as_secs_f64(), since: now }
    }

    /// Notes CPU time spent until now.
    pub(crate) fn spend(&mut self, cpu: Duration, now: Instant) {
        let passed = now.saturating_duration_since(self.since).as_secs_f64();
        self.since = self.since.max(now);
        let earned = (self.saved + passed * self.share).min(self.share * SAVED.as_secs_f64());
        self.saved = earned - cpu.as_secs_f64();
    }

    /// Until when to rest, where the ceiling asks for it.
    pub(crate) fn rest_until(&self, now: Instant) -> Option<Instant> {
        let passed = now.saturating_duration_since(self.since).as_secs_f64();
        let saved = self.saved + passed * self.share;
        let rest = Duration::from_secs_f64((-saved / self.share).max(0.0));
        (rest > SHORTEST_REST).then(|| now + rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ceiling_holds_on_average_and_bursts_are_paid_for_beforehand() {
        let start = Instant::now();
        let mut pace = Pace::new(10.0, start);
        let mut now = start;
        let mut busy = Duration::ZERO;
        // A burst of a second, ten seconds' worth.
        while pace.rest_until(now).is_none() {
            now += Duration::from_millis(1);
            busy += Duration::from_millis(1);
            pace.spend(Duration::from_millis(1), now);
        }
        assert!((1000..1200).contains(&busy.as_millis()), "{busy:?}");
        let (began, mut spent) = (now, Duration::ZERO);
        while now < began + Duration::from_secs(20) {
            now = pace.rest_until(now).unwrap_or(now) + Duration::from_millis(1);
            spent += Duration::from_millis(1);
            pace.spend(Duration::from_millis(1), now);
        }
        assert!((1900..2100).contains(&spent.as_millis()), "{spent:?}");
    }

    #[test]
    fn a_rest_is_over_when_its_time_has_passed() {
        let start = Instant::now();
        let mut pace = Pace::new(10.0, start);
        pace.spend(Duration::from_millis(1100), start);
        let until = pace.rest_until(start).expect("more was spent than was saved up");
        assert_eq!(pace.rest_until(start + (until - start) / 2), Some(until), "asking changes nothing");
        assert_eq!(pace.rest_until(until), None);
    }

    #[test]
    fn no_more_than_seconds_are_saved_up() {
        let start = Instant::now();
        let mut pace = Pace::new(50.0, start);
        let later = start + Duration::from_secs(3600);
        pace.spend(Duration::from_secs(5), later);
        assert!(pace.rest_until(later).is_none());
        pace.spend(Duration::from_secs(1), later);
        let rest = pace.rest_until(later).expect("the savings are spent") - later;
        assert!((rest.as_secs_f64() - 2.0).abs() < 0.01, "{rest:?}");
    }
}
