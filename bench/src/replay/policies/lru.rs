//! Least recently used. In exclusive use, a guest's memory and the host's form one LRU.

use samepage_sharing::blocks::replace::queues::Queues;
use samepage_sharing::blocks::replace::{Hashes, History, Key, Replacement};

/// Evicts the least recently used block first.
#[derive(Debug)]
pub(in crate::replay) struct Lru<K, S> {
    queues: Queues<K, S, 1>,
}

impl<K: Key, S: Hashes> Lru<K, S> {
    /// Returns an empty cache.
    pub(in crate::replay) fn new(hashes: S) -> Self {
        Self { queues: Queues::new(hashes) }
    }
}

impl<K: Key, S: Hashes> Replacement<K> for Lru<K, S> {
    fn insert(&mut self, key: K, _history: History) -> bool {
        if self.hit(key) {
            return false;
        }
        self.queues.push(0, key, 0);
        true
    }

    fn take(&mut self, key: K) -> Option<History> {
        self.remove(key).then_some(History::NONE)
    }

    fn hit(&mut self, key: K) -> bool {
        let found = self.queues.find(key);
        if let Some(place) = found {
            self.queues.refresh(0, place);
        }
        found.is_some()
    }

    fn miss(&mut self, _key: K) -> History {
        History::NONE
    }

    fn remove(&mut self, key: K) -> bool {
        let found = self.queues.find(key);
        if let Some(place) = found {
            self.queues.remove(place);
        }
        found.is_some()
    }

    fn evict(&mut self) -> Option<K> {
        self.queues.pop(0)
    }

    fn contains(&self, key: K) -> bool {
        self.queues.find(key).is_some()
    }

    fn len(&self) -> usize {
        self.queues.len(0)
    }

    fn ghosts(&self) -> usize {
        0
    }

    fn bytes(&self) -> usize {
        self.queues.bytes()
    }

    fn shrink(&mut self) {
        self.queues.shrink();
    }
}
