//! The guest's cache, by LRU: the reads that pass it, and the blocks that it evicts for them. It does not
//! depend on the host's cache.

use samepage_sharing::blocks::replace::{History, Replacement};

use super::host::FixedHashes;
use super::policies::Lru;

/// A read that misses the guest's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Miss {
    pub(super) block: u32,
    /// The block that the guest evicts for it, if the cache is full.
    pub(super) given_up: Option<u32>,
}

/// A guest's misses.
#[derive(Debug)]
pub(super) struct Misses {
    pub(super) all: Vec<Miss>,
    /// Index of the first miss that counts. The caches are full by then.
    pub(super) counted: usize,
    /// Number of counted reads, including hits of the guest's cache.
    pub(super) reads: u64,
}

impl Misses {
    /// Returns the misses of a cache of this size. The first half of the reads does not count.
    pub(super) fn of(reads: &[u32], cache: u32) -> Self {
        let mut lru = Lru::new(FixedHashes::default());
        let (mut all, mut counted) = (Vec::new(), 0);
        for (index, &block) in reads.iter().enumerate() {
            if index == reads.len() / 2 {
                counted = all.len();
            }
            if lru.hit(block) {
                continue;
            }
            let given_up = if lru.len() >= cache as usize { lru.evict() } else { None };
            lru.insert(block, History::NONE);
            all.push(Miss { block, given_up });
        }
        Self { all, counted, reads: (reads.len() - reads.len() / 2) as u64 }
    }

    /// Returns the number of counted misses.
    pub(super) fn len(&self) -> u64 {
        (self.all.len() - self.counted) as u64
    }
}
