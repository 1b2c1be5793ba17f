//! Counters of one disk.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

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
}

impl BlockStats {
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
