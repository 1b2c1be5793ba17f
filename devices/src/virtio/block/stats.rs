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
    /// Bytes of successful reads.
    pub read_bytes: AtomicU64,
    /// Bytes of successful writes.
    pub written_bytes: AtomicU64,
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
