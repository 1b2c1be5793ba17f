//! The guest's cache, by LRU: which reads pass it, and what it gives up for them. It does not depend on the
//! host's.

use samepage_sharing::blocks::replace::{History, Replacement};

use super::host::FixedHashes;
use super::policies::Lru;

/// A read that the guest's cache does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Miss {
    pub(super) block: u32,
    /// What the guest gives up for it, once its cache is full.
    pub(super) given_up: Option<u32>,
}

/// What the host sees of a guest's reads.
#[derive(Debug)]
pub(super) struct Misses {
    pub(super) all: Vec<Miss>,
    /// The first of them that counts: the caches are full by then.
    pub(super) counted: usize,
    /// Reads that count, with those that the guest's cache answers.
    pub(super) reads: u64,
}

impl Misses {
    /// The reads that pass a cache of this size. The first half of the reads does not count.
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

    /// Misses that count.
    pub(super) fn len(&self) -> u64 {
        (self.all.len() - self.counted) as u64
    }
}
