//! The host's cache of disk blocks: what is kept of blocks that no guest holds.
//!
//! - `block_index`: which frame holds which block; `copies`: which guest page a block was copied to.
//! - `state`: what is cached, read and written at the moment; `read`: a read, and what it comes to.
//! - `limit`: how much memory cached blocks may take; `available`: how much there is; [`statistics`].
//! - [`admission`]: which reads go through the cache at all.
//! - [`replace`]: which cached block goes first.
//! - [`working_set`]: how many more blocks each VM would use, by what it reads again after giving it up.

pub mod admission;
pub mod available;
pub(crate) mod block_index;
pub(crate) mod copies;
pub(crate) mod limit;
pub(crate) mod read;
pub mod replace;
pub(crate) mod state;
pub mod statistics;
pub mod working_set;

pub use block_index::Keep;
pub use limit::CacheSize;
pub use read::{BlockRead, CopyOut, FetchRun, ReadPlan, VmNumber};
pub use state::Image;
