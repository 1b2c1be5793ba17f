//! S3-FIFO: a small queue that most blocks leave soon, a main queue for those that were wanted again, and a
//! memory of what left the small one.
//!
//! Source: Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction" (SOSP 2023).
//! There, hits in the small queue lift a block to the main one, and hits in the main one earn it further
//! turns. In exclusive use a hit takes the block away, with the number of its hits as its [`History`]: when
//! it is demoted again it goes to the main queue, with one turn for each hit but the first.

use super::ghost::Ghosts;
use super::queues::Queues;
use super::{Hashes, History, Key, Replacement};

const SMALL: usize = 0;
const MAIN: usize = 1;
/// The small queue's part of all blocks: one in this many.
const SMALL_PART: usize = 10;

/// S3-FIFO. At most 40 bytes for each cached block with a key of 8 bytes.
#[derive(Debug)]
pub struct S3Fifo<K, S> {
    queues: Queues<K, S, 2>,
    ghosts: Ghosts,
}

impl<K: Key, S: Hashes> S3Fifo<K, S> {
    /// Nothing is cached.
    pub fn new(hashes: S) -> Self {
        Self { queues: Queues::new(hashes), ghosts: Ghosts::new() }
    }

    fn cached(&self) -> usize {
        self.queues.len(SMALL) + self.queues.len(MAIN)
    }
}

impl<K: Key, S: Hashes> Replacement<K> for S3Fifo<K, S> {
    fn insert(&mut self, key: K, history: History) -> bool {
        if self.hit(key) {
            return false;
        }
        let history = history.max(self.miss(key));
        let queue = if history.is_none() { SMALL } else { MAIN };
        self.queues.push(queue, key, history.bits().saturating_sub(1));
        true
    }

    fn take(&mut self, key: K) -> Option<History> {
        let place = self.queues.find(key)?;
        let turns = self.queues.count(place) + u8::from(self.queues.queue(place) == MAIN);
        self.queues.remove(place);
        Some(History::again(turns))
    }

    fn hit(&mut self, key: K) -> bool {
        let Some(place) = self.queues.find(key) else { return false };
        let hits = self.queues.count(place) + 1;
        self.queues.set_count(place, hits.min(History::MOST));
        true
    }

    fn miss(&mut self, key: K) -> History {
        let evicted = self.ghosts.take(self.queues.digest(key), self.cached());
        if evicted { History::again(0) } else { History::NONE }
    }

    fn remove(&mut self, key: K) -> bool {
        let found = self.queues.find(key);
        if let Some(place) = found {
            self.queues.remove(place);
        }
        found.is_some()
    }

    fn evict(&mut self) -> Option<K> {
        let cached = self.cached();
        // Each turn uses up a hit, or moves a block out of the small queue.
        loop {
            let small = self.queues.len(SMALL) * SMALL_PART > cached || self.queues.len(MAIN) == 0;
            let place = self.queues.oldest(if small { SMALL } else { MAIN })?;
            let hits = self.queues.count(place);
            if small && hits > 0 {
                self.queues.set_count(place, 0);
                self.queues.refresh(MAIN, place);
            } else if hits > 0 {
                self.queues.set_count(place, hits - 1);
                self.queues.refresh(MAIN, place);
            } else {
                let key = self.queues.remove(place);
                if small {
                    self.ghosts.add(self.queues.digest(key), cached);
                }
                return Some(key);
            }
        }
    }

    fn contains(&self, key: K) -> bool {
        self.queues.find(key).is_some()
    }

    fn len(&self) -> usize {
        self.cached()
    }

    fn ghosts(&self) -> usize {
        self.ghosts.count(self.cached())
    }

    fn bytes(&self) -> usize {
        self.queues.bytes() + self.ghosts.bytes()
    }

    fn shrink(&mut self) {
        self.queues.shrink();
        self.ghosts.shrink(self.cached());
    }
}
