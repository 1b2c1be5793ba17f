//! What guests of the tests are made of, and where it lies.

use crate::cache::Cache;
use crate::{disk, initramfs, kernel};
use anyhow::{Result, bail};
use serde::Serialize;
use std::path::PathBuf;

pub use crate::disk::{DiskFile, FILES as DISK_FILES};
pub use samepage_resources::guest_kernel::COMMAND_LINE;

/// The files that a test guest boots from. They are shared: don't write to them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Artifacts {
    /// An ELF kernel with a PVH entry point.
    pub kernel: PathBuf,
    /// The initial RAM file system, with the guest agent as init.
    pub initramfs: PathBuf,
    /// An ext2 image that holds [`DISK_FILES`].
    pub disk: PathBuf,
}

impl Artifacts {
    /// Builds what the user's cache lacks.
    ///
    /// # Errors
    /// A build fails.
    pub fn build() -> Result<Self> {
        let cache = Cache::of_user()?;
        // The kernel comes last: it takes minutes, and the others show what is amiss in seconds.
        let initramfs = initramfs::build(&cache)?;
        let disk = disk::build(&cache)?;
        Ok(Self { kernel: kernel::build(&cache)?, initramfs, disk })
    }

    /// Finds what has been built for the working copy as it is now, without building anything.
    ///
    /// # Errors
    /// Something has not been built yet.
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
