//! What a disk asks of a cache of blocks, and what it promises to it.
//!
//! The cache is not here: it belongs to whoever decides what host memory holds. A disk asks it before it
//! reads whole blocks, reads from the image what the cache lacks into memory that the cache provides, and
//! tells it of everything that changes blocks. Blocks are of [`BLOCK_SIZE`] bytes, and addressed by the
//! image that they really lie in ([`ImageId`]) and their number within it.
//!
//! # Order of calls
//! - A read is [`BlockCache::begin_read`], then for each fetch that it asks for one read of the image and
//!   one [`BlockCache::end_fetch`]. Every fetch is ended, also when the read fails and when the device is
//!   reset meanwhile; host I/O into its buffer is over by then.
//! - Where [`BlockCache::admits`] says no, the disk reads by itself, as if there were no cache.
//! - A write, discard or zeroing is [`BlockCache::begin_write`] before the first byte of it is submitted,
//!   then the change, then [`BlockCache::end_write`] with the same image and blocks, whether the change
//!   succeeded or not, before the guest is told of it. Writes of the same blocks may overlap.
//! - A block that is changed partly counts as changed. A read that only partly covers a block does not ask
//!   the cache for it.
//!
//! Calls come from the threads of several queues and disks at once. None is made while the disk holds a
//! lock that serving another call could need, so an implementation may block for a moment.
//!
//! # Identity
//! Two blocks of the same [`ImageId`] and number have the same content unless a write was announced in
//! between. So whatever decides the content is part of it ([`identity`](super::identity) says how).
//! Whoever changes an image outside of this process, against its locks, breaks that promise.

use std::any::Any;
use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::Format;

/// Bytes of a block: the unit of the cache.
pub const BLOCK_SIZE: u64 = 4096;

/// One state of an image file at rest, read in one format; the same for every disk that reads through it.
///
/// For a disk that is an overlay, blocks that come from its backing file have the identity of that file.
/// Block `n` of an image is what a guest would see at byte `n * 4096`, if that image were the disk and
/// nothing backed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageId {
    device: u64,
    inode: u64,
    version: u64,
    format: u64,
}

impl ImageId {
    /// The file `inode` of the host's device `device`, read in `format`. `version` tells its present content
    /// from what that file, or another one under that number, held earlier.
    pub const fn new(device: u64, inode: u64, version: u64, format: Format) -> Self {
        let format = match format {
            Format::Raw => 0,
            Format::Qcow2 => 1,
        };
        Self { device, inode, version, format }
    }

    /// Its four parts, in the order in which [`new`](Self::new) takes them; the format as a number.
    pub const fn parts(self) -> [u64; 4] {
        [self.device, self.inode, self.version, self.format]
    }
}

/// A run of whole blocks, one after the other.
#[derive(Clone, Copy, Debug)]
pub struct BlockRead<'a> {
    /// The image that all of them lie in.
    pub image: ImageId,
    /// Number of the first block.
    pub first: u64,
    /// Where block `first + i` goes: `targets[i]` begins 4096 bytes of guest RAM, without a gap and
    /// aligned or not. At least one.
    pub targets: &'a [GuestAddress],
}

/// Blocks that are in guest memory when [`BlockCache::begin_read`] returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Blocks that a guest held as well.
    pub from_guests: u64,
    /// Blocks that the host alone held.
    pub from_host: u64,
}

/// What [`BlockCache::begin_read`] came to. Every block of the read is in exactly one of the three.
#[derive(Debug, Default)]
pub struct ReadPlan {
    /// Blocks that have been delivered.
    pub served: Served,
    /// Runs of blocks that the disk is to read into the cache's memory.
    pub fetches: Vec<Fetch>,
    /// Ranges of block numbers that the cache has no place for: the disk reads and delivers them itself.
    pub past: Vec<Range<u64>>,
}

/// Host memory that a run of blocks is to be read into.
///
/// It belongs to the cache, is aligned to 4096 bytes, and no guest can reach it before the fetch has ended.
/// A fetch ends in [`BlockCache::end_fetch`]; dropping it instead gives the memory back at most.
pub struct Fetch {
    first: u64,
    blocks: u32,
    buffer: NonNull<u8>,
    token: u64,
    lease: Arc<dyn Any + Send + Sync>,
}

impl Fetch {
    /// A fetch of `blocks` blocks from number `first` on into the memory at `buffer`. `token` and `lease`
    /// are the cache's own; it gets them back with the fetch.
    ///
    /// # Safety
    /// `buffer` is aligned to 4096 bytes. While `lease` lives, the `blocks * 4096` bytes there can be
    /// written, and nothing but the holder of this fetch touches them.
    #[expect(unsafe_code, reason = "the caller vouches for the memory")]
    pub unsafe fn new(
        first: u64,
        blocks: u32,
        buffer: NonNull<u8>,
        token: u64,
        lease: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        debug_assert!(buffer.addr().get().is_multiple_of(BLOCK_SIZE as usize));
        Self { first, blocks, buffer, token, lease }
    }

    /// Number of the first block.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Bytes to be read.
    pub fn bytes(&self) -> usize {
        self.blocks as usize * BLOCK_SIZE as usize
    }

    /// Where they are read to. The memory is there as long as this fetch.
    pub fn buffer(&self) -> NonNull<u8> {
        self.buffer
    }

    /// Puts into its memory what was read elsewhere.
    ///
    /// # Panics
    /// If `data` is not as long as the memory.
    #[expect(unsafe_code, reason = "fills memory by address")]
    pub fn fill(&mut self, data: &[u8]) {
        assert_eq!(data.len(), self.bytes());
        // SAFETY: whoever made the fetch vouched that its buffer can be written, and that nobody else touches it
        // while the fetch lives.
        unsafe { self.buffer.as_ptr().copy_from_nonoverlapping(data.as_ptr(), data.len()) };
    }

    /// What the cache calls this fetch.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// What keeps the memory.
    pub fn lease(&self) -> &Arc<dyn Any + Send + Sync> {
        &self.lease
    }
}

// SAFETY: the pointer is to memory that the fetch alone may use and that its lease keeps, whichever thread
// has the fetch: whoever called `new` has vouched for that.
#[expect(unsafe_code, reason = "a pointer is not Send by itself")]
unsafe impl Send for Fetch {}

impl fmt::Debug for Fetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, blocks, token, .. } = self;
        f.debug_struct("Fetch").field("first", first).field("blocks", blocks).field("token", token).finish()
    }
}

/// A cache of the blocks of images.
pub trait BlockCache: Send + Sync {
    /// Whether the cache has any use for a read of these blocks. If not, the disk need not ask it for them.
    fn admits(&self, _blocks: Range<u64>) -> bool {
        true
    }

    /// Delivers what the cache has of the read, and says what becomes of the rest.
    fn begin_read(&self, read: &BlockRead<'_>) -> ReadPlan;

    /// The blocks of the fetch have been read in full, or not all of them (`Err`): nothing is kept or
    /// delivered then. On `Ok(())` they are in guest memory on return.
    ///
    /// # Errors
    /// Where they could not be delivered: the guest's request fails.
    fn end_fetch(&self, fetch: Fetch, read: Result<(), ()>) -> io::Result<()>;

    /// These blocks are about to change: they lose their identity, and fetches of them that are under way
    /// do not become cached.
    fn begin_write(&self, image: ImageId, blocks: Range<u64>);

    /// The change announced by [`begin_write`](Self::begin_write) is over, or has failed.
    fn end_write(&self, image: ImageId, blocks: Range<u64>);
}
