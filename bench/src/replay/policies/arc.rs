//! ARC: LRU queues for blocks that were used once and for blocks that were used again. Ghosts of both decide
//! which queue gets more room.
//!
//! Source: Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache" (FAST 2003). Its capacity
//! is the number of cached blocks at an eviction. In exclusive use, blocks come back with their [`History`].
//! The ghosts are queried when a guest reads from the disk, not when the block is demoted.

use samepage_sharing::blocks::replace::queues::Queues;
use samepage_sharing::blocks::replace::{Hashes, History, Key, Replacement};

/// Used once: the paper's T1.
const ONCE: usize = 0;
/// Used again: T2.
const AGAIN: usize = 1;
/// Ghosts of the first: B1.
const ONCE_GONE: usize = 2;
/// Ghosts of the second: B2.
const AGAIN_GONE: usize = 3;

/// ARC.
#[derive(Debug)]
pub(in crate::replay) struct Arc<K, S> {
    queues: Queues<K, S, 4>,
    /// The target for the number of blocks that were used once: p.
    target: usize,
}

impl<K: Key, S: Hashes> Arc<K, S> {
    /// Returns an empty cache.
    pub(in crate::replay) fn new(hashes: S) -> Self {
        Self { queues: Queues::new(hashes), target: 0 }
    }

    fn cached(&self) -> usize {
        self.queues.len(ONCE) + self.queues.len(AGAIN)
    }

    /// Adjusts the target after a hit of a ghost.
    fn adapt(&mut self, ghost: usize) {
        let (once, again) = (self.queues.len(ONCE_GONE), self.queues.len(AGAIN_GONE));
        self.target = if ghost == ONCE_GONE {
            (self.target + (again / once.max(1)).max(1)).min(self.cached())
        } else {
            self.target.saturating_sub((once / again.max(1)).max(1))
        };
    }

    /// Drops ghosts beyond the limit for a cache of this many blocks.
    fn trim(&mut self, capacity: usize) {
        while self.queues.len(ONCE) + self.queues.len(ONCE_GONE) > capacity
            && self.queues.pop(ONCE_GONE).is_some()
        {}
        while self.queues.len(ONCE_GONE) + self.queues.len(AGAIN_GONE) > capacity {
            self.queues.pop(AGAIN_GONE).or_else(|| self.queues.pop(ONCE_GONE));
        }
    }
}

impl<K: Key, S: Hashes> Replacement<K> for Arc<K, S> {
    fn insert(&mut self, key: K, history: History) -> bool {
        if self.hit(key) {
            return false;
        }
        let history = history.max(self.miss(key));
        self.queues.push(if history.is_none() { ONCE } else { AGAIN }, key, 0);
        true
    }

    fn take(&mut self, key: K) -> Option<History> {
        let place = self.queues.find(key).filter(|&place| self.queues.queue(place) <= AGAIN)?;
        self.queues.remove(place);
        Some(History::again(0))
    }

    fn hit(&mut self, key: K) -> bool {
        let found = self.queues.find(key).filter(|&place| self.queues.queue(place) <= AGAIN);
        if let Some(place) = found {
            self.queues.refresh(AGAIN, place);
        }
        found.is_some()
    }

    fn miss(&mut self, key: K) -> History {
        let ghost = self.queues.find(key).filter(|&place| self.queues.queue(place) > AGAIN);
        let Some(ghost) = ghost else { return History::NONE };
        self.adapt(self.queues.queue(ghost));
        self.queues.remove(ghost);
        History::again(0)
    }

    fn remove(&mut self, key: K) -> bool {
        let Some(place) = self.queues.find(key) else { return false };
        let cached = self.queues.queue(place) <= AGAIN;
        self.queues.remove(place);
        cached
    }

    fn evict(&mut self) -> Option<K> {
        let capacity = self.cached();
        let once = self.queues.len(ONCE);
        let (from, ghost) = if once > 0 && (once > self.target || self.queues.len(AGAIN) == 0) {
            (ONCE, ONCE_GONE)
        } else {
            (AGAIN, AGAIN_GONE)
        };
        let place = self.queues.oldest(from)?;
        let key = self.queues.key(place);
        self.queues.refresh(ghost, place);
        self.trim(capacity);
        Some(key)
    }

    fn contains(&self, key: K) -> bool {
        self.queues.find(key).is_some_and(|place| self.queues.queue(place) <= AGAIN)
    }

    fn len(&self) -> usize {
        self.cached()
    }

    fn ghosts(&self) -> usize {
        self.queues.len(ONCE_GONE) + self.queues.len(AGAIN_GONE)
    }

    fn bytes(&self) -> usize {
        self.queues.bytes()
    }

    fn shrink(&mut self) {
        self.trim(self.cached());
        self.target = self.target.min(self.cached());
        self.queues.shrink();
    }
}
