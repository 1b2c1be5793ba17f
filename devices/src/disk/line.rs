//! The interface between one queue of a disk and a cache of disk blocks in another process.
//!
//! Such a cache reads missing blocks itself, and says later what has become of a read. So a queue has a line of its own,
//! with an event. The queue takes a buffer before it asks, because the cache may leave blocks to the disk.

use std::fmt;
use std::ops::Range;
use std::os::fd::RawFd;

use super::cache::{BlockRead, Served};
use super::image::Layer;

/// What became of a read.
#[derive(Debug)]
pub struct Answer {
    /// The number of the read.
    pub id: usize,
    /// Blocks that guests or the host held.
    pub served: Served,
    /// Blocks that were read from the image.
    pub fetched: u64,
    /// Ranges of block numbers that the disk reads and delivers itself. All other blocks are in guest memory.
    pub past: Vec<Range<u64>>,
}

/// One queue's way to a cache in another process.
///
/// If the other process is gone, all blocks of reads in progress are answered as past, and nothing touches guest memory
/// any more.
pub trait CacheLine: Send {
    /// Returns whether the cache knows blocks of an image of the disk's chain.
    fn knows(&self, layer: Layer) -> bool;

    /// Divides a read: returns how many of the first blocks, one at least, go the same way, and whether through the cache.
    fn divide(&mut self, blocks: Range<u64>) -> (u64, bool);

    /// Returns whether one more read can begin.
    fn has_room(&self) -> bool;

    /// Begins a read. To be called if there is room.
    fn begin(&mut self, id: usize, read: &BlockRead<'_>);

    /// Appends what has become of reads.
    fn reap(&mut self, answers: &mut Vec<Answer>);

    /// Returns the number of reads that were begun and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Waits for an answer, if a read is in progress.
    fn wait(&mut self);

    /// Returns a file that becomes readable when answers come.
    fn event(&self) -> RawFd;
}

impl fmt::Debug for dyn CacheLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheLine").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}
