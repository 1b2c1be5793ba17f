//! Raw images: files and block devices with the same bytes as the disk.

#![expect(unsafe_code, reason = "vectors of addresses are handed to preadv and pwritev")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::Format;
use super::cache::ImageId;
use super::image::{Image, Layer, Location, SECTOR_SIZE};
use super::memory::Memory;
use super::open::{DirectAlignment, ImageFile, OpenError, ResizeError, fallocate};

/// A raw image file or a block device. It stays locked while it is open.
#[derive(Debug)]
pub struct RawFile {
    image: ImageFile,
    /// The size in bytes.
    size: AtomicU64,
    /// The alignment of direct I/O; `None` if the page cache is used.
    direct: Option<DirectAlignment>,
    can_discard: bool,
    flush_failed: AtomicBool,
}

impl RawFile {
    /// Opens and locks the disk at `path` for access through the page cache.
    ///     ///
    /// # Errors
    /// Fails if the file cannot be a disk.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        Self::new(ImageFile::open(path, read_only)?, false)
    }

    /// Returns a disk on an open file. With `direct`, it bypasses the page cache if possible.
    pub(crate) fn new(image: ImageFile, direct: bool) -> Result<Self, OpenError> {
        image.check_sectors()?;
        let can_discard = image.can_discard();
        let size = AtomicU64::new(image.size);
        let mut raw = Self { image, size, direct: None, can_discard, flush_failed: AtomicBool::new(false) };
        if direct {
            raw.direct = raw.direct_alignment()?;
        }
        Ok(raw)
    }

    /// Direct I/O cannot access a block that reaches beyond the end of the file. Such a file uses the page
    /// cache.
    fn direct_alignment(&self) -> Result<Option<DirectAlignment>, OpenError> {
        match self.image.direct_alignment()? {
            Some(alignment) if self.image.size.is_multiple_of(alignment.offset.into()) => {
                self.image.use_direct_io().map(|usable| usable.then_some(alignment))
            }
            _ => Ok(None),
        }
    }

    /// Opens a disk that accepts only whole pieces of `alignment` bytes, as some devices do.
    #[cfg(test)]
    pub(crate) fn open_in_blocks(path: &Path, alignment: u32) -> Result<Self, OpenError> {
        let direct = DirectAlignment { memory: alignment.min(4096), offset: alignment };
        let mut raw = Self::new(ImageFile::open(path, false)?, true)?;
        assert!(raw.image.size.is_multiple_of(alignment.into()));
        raw.direct = Some(direct);
        Ok(raw)
    }

    /// Returns the alignment of direct I/O, or `None` if requests go through the page cache.
    pub(crate) fn direct(&self) -> Option<DirectAlignment> {
        self.direct
    }

    pub(crate) fn file(&self) -> &File {
        &self.image.file
    }

    /// Transfers all of `memory` from or to the disk at byte `offset`, and waits for the end.
    pub(crate) fn transfer(&self, memory: &mut Memory, offset: u64, write: bool) -> io::Result<()> {
        let fd = self.image.file.as_raw_fd();
        let mut done = 0;
        while done < memory.len() {
            let vectors = memory.vectors(done);
            let position = i64::try_from(offset + done as u64).map_err(|_| io::ErrorKind::InvalidInput)?;
            let (first, count) = (vectors.as_ptr(), vectors.len() as i32);
            let moved = if write {
                // SAFETY: the vectors are of memory that `memory` keeps and that the kernel may read.
                unsafe { libc::pwritev(fd, first, count, position) }
            } else {
                assert!(!matches!(memory, Memory::Guest(_)), "guest memory is only written from");
                // SAFETY: as above; the memory is the host's alone and borrowed mutably.
                unsafe { libc::preadv(fd, first, count, position) }
            };
            match usize::try_from(moved) {
                Ok(0) => return Err(ended_early(write)),
                Ok(moved) => done += moved,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Returns the result of a flush, given the result of `fdatasync`.
    ///     ///
    /// After a failed write-back the kernel drops the data and marks the pages clean, and the next
    /// `fdatasync` succeeds. So a flush after a failure must not report success.
    pub(crate) fn flushed(&self, result: io::Result<()>) -> io::Result<()> {
        if self.flush_failed.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier flush failed and may have lost data"));
        }
        result.inspect_err(|_| self.flush_failed.store(true, Ordering::Release))
    }
}

/// Returns the error of a transfer that ended before all bytes were transferred.
pub(crate) fn ended_early(write: bool) -> io::Error {
    if write {
        io::Error::new(io::ErrorKind::WriteZero, "the host took part of the data only")
    } else {
        io::Error::new(io::ErrorKind::UnexpectedEof, "the image file has become too short")
    }
}

/// The mode in which `fallocate` frees storage.
pub(crate) const DISCARD_MODE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// Returns the mode in which `fallocate` zeroes a range.
pub(crate) fn zero_mode(unmap: bool) -> i32 {
    let how = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
    how | libc::FALLOC_FL_KEEP_SIZE
}

/// Translates the different errors by which file systems and devices refuse a mode.
pub(crate) fn fallocated(result: io::Result<()>) -> io::Result<()> {
    result.map_err(|error| match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS | libc::ENODEV) => {
            io::Error::new(io::ErrorKind::Unsupported, error)
        }
        _ => error,
    })
}

impl Image for RawFile {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn refresh_size(&self) -> Result<u64, ResizeError> {
        let size = self.image.measure()?;
        let unit = self.direct.map_or(SECTOR_SIZE, |direct| SECTOR_SIZE.max(direct.offset.into()));
        if size == 0 || !size.is_multiple_of(unit) {
            return Err(ResizeError::Size { path: self.image.path.clone(), size, unit });
        }
        self.size.store(size, Ordering::Release);
        Ok(size)
    }

    fn is_read_only(&self) -> bool {
        self.image.read_only
    }

    fn physical_block_size(&self) -> u32 {
        self.image.preferred_block_size().max(self.direct.map_or(0, |direct| direct.offset))
    }

    fn can_discard(&self) -> bool {
        self.can_discard
    }

    fn identity(&self) -> Option<ImageId> {
        Some(self.image.id(Format::Raw))
    }

    fn locate(&self, _offset: u64, len: u64) -> io::Result<Location> {
        Ok(Location { layer: Layer(0), image: self.identity(), len })
    }

    fn read_at(&self, _layer: Layer, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.image.file.read_exact_at(data, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.image.file.write_all_at(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.flushed(self.image.file.sync_data())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        fallocated(fallocate(&self.image.file, DISCARD_MODE, offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        fallocated(fallocate(&self.image.file, zero_mode(unmap), offset, len))
    }

    fn raw(&self) -> Option<&RawFile> {
        Some(self)
    }
}
