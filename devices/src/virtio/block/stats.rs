//! Counters of one disk.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Least time between two reports of host errors for one disk.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// Receives messages about errors of the host.
pub type HostErrorObserver = Box<dyn Fn(&str) + Send + Sync>;

/// Counters of one disk since it was opened. A reset of the guest does not reset them.
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
    /// Bytes of successful writes, without requests to write zeros.
    pub written_bytes: AtomicU64,
    /// Blocks that were read from guests' memory.
    pub blocks_from_guests: AtomicU64,
    /// Blocks that were read from the host's cached blocks.
    pub blocks_from_host: AtomicU64,
    /// Blocks that the cache had read from the image.
    pub blocks_fetched: AtomicU64,
    /// Requests that were delayed by the disk's limits.
    pub throttled: AtomicU64,
    /// Requests that failed because of the guest or the host, and queues that broke.
    pub errors: AtomicU64,
    last_error: Mutex<Option<String>>,
    host_errors: HostErrors,
}

/// Errors of the host, and their observer.
#[derive(Default)]
struct HostErrors {
    observer: Mutex<Option<HostErrorObserver>>,
    reported: Mutex<Reported>,
}

impl fmt::Debug for HostErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostErrors").field("reported", &self.reported).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Reported {
    last: Option<Instant>,
    /// Number of errors since that report.
    withheld: u64,
}

impl Reported {
    /// Returns the number of withheld errors if an error may be reported now, otherwise `None`.
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
    /// Sets the observer of host errors. The observer gets at most one error in ten seconds. The disk's
    /// workers call it and wait for it.
    pub fn observe_host_errors(&self, observer: HostErrorObserver) {
        *self.host_errors.observer.lock().unwrap_or_else(PoisonError::into_inner) = Some(observer);
    }

    /// Counts an error of the host, and reports it.
    pub(super) fn record_host_error(&self, error: String) {
        let turn =
            self.host_errors.reported.lock().unwrap_or_else(PoisonError::into_inner).turn(Instant::now());
        if let Some(withheld) = turn
            && let Some(observer) = &*self.host_errors.observer.lock().unwrap_or_else(PoisonError::into_inner)
        {
            match withheld {
                0 => observer(&error),
                1 => observer(&format!("{error} (and one more since the last report)")),
                more => observer(&format!("{error} (and {more} more errors since the last report)")),
            }
        }
        self.record_error(error);
    }

    /// Returns whether some changes may not be on the medium yet.
    pub(super) fn unflushed(&self) -> bool {
        [&self.writes, &self.discards, &self.write_zeroes].iter().any(|counter| counter.load(Relaxed) > 0)
    }

    /// Returns the message of the last error.
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
    fn errors_of_the_host_do_not_flood_the_log() {
        let mut reported = Reported::default();
        let start = Instant::now();
        assert_eq!(reported.turn(start), Some(0));
        (1..10).for_each(|second| assert_eq!(reported.turn(start + Duration::from_secs(second)), None));
        assert_eq!(reported.turn(start + REPORT_EVERY), Some(9));
        assert_eq!(reported.turn(start + 2 * REPORT_EVERY), Some(0));
    }
}
