//! Keeps writes that read what surrounds them from losing other writes.
//!
//! Where a device takes whole blocks only, a write of part of one reads the block, changes it and writes it
//! back. Another write to the same block must not come between. Requests take the range that they touch
//! before they begin and give it back when they are complete; one that does not get its range waits.

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
    /// Somebody was refused since ranges were last given back.
    awaited: bool,
}

/// The ranges of one disk that are being written, in bytes.
#[derive(Debug)]
pub(crate) struct RangeLocks {
    state: Mutex<State>,
    wakers: Arc<Wakers>,
}

impl RangeLocks {
    /// No range is taken. Whoever has to wait for one is woken through `wakers`.
    pub(crate) fn new(wakers: Arc<Wakers>) -> Self {
        Self { state: Mutex::default(), wakers }
    }

    /// Takes `range`; with others, unless it or theirs is `exclusive`. None if it has to wait.
    pub(crate) fn try_take(self: &Arc<Self>, range: Range<u64>, exclusive: bool) -> Option<RangeGuard> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let conflicts = |held: &Held| {
            (exclusive || held.exclusive) && held.range.start < range.end && range.start < held.range.end
        };
        if state.held.iter().any(conflicts) {
            state.awaited = true;
            return None;
        }
        let key = state.next_key;
        state.next_key += 1;
        state.held.push(Held { range, exclusive, key });
        Some(RangeGuard { locks: self.clone(), key })
    }
}

/// A range taken. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct RangeGuard {
    locks: Arc<RangeLocks>,
    key: u64,
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut state = self.locks.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.held.retain(|held| held.key != self.key);
        if std::mem::take(&mut state.awaited) {
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
