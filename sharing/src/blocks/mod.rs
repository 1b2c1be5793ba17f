//! The host's cache of disk blocks: what is kept of blocks that no guest holds.
//!
//! - `names`: which frame holds which block; `notes`: which guest page a block was copied to.
//! - `books`: how frames come to hold blocks and are given up; `reads`: how guests get them.
//! - `limit`: how much memory cached blocks may take; `available`: how much there is; [`statistics`].
//! - [`admission`]: which reads go through the cache at all.
//! - [`replace`]: which cached block goes first.
//! - [`working_set`]: how many more blocks each VM would use, by what it reads again after giving it up.

pub mod admission;
pub(crate) mod available;
pub(crate) mod books;
pub(crate) mod limit;
pub(crate) mod names;
pub(crate) mod notes;
pub(crate) mod read;
pub mod replace;
pub mod statistics;
pub mod working_set;

pub use books::Image;
pub use limit::CacheSize;
pub use names::Keep;
pub use read::{BlockRead, CopyOut, FetchRun, ReadPlan, VmNumber};
