//! The interface between a disk and a cache of disk blocks.
//!
//! The cache itself is elsewhere: its owner decides which content the host's memory holds. A disk asks the
//! cache before it reads whole blocks. It reads missing blocks from the image into memory that the cache
//! provides, and it tells the cache of every change of blocks. A block has [`BLOCK_SIZE`] bytes. Its address
//! is the image that holds it ([`ImageId`]) and its number within that image.
//!
//! # Order of calls
//! - A read starts with [`BlockCache::begin_read`]. For each requested fetch, the disk reads the image once
//!   and calls [`BlockCache::end_fetch`] once. It ends every fetch, also after a failed read and after a
//!   reset of the device. Host I/O into the fetch's buffer has ended by then.
//! - If [`BlockCache::admits`] returns false, the disk reads the blocks itself, as if there were no cache.
//! - A write, discard or zeroing calls [`BlockCache::begin_write`] before it submits the first byte. After
//!   the change, successful or not, it calls [`BlockCache::end_write`] with the same image and blocks. The
//!   guest learns of the result only then. Writes of the same blocks may overlap.
//! - A partly changed block counts as changed. If a read covers only part of a block, the disk does not ask
//!   the cache for that block.
//!
//! Calls come from the threads of several queues and disks at the same time. The disk holds no lock during a
//! call that another call could need, so an implementation may block briefly.
//!
//! # Identity
//! Two blocks with the same [`ImageId`] and number have the same content, unless a write was announced in
//! between. So the identity includes everything that decides the content ([`identity`](super::identity) says
//! how). A program outside this process that ignores the image's locks and changes the image breaks this
//! promise.

use std::any::Any;
use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::Format;
use super::line::CacheLine;

/// Bytes of a block: the unit of the cache.
pub const BLOCK_SIZE: u64 = 4096;

/// One unmodified state of an image file, read in one format. All disks that read through the file use the
/// same identity.
///
/// If a disk is an overlay, blocks from its backing file have the identity of the backing file. Block `n` of
/// an image is the content at byte `n * 4096` of a disk on that image alone, without a backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageId {
    device: u64,
    inode: u64,
    version: u64,
    format: u64,
}

impl ImageId {
    /// Returns the identity of the file `inode` on the host's device `device`, read in `format`. `version`
    /// separates the file's present content from earlier content, and from other files with the same number.
    pub const fn new(device: u64, inode: u64, version: u64, format: Format) -> Self {
        let format = match format {
            Format::Raw => 0,
            Format::Qcow2 => 1,
        };
        Self { device, inode, version, format }
    }

    /// Returns the four parts, in the order of the arguments of [`new`](Self::new). The format is a number.
    pub const fn parts(self) -> [u64; 4] {
        [self.device, self.inode, self.version, self.format]
    }
}

/// A run of consecutive whole blocks.
#[derive(Clone, Copy, Debug)]
pub struct BlockRead<'a> {
    /// The image that holds all of the blocks.
    pub image: ImageId,
    /// Number of the first block.
    pub first: u64,
    /// Targets of the blocks: block `first + i` goes to the 4096 bytes of guest RAM at `targets[i]`, aligned
    /// or not. There is at least one.
    pub targets: &'a [GuestAddress],
}

/// Blocks that are in guest memory when [`BlockCache::begin_read`] returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Blocks that a guest also holds.
    pub from_guests: u64,
    /// Blocks that only the host holds.
    pub from_host: u64,
}

/// The result of [`BlockCache::begin_read`]. Every block of the read is in exactly one of the three fields.
#[derive(Debug, Default)]
pub struct ReadPlan {
    /// Blocks that have been delivered.
    pub served: Served,
    /// Runs of blocks that the disk must read into the cache's memory.
    pub fetches: Vec<Fetch>,
    /// Ranges of block numbers for which the cache has no room. The disk reads and delivers them itself.
    pub past: Vec<Range<u64>>,
}

