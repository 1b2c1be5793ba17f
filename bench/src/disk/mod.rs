//! The common parts of disk benchmarks: images with known content, and guests that use them.

pub(super) mod client;
pub(super) mod image;

use std::path::PathBuf;

/// Address of the registers of a VM's first disk.
pub(super) const FIRST_DISK: u64 = samepage_machine::x86::layout::MMIO_START;

/// Returns the default folder for images.
pub(super) fn default_folder() -> PathBuf {
    std::env::temp_dir()
}
