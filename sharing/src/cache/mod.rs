//! The host's cache of disk blocks: what is kept of blocks that no guest holds.
//!
//! - [`replace`]: which cached block goes first.
//! - [`working_set`]: how many more blocks each VM would use, by what it reads again after giving it up.

pub mod replace;
pub mod working_set;
