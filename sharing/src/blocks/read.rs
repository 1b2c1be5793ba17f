//! A read of disk blocks, and what it comes to.

use std::ops::Range;
use std::ptr::NonNull;

use super::block_index::Keep;
use super::state::Image;
use crate::memory::content::Page;
use crate::numbers::Slot;

/// A run of blocks that a VM reads.
#[derive(Clone, Copy, Debug)]
pub struct BlockRead<'a> {
    /// How long the host is to keep them.
    pub keep: Keep,
    /// The image.
    pub image: Image,
    /// Number of the first block.
    pub first: u64,
    /// The page of the VM that each goes to; `None` where that is not one whole page.
    pub targets: &'a [Option<u32>],
}

/// Copies the content of a block, by its place in [`BlockRead::targets`], into guest memory, so that the
/// VM's change log knows of it.
pub type CopyOut<'a> = dyn FnMut(usize, &Page) + 'a;

/// A VM among all that an engine ever had: another in its slot has another number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmNumber {
    pub(crate) slot: Slot,
    pub(crate) id: u64,
}

/// What a read came to. Each block is in one of the four.
#[derive(Debug, Default)]
pub struct ReadPlan {
    /// Blocks delivered that a guest held.
    pub from_guests: u64,
    /// Blocks delivered that the host alone held.
    pub from_host: u64,
    /// Runs to be read from the disk.
    pub fetches: Vec<FetchRun>,
    /// Blocks that there is no room for.
    pub past: Vec<Range<u64>>,
    /// Blocks that the VM and the host's cache may hold together.
    pub room: u64,
}

/// A run of blocks to be read into frames.
#[derive(Debug)]
pub struct FetchRun {
    /// By what the run is known.
    pub token: u64,
    /// Number of the first block.
    pub first: u64,
    /// How many.
    pub blocks: u32,
    /// Where they are read to. Nobody else touches this memory until the fetch is ended; it lasts as long
    /// as the group.
    pub landing: NonNull<u8>,
}
