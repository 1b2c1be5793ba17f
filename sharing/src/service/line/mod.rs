//! The way from a disk in a worker to the blocks that its group holds. Each queue of a disk has a *line*: a pair of
//! sockets that keep messages apart, and memory in common for the content of blocks.
//!
//! - [`messages`]: what both ends say.
//! - [`asking`]: the end of the disk, in the worker.
//! - [`serving`]: the end of the engine.
//!
//! # A read
//! The disk asks for blocks of an image, with the pages that they go to. What the group has is delivered at once: the
//! engine orders to map frames over the pages, or puts the content into the common memory. What nobody has is read from
//! the image by whoever serves the line, into frames, and delivered then. The answer comes when all of that is done. The
//! disk copies from the common memory itself, so its VM's change log records that. It reads itself what there is no room
//! for.
//!
//! # Who trusts whom
//! A worker says which file it means, and not which blocks of the cache. Whoever serves the line names blocks, by images
//! that it has opened itself, and reads them itself. So a worker cannot put anything into the cache, and cannot ask for
//! blocks of other images. It can read all frames of its group in any case.
//!
//! # When the engine is gone
//! An order to map frames may still be on its way when the line ends, or when an answer says that sharing has stopped.
//! The disk [seals](crate::remote::serve::Vms::seal) the VM's memory before it reads the blocks itself.

pub mod asking;
pub mod messages;
pub mod serving;
