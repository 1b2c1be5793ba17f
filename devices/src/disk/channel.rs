//! The connection of one queue to an image: operations go in, and completions come out in any order.

use std::io;
use std::os::fd::RawFd;

use super::image::Layer;
use super::memory::Memory;

/// The kind of an operation. An operation owns its memory.
pub(crate) enum Action {
    /// Fills the memory from an image of the chain.
    Read(Layer, Memory),
    /// Stores the memory's content.
    Write(Memory),
    /// Puts the writes of completed operations on the medium.
    Flush,
    /// Discards the content of this many bytes.
    Discard(u64),
    /// Zeroes a range.
    Zero {
        /// The length, in bytes.
        len: u64,
        /// Whether the image may free the storage of the range.
        unmap: bool,
    },
}

/// A task for an image.
pub(crate) struct Operation {
    /// A number of the caller's, which identifies the completion.
    pub(crate) id: usize,
    /// Start of the range, in bytes.
    pub(crate) offset: u64,
    pub(crate) action: Action,
}

/// A completed operation.
pub(crate) struct Completion {
    pub(crate) operation: Operation,
    pub(crate) result: io::Result<()>,
    /// Whether the server of the image has failed and left the image in an unknown state. No more operations
    /// may follow.
    pub(crate) is_lost: bool,
}

/// The channel cannot carry out operations any more. Operations in progress may still complete.
#[derive(Debug, thiserror::Error)]
#[error("serve a disk: {0}; restart the VM")]
pub(crate) struct ChannelLost(pub(crate) String);

/// Carries out the operations of one queue.
///
/// Dropping the channel waits for the operations in progress. Nothing accesses their memory afterwards.
pub(crate) trait Channel: Send {
    /// Accepts an operation. The operation may not begin before [`kick`](Self::kick).
    fn submit(&mut self, operation: Operation);

    /// Begins all accepted operations.
    fn kick(&mut self) -> Result<(), ChannelLost>;

    /// Appends the completed operations to `completions`.
    fn reap(&mut self, completions: &mut Vec<Completion>) -> Result<(), ChannelLost>;

    /// Returns the number of operations that were accepted and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Waits until an operation completes, if there are any.
    fn wait(&mut self) -> Result<(), ChannelLost>;

    /// Returns a file that becomes readable when operations complete.
    fn event(&self) -> RawFd;
}
