//! One queue's way to an image: operations go in, completions come out in any order.

use std::io;
use std::os::fd::RawFd;

use super::image::Layer;
use super::memory::Memory;

/// What an operation does. It owns the memory that it works on.
pub(crate) enum Action {
    /// Fills the memory from an image of the chain.
    Read(Layer, Memory),
    /// Stores the memory's content.
    Write(Memory),
    /// Puts on the medium what was written by operations that have completed.
    Flush,
    /// The content of so many bytes does not matter any more.
    Discard(u64),
    /// So many bytes become zeroes.
    Zero {
        /// How many.
        len: u64,
        /// Their storage may be given back.
        unmap: bool,
    },
}

/// Something to be done to an image.
pub(crate) struct Operation {
    /// The caller's, to know the completion by.
    pub(crate) id: usize,
    /// Where it begins, in bytes.
    pub(crate) offset: u64,
    pub(crate) action: Action,
}

/// An operation that is over.
pub(crate) struct Completion {
    pub(crate) operation: Operation,
    pub(crate) result: io::Result<()>,
    /// What serves the image has failed in a way that leaves its state unknown: nothing may be asked of it
    /// any more.
    pub(crate) lost: bool,
}

/// Operations cannot be carried out any more. Those under way may be.
#[derive(Debug, thiserror::Error)]
#[error("serve a disk: {0}; restart the VM")]
pub(crate) struct ChannelLost(pub(crate) String);

/// Carries operations of one queue out.
///
/// Dropping it waits for the operations under way: afterwards nothing touches their memory.
pub(crate) trait Channel: Send {
    /// Takes an operation. It may not begin before [`kick`](Self::kick).
    fn submit(&mut self, operation: Operation);

    /// Begins all operations taken.
    fn kick(&mut self) -> Result<(), ChannelLost>;

    /// Appends what is over to `completions`.
    fn reap(&mut self, completions: &mut Vec<Completion>) -> Result<(), ChannelLost>;

    /// Operations taken and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Waits until an operation under way is over, if any is.
    fn wait(&mut self) -> Result<(), ChannelLost>;

    /// Becomes readable when operations are over.
    fn event(&self) -> RawFd;
}
