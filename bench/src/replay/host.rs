//! The host's cache below the guest's.

use std::hash::{BuildHasherDefault, Hasher};

use samepage_sharing::blocks::replace::History;

use super::guest::Misses;
use super::policies::Policy;
use super::workload::mix;

/// Hashes that are the same in each run.
pub(super) type FixedHashes = BuildHasherDefault<Mixed>;

/// A hash of a block's number.
#[derive(Debug, Default)]
pub(super) struct Mixed(u64);

impl Hasher for Mixed {
    fn finish(&self) -> u64 {
        mix(self.0)
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 << 8) ^ u64::from(byte) ^ (self.0 >> 56);
        }
    }

    fn write_u32(&mut self, number: u32) {
        self.0 = u64::from(number);
    }
}

/// The content of the host's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Blocks that guests read, even while they hold them.
    Inclusive,
    /// Blocks that guests evicted, until they read them again.
    Exclusive,
}

/// Returns how many of the counted misses a cache of this size serves.
pub(super) fn hits(misses: &Misses, policy: Policy, usage: Use, blocks: u32, data: u32) -> u64 {
    let mut cache = policy.start_with::<u32>(FixedHashes::default());
    // Histories of the blocks that the guest holds.
    let mut histories = vec![History::NONE; data as usize];
    let mut hits = 0;
    for (index, miss) in misses.all.iter().enumerate() {
        let hit = match usage {
            Use::Inclusive => {
                let hit = cache.hit(miss.block);
                if !hit {
                    let history = cache.miss(miss.block);
                    cache.insert(miss.block, history);
                }
                hit
            }
            Use::Exclusive => {
                let taken = cache.take(miss.block);
                histories[miss.block as usize] = taken.unwrap_or_else(|| cache.miss(miss.block));
                if let Some(block) = miss.given_up {
                    cache.insert(block, histories[block as usize]);
                }
                taken.is_some()
            }
        };
        hits += u64::from(hit && index >= misses.counted);
        while cache.len() > blocks as usize {
            cache.evict();
        }
    }
    hits
}
