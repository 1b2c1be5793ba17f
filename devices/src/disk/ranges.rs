//! Prevents read-modify-write cycles from losing other writes.
//!
//! If a device accepts only whole blocks, a write of part of a block reads the block, changes it and writes
//! it back. No other write to the block may happen in between. Each request locks its range before it begins
//! and unlocks it when it completes. A request that cannot lock its range waits.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::wakers::Wakers;

#[derive(Clone, Debug)]
struct Held {
    range: Range<u64>,
    exclusive: bool,
    key: u64,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<Held>,
    next_key: u64,
    /// Whether a request was refused since the last unlock.
    is_awaited: bool,
}

/// The ranges of one disk that are being written, in bytes.
#[derive(Debug)]
pub(crate) struct RangeLocks {
    state: Mutex<State>,
    wakers: Arc<Wakers>,
}

impl RangeLocks {
    /// Returns an object without locked ranges. Waiting requests are woken through `wakers`.
    pub(crate) fn new(wakers: Arc<Wakers>) -> Self {
        Self { state: Mutex::default(), wakers }
    }

    /// Locks `range`. Ranges may overlap unless one of them is `exclusive`. Returns `None` if the request
    /// must wait.
    pub(crate) fn try_take(self: &Arc<Self>, range: Range<u64>, exclusive: bool) -> Option<RangeGuard> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let conflicts = |held: &Held| {
            (exclusive || held.exclusive) && held.range.start < range.end && range.start < held.range.end
        };
        if state.held.iter().any(conflicts) {
            state.is_awaited = true;
            return None;
        }
        let key = state.next_key;
        state.next_key += 1;
        state.held.push(Held { range, exclusive, key });
        Some(RangeGuard { locks: self.clone(), key })
    }
}

/// A locked range. Dropping the guard unlocks it.
#[derive(Debug)]
pub(crate) struct RangeGuard {
    locks: Arc<RangeLocks>,
    key: u64,
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut state = self.locks.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.held.retain(|held| held.key != self.key);
        if std::mem::take(&mut state.is_awaited) {
            drop(state);
            self.locks.wakers.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_share_blocks_unless_one_reads_them_first() {
        let locks = Arc::new(RangeLocks::new(Arc::default()));
        let take = |range, exclusive| locks.try_take(range, exclusive);
        let first = take(0..8192, false).unwrap();
        let second = take(4096..12288, false).unwrap();
        assert!(take(8192..12288, true).is_none());
        drop(second);
        let third = take(8192..12288, true).unwrap();
        assert!(take(8192..16384, false).is_none() && take(0..12288, false).is_none());
        assert!(take(12288..16384, true).is_some() && take(0..8192, false).is_some());
        drop((first, third));
        assert!(take(0..u64::MAX, true).is_some());
    }
}
