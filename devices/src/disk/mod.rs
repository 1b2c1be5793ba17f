//! What lies behind a disk: images, the ways to read and write them, and the cache of their blocks.

pub mod cache;
