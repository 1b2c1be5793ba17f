//! What a disk's data lies on.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::SECTOR_SIZE;

/// The data of one disk: an array of bytes that requests read and write in whole sectors.
///
/// Calls come from the disk's worker alone, one at a time, and may block. An error fails the request that
/// caused it and nothing else; a request that the guest was told has succeeded is never taken back.
pub trait Backend: Send {
    /// Bytes on the disk: a multiple of [`SECTOR_SIZE`] that does not change.
    fn size(&self) -> u64;

    /// Writes are refused.
    fn is_read_only(&self) -> bool;

    /// The size of the pieces that are best read and written whole, in bytes; a power of two from
    /// [`SECTOR_SIZE`] up.
    fn physical_block_size(&self) -> u32;

    /// Fills `data` with what lies at byte `offset`. Fails if not all of it can be had.
    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Stores all of `data` at byte `offset`.
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Returns once all that was written is on the medium.
    fn flush(&mut self) -> io::Result<()>;
}

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be opened as asked.
    #[error("open disk {path} for {access}: {source}")]
    Open {
        /// The disk.
        path: PathBuf,
        /// "reading" or "reading and writing".
        access: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file's kind or size could not be found out, or it could not be locked.
    #[error("{action} disk {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The disk.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else uses the disk in a way that excludes this one.
    #[error(
        "lock disk {path} for {access}: it is in use by another VM or program; \
         a disk may have one writer or any number of readers"
    )]
    InUse {
        /// The disk.
        path: PathBuf,
        /// "reading" or "reading and writing".
        access: &'static str,
    },
    /// A directory, a pipe, a socket or a character device.
    #[error("open disk {path}: it is {kind}; give a regular file or a block device")]
    NotADisk {
        /// The disk.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Not a whole number of sectors, or none.
    #[error(
        "open disk {path}: its size of {size} bytes is not a positive multiple of 512; resize it (truncate -s)"
    )]
    Size {
        /// The disk.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
}

/// A raw image file or a block device, read and written through the kernel's page cache.
///
/// The file is locked (`flock`) as long as it is open: exclusively for writing, shared for reading. A block
/// device opened for writing is claimed from the kernel as well (`O_EXCL`), so a mounted one is refused.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    size: u64,
    read_only: bool,
    physical_block_size: u32,
    flush_failed: bool,
}

impl RawFile {
    /// Opens and locks the disk at `path`.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let access = if read_only { "reading" } else { "reading and writing" };
        let in_use = || OpenError::InUse { path: path.to_owned(), access };
        let failed = |action| move |source| OpenError::Io { action, path: path.to_owned(), source };

        // Opening a pipe must not wait for its other end. O_EXCL without O_CREAT concerns block devices
        // alone.
        let exclusive = if read_only { 0 } else { libc::O_EXCL };
        let mut file = File::options()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK | exclusive)
            .open(path)
            .map_err(|source| match source.kind() {
                io::ErrorKind::ResourceBusy => in_use(),
                io::ErrorKind::IsADirectory => {
                    OpenError::NotADisk { path: path.to_owned(), kind: "a directory" }
                }
                _ => OpenError::Open { path: path.to_owned(), access, source },
            })?;

        let metadata = file.metadata().map_err(failed("inspect"))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let kind = if kind.is_dir() { "a directory" } else { "not a file that holds data" };
            return Err(OpenError::NotADisk { path: path.to_owned(), kind });
        }

        let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
        locked.map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => in_use(),
            std::fs::TryLockError::Error(source) => failed("lock")(source),
        })?;

        // The end of a block device is found by seeking; its metadata has no size.
        let size = file.seek(SeekFrom::End(0)).map_err(failed("measure"))?;
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(OpenError::Size { path: path.to_owned(), size });
        }
        Ok(Self {
            file,
            size,
            read_only,
            physical_block_size: physical_block_size(metadata.blksize()),
            flush_failed: false,
        })
    }
}

/// The file system's preferred block, as far as it is fit to be told to a guest.
fn physical_block_size(preferred: u64) -> u32 {
    match u32::try_from(preferred) {
        Ok(size) if size.is_power_of_two() && (512..=65536).contains(&size) => size,
        _ => 4096,
    }
}

impl Backend for RawFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn physical_block_size(&self) -> u32 {
        self.physical_block_size
    }

    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        // After a failed write-back the kernel drops the data, marks the pages clean, and the next
        // fdatasync succeeds. Success would be a lie from then on.
        if self.flush_failed {
            return Err(io::Error::other("an earlier flush failed and may have lost data"));
        }
        self.file.sync_data().inspect_err(|_| self.flush_failed = true)
    }
}
