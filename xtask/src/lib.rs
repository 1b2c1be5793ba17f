//! Builds the files of test guests, and runs every check of the project.
//!
//! Integration tests use [`artifacts`], which finds the guest kernel, the initial RAM file system and the
//! disk image of `cargo xtask artifacts`.

#![forbid(unsafe_code)]

pub mod artifacts;
pub mod bench;
pub mod cache;
pub mod check;
mod cpio;
pub mod deb;
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

/// Returns the root folder of the project.
pub fn project_root() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root
}
