//! Builds what guests of the tests are made of, and runs every check of the project.
//!
//! Integration tests link this crate for [`artifacts`], which finds the guest kernel, the initial
//! RAM file system and the disk image that `cargo xtask artifacts` has built.

#![forbid(unsafe_code)]

pub mod artifacts;
pub mod bench;
pub mod cache;
pub mod check;
mod cpio;
pub mod deny;
pub mod disk;
pub mod initramfs;
pub mod kernel;
pub mod lab;
pub mod node;
pub mod process;
pub mod promtool;
pub mod python;
pub mod setup;
pub mod suite;

use std::path::PathBuf;

/// The root folder of the project.
pub fn project_root() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root
}
