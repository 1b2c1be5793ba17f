//! The compared policies: S3-FIFO, which the cache uses, and others.

mod arc;
mod lru;
#[cfg(test)]
mod tests;
mod two_q;

use std::fmt;

use samepage_sharing::blocks::replace::{Hashes, Key, Replacement, S3Fifo};

use arc::Arc;
pub(super) use lru::Lru;
use two_q::TwoQ;

/// The policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Policy {
    /// See [`S3Fifo`].
    S3Fifo,
    /// See [`struct@Arc`].
    Arc,
    /// See [`TwoQ`].
    TwoQ,
    /// See [`Lru`].
    Lru,
}

impl Policy {
    /// All policies.
    pub(super) const ALL: [Self; 4] = [Self::S3Fifo, Self::Arc, Self::TwoQ, Self::Lru];

    /// Returns the policy with an empty cache, with these hashes.
    pub(super) fn start_with<K: Key>(self, hashes: impl Hashes) -> Box<dyn Replacement<K>> {
        match self {
            Self::S3Fifo => Box::new(S3Fifo::new(hashes)),
            Self::Arc => Box::new(Arc::new(hashes)),
            Self::TwoQ => Box::new(TwoQ::new(hashes)),
            Self::Lru => Box::new(Lru::new(hashes)),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::S3Fifo => "S3-FIFO",
            Self::Arc => "ARC",
            Self::TwoQ => "2Q",
            Self::Lru => "LRU",
        })
    }
}