/// Host memory for a run of blocks that the disk reads.
///
/// The cache owns the memory, and its address is a multiple of 4096. No guest can access it before the fetch
/// ends. [`BlockCache::end_fetch`] ends a fetch. Dropping a fetch only frees the memory.
pub struct Fetch {
    first: u64,
    blocks: u32,
    buffer: NonNull<u8>,
    token: u64,
    lease: Arc<dyn Any + Send + Sync>,
}

impl Fetch {
    /// Returns a fetch of `blocks` blocks from number `first` on into the memory at `buffer`. The cache
    /// chooses `token` and `lease`, and gets them back with the fetch.
    ///     ///
    /// # Safety
    /// `buffer` is aligned to 4096 bytes. While `lease` lives, the `blocks * 4096` bytes at `buffer` are
    /// writable, and only the holder of this fetch accesses them.
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

    /// Returns the number of the first block.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Returns the number of blocks.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Returns the number of bytes to read.
    pub fn bytes(&self) -> usize {
        self.blocks as usize * BLOCK_SIZE as usize
    }

    /// Returns the address for the blocks. The memory exists as long as the fetch.
    pub fn buffer(&self) -> NonNull<u8> {
        self.buffer
    }

    /// Fills the memory with data that was read elsewhere.
    ///
    /// # Panics
    /// Panics if `data` has another length than the memory.
    #[expect(unsafe_code, reason = "fills memory by address")]
    pub fn fill(&mut self, data: &[u8]) {
        assert_eq!(data.len(), self.bytes());
        // SAFETY: the maker of the fetch guarantees that the buffer is writable, and that only the fetch's holder
        // accesses it while the fetch lives.
        unsafe { self.buffer.as_ptr().copy_from_nonoverlapping(data.as_ptr(), data.len()) };
    }

    /// Returns the cache's number for this fetch.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// Returns the owner of the memory.
    pub fn lease(&self) -> &Arc<dyn Any + Send + Sync> {
        &self.lease
    }
}

// SAFETY: the caller of `new` guarantees that only the holder of the fetch accesses the memory, and that the
// lease keeps it. Both hold on any thread.
#[expect(unsafe_code, reason = "a pointer is not Send by itself")]
unsafe impl Send for Fetch {}

impl fmt::Debug for Fetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, blocks, token, .. } = self;
        f.debug_struct("Fetch").field("first", first).field("blocks", blocks).field("token", token).finish()
    }
}

/// A cache for the blocks of images.
pub trait BlockCache: Send + Sync {
    /// Returns whether the cache can use a read of these blocks. If not, the disk does not ask the cache for
    /// them.
    fn admits(&self, _blocks: Range<u64>) -> bool {
        true
    }

    /// Returns the line of one more queue, if the cache is in another process. Reads go through the line then, and not
    /// through [`begin_read`](Self::begin_read). Dropping the line gives it back.
    fn line(&self) -> Option<Box<dyn CacheLine>> {
        None
    }

    /// Delivers the blocks that the cache has, and returns a plan for the others.
    fn begin_read(&self, read: &BlockRead<'_>) -> ReadPlan;

    /// Ends a fetch. `read` is `Ok(())` if the disk has read all blocks of the fetch; they are then in guest
    /// memory on return. Otherwise the cache neither keeps nor delivers any of them.
    ///     ///
    /// # Errors
    /// Fails if the cache cannot deliver the blocks. Then the guest's request fails.
    fn end_fetch(&self, fetch: Fetch, read: Result<(), ()>) -> io::Result<()>;

    /// Announces a change of these blocks: they lose their identity, and fetches of them in progress do not
    /// become cached.
    fn begin_write(&self, image: ImageId, blocks: Range<u64>);

    /// Ends the change that [`begin_write`](Self::begin_write) announced, whether it succeeded or failed.
    fn end_write(&self, image: ImageId, blocks: Range<u64>);
}
