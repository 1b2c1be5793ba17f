//! Images that guests can verify.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, IoSliceMut, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{Advice, StatVfs, fadvise, statvfs};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use samepage_resources::demo::client::BLOCK_BYTES;
use samepage_resources::demo::content::SECTOR_BYTES;
use samepage_resources::image::write_pattern;

/// An image file, which is removed when this value is dropped.
#[derive(Debug)]
pub(crate) struct Image {
    path: PathBuf,
    file: File,
}

impl Image {
    /// Makes an image of this number of blocks for guests with this seed.
    ///
    /// # Errors
    /// Fails if there is not enough room for it.
    pub(crate) fn create(folder: &Path, name: &str, seed: u32, blocks: u64) -> Result<Self> {
        let bytes = blocks * BLOCK_BYTES;
        let StatVfs { f_bavail, f_frsize, .. } =
            statvfs(folder).with_context(|| format!("there is no folder {}", folder.display()))?;
        anyhow::ensure!(
            f_bavail.saturating_mul(f_frsize) > bytes,
            "{} has no room for an image of {} MiB: name another folder with --folder",
            folder.display(),
            bytes >> 20
        );
        let path = folder.join(format!("samepage-bench-{}-{name}.img", std::process::id()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = file.with_context(|| format!("make the image {}", path.display()))?;
        let image = Self { path, file };
        image.fill(seed, bytes).with_context(|| format!("write the image {}", image.path.display()))?;
        Ok(image)
    }

    fn fill(&self, seed: u32, bytes: u64) -> Result<()> {
        let mut writer = BufWriter::new(&self.file);
        write_pattern(&mut writer, seed, bytes / SECTOR_BYTES as u64)?;
        writer.flush()?;
        drop(writer);
        self.file.sync_all()?;
        self.forget()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the kernel drop the image from its page cache.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub(crate) fn forget(&self) -> Result<()> {
        fadvise(&self.file, 0, None, Advice::DontNeed).context("empty the page cache of an image")
    }

    /// Returns those of the first blocks that the kernel's page cache holds. Finds out with reads that do not
    /// wait and so cache nothing.
    ///
    /// # Errors
    /// Fails if the image cannot be read.
    pub(crate) fn resident(&self, blocks: u32) -> Result<Vec<u32>> {
        let mut resident = Vec::new();
        let mut byte = [0];
        for block in 0..blocks {
            let mut into = [IoSliceMut::new(&mut byte)];
            match preadv2(&self.file, &mut into, u64::from(block) * BLOCK_BYTES, ReadWriteFlags::NOWAIT) {
                Ok(_) => resident.push(block),
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(error).context("ask what the page cache holds"),
            }
        }
        Ok(resident)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // A temporary file may remain.
        let _ = fs::remove_file(&self.path);
    }
}
