//! Which cached block goes first when memory is wanted.
//!
//! A [`Replacement`] knows the keys of blocks and keeps them in an order; the blocks themselves are the
//! caller's, and so is the capacity, which may change at any time: the caller calls
//! [`evict`](Replacement::evict) until enough is free.
//!
//! There are two ways to use one. *Inclusive*: a block is inserted when it is read from the disk, and stays
//! when it is read again ([`hit`](Replacement::hit)). *Exclusive*: a block is inserted when the last guest
//! gives it up (it is demoted), and leaves when a guest wants it again ([`take`](Replacement::take)). A
//! policy that learns from hits would learn nothing there, since the block is gone with its first hit: its
//! [`History`] goes with it. The caller keeps these two bits beside what it knows of the block in the guest,
//! and hands them back when the block is demoted again.
//!
//! The cache uses [`S3Fifo`]. The benchmarks compare it with other policies (`samepage bench cache-simulation`).
//!
//! The exclusive use follows Wong and Wilkes, "My cache or yours?" (ATC 2002).

mod ghost;
pub mod queues;
mod s3_fifo;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::hash::{BuildHasher, Hash};

pub use s3_fifo::S3Fifo;

/// What keys of blocks must be able to do.
pub trait Key: Copy + Eq + Hash + Send + Debug + 'static {}

impl<K: Copy + Eq + Hash + Send + Debug + 'static> Key for K {}

/// What hashes keys.
pub trait Hashes: BuildHasher + Send + Debug + 'static {}

impl<S: BuildHasher + Send + Debug + 'static> Hashes for S {}

/// An order in which blocks are evicted.
///
/// Time and memory do not depend on what keys guests choose, as long as hashes are keyed. Memory follows
/// the number of cached blocks, and is taken when that grows, not when blocks come and go.
pub trait Replacement<K>: Send + Debug {
    /// The block is cached from now on. Returns whether it was not before; one that was counts as
    /// [hit](Self::hit). A caller that did not hear of the [miss](Self::miss) gives no history: what is
    /// remembered counts all the same.
    fn insert(&mut self, key: K, history: History) -> bool;

    /// A guest reads the block, which leaves the cache for it. `None` if it is not cached.
    fn take(&mut self, key: K) -> Option<History>;

    /// A guest reads the block, which stays. Returns whether it is cached.
    fn hit(&mut self, key: K) -> bool;

    /// A guest reads a block that is not cached: it comes from the disk.
    fn miss(&mut self, key: K) -> History;

    /// The block is no longer what is on the disk, or its memory is wanted. Returns whether it was cached.
    fn remove(&mut self, key: K) -> bool;

    /// Takes the block out that is wanted least.
    fn evict(&mut self) -> Option<K>;

    /// Whether the block is cached.
    fn contains(&self, key: K) -> bool;

    /// How many blocks are cached.
    fn len(&self) -> usize;

    /// Whether no block is cached.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Blocks that are remembered without being cached.
    fn ghosts(&self) -> usize;

    /// Bytes that the order takes.
    fn bytes(&self) -> usize;

    /// Gives memory back that was taken for more blocks than there are. Takes time for each block.
    fn shrink(&mut self);
}

/// What a policy wants to know about a block that comes back: how often it was wanted again lately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct History(u8);

impl History {
    /// Of a block that was never wanted before, as far as is known.
    pub const NONE: Self = Self(0);
    /// The most that is counted.
    const MOST: u8 = 3;

    /// The history as a number of two bits.
    #[must_use]
    pub fn bits(self) -> u8 {
        self.0
    }

    /// A history from its two bits; others are ignored.
    #[must_use]
    pub fn from_bits(bits: u8) -> Self {
        Self(bits & Self::MOST)
    }

    /// The history of a block that is wanted once more, after so many times.
    #[must_use]
    pub const fn again(times: u8) -> Self {
        if times < Self::MOST { Self(times + 1) } else { Self(Self::MOST) }
    }

    /// Whether the block was never wanted before, as far as is known.
    #[must_use]
    pub fn is_none(self) -> bool {
        self == Self::NONE
    }
}
