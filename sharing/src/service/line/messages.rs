//! What the ends of a line say. All numbers from a disk are checked.

use serde::{Deserialize, Serialize};

use crate::blocks::Keep;
use crate::blocks::admission::Sampler;

/// Blocks of a read at most.
pub const MOST_BLOCKS: usize = 32;
/// Reads in progress at most. Each has a slot of the common memory for its blocks.
pub const SLOTS: usize = 32;

/// What the engine's end says first. The common memory comes with it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Welcome {
    /// Chooses the samples of the disk's group.
    pub(crate) sampler: Sampler,
}

/// An image file, and how it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// The host's device.
    pub device: u64,
    /// The file's number.
    pub inode: u64,
    /// The number of the format.
    pub format: u64,
}

/// A run of blocks that a disk reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The image.
    pub file: FileId,
    /// How long the host is to keep the blocks.
    pub keep: Keep,
    /// Number of the first block.
    pub first: u64,
    /// The page of the VM that each goes to, [`MOST_BLOCKS`] at most; `None` where that is not one whole page.
    pub targets: Vec<Option<u32>>,
    /// Nothing but a sample of the disk goes through the cache, and this read is in it.
    pub sample: Option<SampleOf>,
}

/// What the engine is told of the sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleOf {
    /// Blocks that went past the cache since the last time.
    pub passed: u64,
    /// The estimator's hashes of blocks in the sample are below this.
    pub limit: u64,
}

/// What a disk says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Said {
    Read {
        slot: u32,
        wanted: Wanted,
    },
    /// All reads of the disk go through the cache from now on.
    SamplingEnds,
}

/// What became of a read. Each bit stands for a block; a block without a bit is where it was to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The slot.
    pub(crate) slot: u32,
    /// Blocks in the common memory, which the disk copies.
    pub copied: u32,
    /// Blocks that the disk reads itself.
    pub past: u32,
    /// Blocks that a guest held.
    pub from_guests: u32,
    /// Blocks that the host alone held.
    pub from_host: u32,
    /// Blocks that were read from the image.
    pub fetched: u32,
    /// Blocks that the VM and the host's cache may hold together.
    pub room: u64,
    /// Sharing has stopped. Orders to map pages may still be on their way.
    pub is_stopped: bool,
}

/// The bit of a block.
pub(crate) fn bit(index: usize) -> u32 {
    1 << index
}

/// The bits of the first blocks.
pub(crate) fn bits(count: usize) -> u32 {
    u32::MAX.checked_shr((MOST_BLOCKS - count.min(MOST_BLOCKS)) as u32).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_counted() {
        assert_eq!([0, 1, 5, 32].map(bits), [0, 1, 31, u32::MAX]);
        assert_eq!(bit(31), 1 << 31);
    }
}
