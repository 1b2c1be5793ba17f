//! 2Q: new blocks wait in a queue. Blocks that are used again after they left that queue are kept by LRU.
//!
//! Source: Johnson and Shasha, "2Q: a low overhead high performance buffer management replacement algorithm"
//! (VLDB 1994), the full version. A block that a guest takes has been used again, wherever it was, so LRU
//! keeps it from then on.

use samepage_sharing::blocks::replace::queues::Queues;
use samepage_sharing::blocks::replace::{Hashes, History, Key, Replacement};

/// New blocks: the paper's A1in.
const NEW: usize = 0;
/// Kept by LRU: Am.
const KEPT: usize = 1;
/// Ghosts of blocks that left the first queue: A1out.
const GONE: usize = 2;
/// Divisor for the share of new blocks, as in the paper.
const NEW_PART: usize = 4;
/// Divisor for the number of ghosts, as in the paper.
const GONE_PART: usize = 2;

/// 2Q.
#[derive(Debug)]
pub(in crate::replay) struct TwoQ<K, S> {
    queues: Queues<K, S, 3>,
}

impl<K: Key, S: Hashes> TwoQ<K, S> {
    /// Returns an empty cache.
    pub(in crate::replay) fn new(hashes: S) -> Self {
        Self { queues: Queues::new(hashes) }
    }

    fn cached(&self) -> usize {
        self.queues.len(NEW) + self.queues.len(KEPT)
    }
}

impl<K: Key, S: Hashes> Replacement<K> for TwoQ<K, S> {
    fn insert(&mut self, key: K, history: History) -> bool {
        if self.hit(key) {
            return false;
        }
        let history = history.max(self.miss(key));
        self.queues.push(if history.is_none() { NEW } else { KEPT }, key, 0);
        true
    }

    fn take(&mut self, key: K) -> Option<History> {
        self.remove(key).then_some(History::again(0))
    }

    fn hit(&mut self, key: K) -> bool {
        match self.queues.find(key) {
            Some(place) if self.queues.queue(place) == KEPT => {
                self.queues.refresh(KEPT, place);
                true
            }
            Some(place) => self.queues.queue(place) == NEW,
            None => false,
        }
    }

    fn miss(&mut self, key: K) -> History {
        let ghost = self.queues.find(key).filter(|&place| self.queues.queue(place) == GONE);
        let Some(ghost) = ghost else { return History::NONE };
        self.queues.remove(ghost);
        History::again(0)
    }

    fn remove(&mut self, key: K) -> bool {
        let Some(place) = self.queues.find(key) else { return false };
        let cached = self.queues.queue(place) != GONE;
        self.queues.remove(place);
        cached
    }

    fn evict(&mut self) -> Option<K> {
        let cached = self.cached();
        if self.queues.len(KEPT) > 0 && self.queues.len(NEW) * NEW_PART <= cached {
            return self.queues.pop(KEPT);
        }
        let place = self.queues.oldest(NEW)?;
        let key = self.queues.key(place);
        self.queues.refresh(GONE, place);
        while self.queues.len(GONE) * GONE_PART > cached {
            self.queues.pop(GONE);
        }
        Some(key)
    }

    fn contains(&self, key: K) -> bool {
        self.queues.find(key).is_some_and(|place| self.queues.queue(place) != GONE)
    }

    fn len(&self) -> usize {
        self.cached()
    }

    fn ghosts(&self) -> usize {
        self.queues.len(GONE)
    }

    fn bytes(&self) -> usize {
        self.queues.bytes()
    }

    fn shrink(&mut self) {
        while self.queues.len(GONE) * GONE_PART > self.cached() {
            self.queues.pop(GONE);
        }
        self.queues.shrink();
    }
}
