//! The files of test guests, and their places.

use crate::cache::Cache;
use crate::{disk, initramfs, kernel};
use anyhow::{Result, bail};
use serde::Serialize;
use std::path::PathBuf;

pub use crate::disk::{DiskFile, FILES as DISK_FILES};
pub use samepage_resources::guest_kernel::COMMAND_LINE;

/// The files that a test guest boots from. They are shared, so nothing may write to them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Artifacts {
    /// An ELF kernel with a PVH entry point.
    pub kernel: PathBuf,
    /// The initial RAM file system, with the guest agent as init.
    pub initramfs: PathBuf,
    /// An ext2 image with the files of [`DISK_FILES`].
    pub disk: PathBuf,
}

impl Artifacts {
    /// Builds the files that the user's cache lacks.
    ///
    /// # Errors
    /// Fails if a build fails.
    pub fn build() -> Result<Self> {
        let cache = Cache::of_user()?;
        // The kernel comes last, because it takes minutes. The others show errors in seconds.
        let initramfs = initramfs::build(&cache)?;
        let disk = disk::build(&cache)?;
        Ok(Self { kernel: kernel::build(&cache)?, initramfs, disk })
    }

    /// Finds the files for the present working copy, without building anything.
    ///
    /// # Errors
    /// Fails if a file has not been built yet.
    pub fn locate() -> Result<Self> {
        let cache = Cache::of_user()?;
        let found = (kernel::find(&cache)?, initramfs::find(&cache)?, disk::find(&cache));
        let (Some(kernel), Some(initramfs), Some(disk)) = found else {
            bail!(
                "guests for the tests are missing from {}: build them with `cargo xtask artifacts`",
                cache.root().display()
            );
        };
        Ok(Self { kernel, initramfs, disk })
    }
}
