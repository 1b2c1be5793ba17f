//! What a disk's data lies in, whatever its format.

use std::io;

use super::cache::ImageId;
use super::open::ResizeError;
use super::raw::RawFile;

/// Unit of virtio positions and lengths, in bytes.
pub const SECTOR_SIZE: u64 = 512;

/// Which image of a chain: 0 is the one that is written, 1 the one that backs it, and so on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layer(pub usize);

/// Where a run of bytes of a disk comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// The image to read it from. It shows these bytes at the same offset as the disk does.
    pub layer: Layer,
    /// The identity of that image; none for bytes that no image holds, or none that could be told apart.
    pub image: Option<ImageId>,
    /// How many bytes from the offset on come from there: at least one.
    pub len: u64,
}

/// A virtual disk: an array of bytes.
///
/// Calls come from several threads at once and may block. An error fails the request that caused it and
/// nothing else; what the guest was told has succeeded is never taken back. Offsets and lengths are
/// multiples of [`SECTOR_SIZE`] within the disk.
pub trait Image: Send + Sync {
    /// Bytes on the disk: a multiple of [`SECTOR_SIZE`] that [`refresh_size`](Self::refresh_size) alone
    /// changes.
    fn size(&self) -> u64;

    /// Takes over the size that the file has now, where the file's is the disk's. Returns it in bytes.
    ///
    /// # Errors
    /// Where the disk keeps the size that it had.
    fn refresh_size(&self) -> Result<u64, ResizeError> {
        Ok(self.size())
    }

    /// Nothing can be written.
    fn is_read_only(&self) -> bool;

    /// The size of the pieces that are best read and written whole, in bytes; a power of two from
    /// [`SECTOR_SIZE`] up.
    fn physical_block_size(&self) -> u32;

    /// Can give storage back that is not needed any more.
    fn can_discard(&self) -> bool;

    /// The identity that what is written to the disk gets; none if there is none.
    fn identity(&self) -> Option<ImageId>;

    /// Where the bytes from `offset` on, `len` of them at most, are now.
    ///
    /// # Errors
    /// Where that cannot be read.
    fn locate(&self, offset: u64, len: u64) -> io::Result<Location>;

    /// Fills `data` with what `layer` shows at byte `offset`.
    ///
    /// # Errors
    /// Where not all of it can be had.
    fn read_at(&self, layer: Layer, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Stores all of `data` at byte `offset`.
    ///
    /// # Errors
    /// Where not all of it could be stored; part of it may be.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Returns once all writes that have returned are on the medium.
    ///
    /// # Errors
    /// Where some may not be.
    fn flush(&self) -> io::Result<()>;

    /// The content of these bytes does not matter any more.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where the image keeps them.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// These bytes become zeroes. With `unmap` their storage may be given back.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where zeroes have to be written.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// The file whose bytes are the disk's, if it is that simple: the kernel can then be given requests
    /// without a thread that waits for them.
    fn raw(&self) -> Option<&RawFile> {
        None
    }
}
