//! What a VM would gain from more memory: of the blocks that it reads now, which part it would have held.
//!
//! The host sees a VM's misses, the blocks that it reads, and what it gives up for them. With x blocks of
//! memory more, a VM would still hold the x blocks that it gave up last and has not read again. So there is
//! a stack of these, and a block's depth in it when it is read again is the memory that would have saved the
//! read. How many reads each size saves is a [`Curve`].
//!
//! Only some blocks are followed, chosen by hash, so that an estimator takes 512 KiB at most whatever the
//! VM's size: the fixed-size SHARDS of Waldspurger, Park, Garthwaite and Ahmad, "Efficient MRC construction
//! with SHARDS" (FAST 2015), with its adjustment (SHARDS-adj). In place of references to all memory, which
//! nobody sees, it is given evictions and misses, as in Jones, Arpaci-Dusseau and Arpaci-Dusseau, "Geiger"
//! (ASPLOS 2006).
//!
//! It is about a window of the latest reads: a read counts e times less after each window, and what was
//! given up four windows ago is forgotten. Sizes are in blocks, time in reads that missed.

mod curve;
mod histogram;
mod stack;
#[cfg(test)]
mod tests;

use std::hash::{BuildHasher, Hash, RandomState};

pub use curve::Curve;
use histogram::Histogram;
use stack::Stack;

/// Blocks that are followed at most: with as many, curves are off by about a hundredth.
const SAMPLES: usize = 8192;
/// What was given up this many windows ago is forgotten.
const MEMORY: u32 = 4;

/// What the host sees of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sight {
    /// What it reads and what it gives up: the curve is about memory of the VM's, or an exclusive cache.
    #[default]
    Evictions,
    /// What it reads: the curve is about an inclusive cache under it, of which the VM's own memory takes no
    /// part away. A block's depth is the number of others read since it was read last.
    Misses,
}

/// How to estimate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// What is seen.
    pub sight: Sight,
    /// Misses after which one counts e times less. Depths beyond four times as many are not seen. At most
    /// 2²⁹.
    pub window: u32,
}

impl Default for Settings {
    /// Evictions are seen; a window of 4 GiB in blocks of 4 KiB.
    fn default() -> Self {
        Self { sight: Sight::Evictions, window: 1 << 20 }
    }
}

/// The estimator of one VM.
#[derive(Debug)]
pub struct WorkingSet<S = RandomState> {
    settings: Settings,
    stack: Stack,
    histogram: Histogram,
    /// Misses until now; wraps.
    now: u32,
    /// Below which hashes of blocks of each disk are told of.
    limits: Vec<u64>,
    hashes: S,
}

impl WorkingSet {
    /// Nothing was seen yet. Hashes are keyed at random, so that no guest can choose what is followed.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self::with_hashes(settings, RandomState::new())
    }
}

impl<S: BuildHasher> WorkingSet<S> {
    /// The same with hashes of this kind.
    pub fn with_hashes(settings: Settings, hashes: S) -> Self {
        let window = settings.window.clamp(1, 1 << 29);
        let settings = Settings { window, ..settings };
        let stack = Stack::new(SAMPLES, window * MEMORY);
        Self { settings, stack, histogram: Histogram::new(window), now: 0, limits: Vec::new(), hashes }
    }

    /// The VM reads a block that it does not hold.
    pub fn missed(&mut self, block: impl Hash) {
        let hash = self.hash(block);
        self.now = self.now.wrapping_add(1);
        self.histogram.tick();
        self.stack.pass(self.now);
        let found = self.stack.take(hash);
        if self.stack.counts(hash) {
            self.histogram.add(found, self.stack.rate());
        }
        if self.settings.sight == Sight::Misses {
            self.stack.push(hash, self.now);
        }
    }

    /// The VM gave a block up. Without effect where only misses are to be seen.
    pub fn evicted(&mut self, block: impl Hash) {
        if self.settings.sight == Sight::Evictions {
            let hash = self.hash(block);
            self.stack.take(hash);
            self.stack.push(hash, self.now);
        }
    }

    /// So many reads that missed were not told of, since their blocks are not among those that are
    /// [followed](Self::follow_below).
    pub fn passed(&mut self, reads: u64) {
        let reads = u32::try_from(reads).unwrap_or(u32::MAX);
        self.now = self.now.wrapping_add(reads);
        self.histogram.pass(reads);
    }

    /// Blocks of one of the VM's disks whose hashes are not below this are not told of from now on. Where limits
    /// differ only blocks below the lowest are followed, of all disks: the part that is followed is the same of
    /// each.
    pub fn follow_below(&mut self, disk: usize, limit: u64) {
        if self.limits.len() <= disk {
            self.limits.resize(disk + 1, u64::MAX);
        }
        self.limits[disk] = limit;
        self.stack.limit(self.limits.iter().copied().min().unwrap_or(u64::MAX));
    }

    /// An odd number.
    fn hash(&self, block: impl Hash) -> u64 {
        self.hashes.hash_one(block) | 1
    }

    /// Which part of its misses the VM would have with more memory.
    #[must_use]
    pub fn curve(&self) -> Curve {
        self.histogram.curve()
    }

    /// How many misses the curve is about, with older ones counted less.
    #[must_use]
    pub fn misses(&self) -> f64 {
        self.histogram.misses()
    }

    /// The part of all blocks that is followed.
    #[must_use]
    pub fn sampling_rate(&self) -> f64 {
        self.stack.rate()
    }

    /// Bytes that the estimator takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of::<Self>()
            + self.stack.bytes()
            + self.histogram.bytes()
            + self.limits.capacity() * size_of::<u64>()
    }
}
