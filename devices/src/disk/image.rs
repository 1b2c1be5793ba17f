//! Images: the data of disks, in any format.

use std::io;

use super::cache::ImageId;
use super::open::ResizeError;
use super::raw::RawFile;

/// Unit of positions and lengths in virtio, in bytes.
pub const SECTOR_SIZE: u64 = 512;

/// The position of an image in its chain: 0 is the writable image, 1 its backing image, and so on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layer(pub usize);

/// The source of a run of bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// The image that holds the bytes, at the same offset as on the disk.
    pub layer: Layer,
    /// The identity of that image. `None` if no image holds the bytes, or if the image has no identity.
    pub image: Option<ImageId>,
    /// Length of the run in bytes, at least one.
    pub len: u64,
}

/// A virtual disk: an array of bytes.
///
/// Calls come from several threads at the same time and may block. An error fails only the request that
/// caused it. A success that the guest has seen is never revoked. Offsets and lengths are multiples of
/// [`SECTOR_SIZE`] within the disk.
pub trait Image: Send + Sync {
    /// Returns the size of the disk in bytes, a multiple of [`SECTOR_SIZE`]. Only
    /// [`refresh_size`](Self::refresh_size) changes it.
    fn size(&self) -> u64;

    /// Adopts the file's present size, if the file's size is the disk's. Returns the size in bytes.
    ///     ///
    /// # Errors
    /// Fails if the disk keeps its earlier size.
    fn refresh_size(&self) -> Result<u64, ResizeError> {
        Ok(self.size())
    }

    /// Returns whether the image refuses writes.
    fn is_read_only(&self) -> bool;

    /// Returns the preferred unit of reads and writes, in bytes: a power of two, at least [`SECTOR_SIZE`].
    fn physical_block_size(&self) -> u32;

    /// Returns whether the image can free unused storage.
    fn can_discard(&self) -> bool;

    /// Returns the identity for content that is written to the disk, or `None` if there is none.
    fn identity(&self) -> Option<ImageId>;

    /// Returns the source of at most `len` bytes from `offset` on.
    ///     ///
    /// # Errors
    /// Fails if the image's tables cannot be read.
    fn locate(&self, offset: u64, len: u64) -> io::Result<Location>;

    /// Fills `data` with the bytes at `offset` in the view of `layer`.
    ///     ///
    /// # Errors
    /// Fails if not all of the bytes can be read.
    fn read_at(&self, layer: Layer, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Stores all of `data` at byte `offset`.
    ///
    /// # Errors
    /// Fails if not all of it could be stored. A part may be stored nevertheless.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Returns when all completed writes are on the medium.
    ///     ///
    /// # Errors
    /// Fails if some of the writes may not be on the medium.
    fn flush(&self) -> io::Result<()>;

    /// Discards the content of a range.
    ///     ///
    /// # Errors
    /// Fails with [`io::ErrorKind::Unsupported`] if the image cannot discard.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Zeroes a range. With `unmap`, the image may free the storage of the range.
    ///     ///
    /// # Errors
    /// Fails with [`io::ErrorKind::Unsupported`] if the caller must write zeros.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Returns the file, if the file's bytes are the disk's. The kernel can then serve requests without a
    /// thread that waits for them.
    fn raw(&self) -> Option<&RawFile> {
        None
    }
}
