//! Counters of one disk.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The least time between two reports of trouble with one disk.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// Hears of errors of the host's, in words.
pub type TroubleObserver = Box<dyn Fn(&str) + Send + Sync>;

/// Counters of one disk since it was opened. They go on over resets of the guest.
#[derive(Debug, Default)]
pub struct BlockStats {
    /// Read requests that succeeded.
    pub reads: AtomicU64,
    /// Write requests that succeeded.
    pub writes: AtomicU64,
    /// Flush requests that succeeded.
    pub flushes: AtomicU64,
    /// Requests to discard that succeeded.
    pub discards: AtomicU64,
    /// Requests to write zeroes that succeeded.
    pub write_zeroes: AtomicU64,
    /// Bytes of successful reads.
    pub read_bytes: AtomicU64,
    /// Bytes of successful writes, those of zeroes not among them.
    pub written_bytes: AtomicU64,
    /// Blocks that were read from what guests held.
    pub blocks_from_guests: AtomicU64,
    /// Blocks that were read from what the host held.
    pub blocks_from_host: AtomicU64,
    /// Blocks that the cache had read from the image.
    pub blocks_fetched: AtomicU64,
    /// Requests that were held back to keep to the disk's limits.
    pub throttled: AtomicU64,
    /// Requests that failed, on account of guest or host, and queues that broke.
    pub errors: AtomicU64,
    last_error: Mutex<Option<String>>,
    trouble: Trouble,
}

/// Errors of the host's, and who hears of them.
#[derive(Default)]
struct Trouble {
    observer: Mutex<Option<TroubleObserver>>,
    reported: Mutex<Reported>,
}

impl fmt::Debug for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trouble").field("reported", &self.reported).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Reported {
    last: Option<Instant>,
    /// Errors since then.
    withheld: u64,
}

impl Reported {
    /// How many errors were withheld before one that is to be reported now; none if it is not.
    fn turn(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < REPORT_EVERY) {
            self.withheld += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.withheld))
    }
}

impl BlockStats {
    /// Has `observer` told of errors of the host's from now on, at most one in ten seconds. It is called by
    /// the disk's workers, which wait for it.
    pub fn observe_trouble(&self, observer: TroubleObserver) {
        *self.trouble.observer.lock().unwrap_or_else(PoisonError::into_inner) = Some(observer);
    }

    /// Counts an error of the host's, and has it reported.
    pub(super) fn record_trouble(&self, error: String) {
        let turn = self.trouble.reported.lock().unwrap_or_else(PoisonError::into_inner).turn(Instant::now());
        if let Some(withheld) = turn
            && let Some(observer) = &*self.trouble.observer.lock().unwrap_or_else(PoisonError::into_inner)
        {
            match withheld {
                0 => observer(&error),
                1 => observer(&format!("{error} (and one more since the last report)")),
                more => observer(&format!("{error} (and {more} more errors since the last report)")),
            }
        }
        self.record_error(error);
    }

    /// Whether there may be anything that the medium does not have.
    pub(super) fn unflushed(&self) -> bool {
        [&self.writes, &self.discards, &self.write_zeroes].iter().any(|counter| counter.load(Relaxed) > 0)
    }

    /// What went wrong last, in words.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn record_error(&self, error: String) {
        add(&self.errors, 1);
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

pub(super) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_in_trouble_does_not_flood_the_log() {
        let mut reported = Reported::default();
        let start = Instant::now();
        assert_eq!(reported.turn(start), Some(0));
        (1..10).for_each(|second| assert_eq!(reported.turn(start + Duration::from_secs(second)), None));
        assert_eq!(reported.turn(start + REPORT_EVERY), Some(9));
        assert_eq!(reported.turn(start + 2 * REPORT_EVERY), Some(0));
    }
}
