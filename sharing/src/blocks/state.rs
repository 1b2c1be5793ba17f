//! The state of the block cache of one group.

use std::hash::RandomState;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use hashbrown::HashMap;

use super::admission::Sampler;
use super::block_index::{BlockIndex, BlockKey, Keep};
use super::copies::{CopyRecords, Prover};
use super::limit::CacheLimit;
use super::read::VmNumber;
use super::replace::{History, Replacement, S3Fifo};
use super::statistics::CacheStatistics;
use crate::frames::store::Hold;

/// One state of the content of an image, as its owner calls it: the host's device, the file's number, a version of
/// its content, and the format that it is read in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Image(pub [u64; 4]);

/// Blocks that are being read from a disk into frames.
#[derive(Debug)]
pub(crate) struct Fetching {
    pub(crate) vm: VmNumber,
    pub(crate) keep: Keep,
    /// Nothing but a sample of the disk goes through the cache.
    pub(crate) sampled: bool,
    /// The first block.
    pub(crate) key: BlockKey,
    /// The frames that they are read into.
    pub(crate) hold: Hold,
    /// The page that each block goes to, where it is a whole page.
    pub(crate) targets: Vec<Option<u32>>,
    pub(crate) histories: Vec<History>,
    /// Blocks that were written to meanwhile.
    pub(crate) stale: Vec<bool>,
}

/// What is cached, read and written at the moment.
#[derive(Debug)]
pub(crate) struct CacheState {
    pub(crate) images: HashMap<Image, u32>,
    pub(crate) index: BlockIndex,
    pub(crate) copies: CopyRecords,
    /// Blocks of idle frames, and of some that are wanted again.
    pub(crate) order: S3Fifo<BlockKey, RandomState>,
    pub(crate) fetches: HashMap<u64, Fetching>,
    pub(crate) next_token: u64,
    /// Blocks that are being written.
    pub(crate) writing: Vec<(u32, Range<u32>)>,
    pub(crate) prover: Prover,
    pub(crate) sampler: Sampler,
    /// What is being delivered is in the sample of a disk.
    pub(crate) sampling: bool,
    pub(crate) limit: Arc<CacheLimit>,
    /// Idle frames as the limit knows them.
    pub(crate) published: u64,
    /// The group has a share of the limit: it had a VM.
    pub(crate) joined: bool,
    /// When the limit was last followed.
    pub(crate) followed: Instant,
    /// Frames were filled from disks since that was last asked, and when that was.
    pub(crate) filled: bool,
    pub(crate) asked: Instant,
    pub(crate) counters: CacheStatistics,
}

impl CacheState {
    pub(crate) fn new(limit: Arc<CacheLimit>) -> io::Result<Self> {
        Ok(Self {
            images: HashMap::new(),
            index: BlockIndex::default(),
            copies: CopyRecords::default(),
            order: S3Fifo::new(RandomState::new()),
            fetches: HashMap::new(),
            next_token: 0,
            writing: Vec::new(),
            prover: Prover::new()?,
            sampler: Sampler::default(),
            sampling: false,
            limit,
            published: 0,
            joined: false,
            followed: Instant::now(),
            filled: false,
            asked: Instant::now(),
            counters: CacheStatistics::default(),
        })
    }

    /// The number of an image in this cache.
    pub(crate) fn image(&mut self, image: Image) -> u32 {
        let next = self.images.len() as u32;
        *self.images.entry(image).or_insert(next)
    }

    pub(crate) fn known_image(&self, image: Image) -> Option<u32> {
        self.images.get(&image).copied()
    }

    /// The group has a VM, and from now on its share of the limit.
    pub(crate) fn join(&mut self) {
        if !std::mem::replace(&mut self.joined, true) {
            self.limit.join();
        }
    }

    /// The group is gone, and its share of the limit is for others.
    pub(crate) fn leave(&mut self) {
        if std::mem::take(&mut self.joined) {
            self.limit.leave();
        }
    }

    pub(crate) fn add_fetch(&mut self, fetching: Fetching) -> u64 {
        self.next_token += 1;
        self.fetches.insert(self.next_token, fetching);
        self.next_token
    }

    pub(crate) fn being_written(&self, key: BlockKey) -> bool {
        self.writing.iter().any(|(image, blocks)| *image == key.image && blocks.contains(&key.block))
    }

    /// Frames that are being filled from a disk.
    pub(crate) fn being_filled(&self) -> u32 {
        self.fetches.values().map(|fetch| fetch.hold.count()).sum()
    }

    pub(crate) fn bytes(&self) -> usize {
        let fetches: usize = self.fetches.values().map(|fetch| fetch.targets.len() * 10).sum();
        self.index.bytes()
            + self.copies.bytes()
            + self.order.bytes()
            + fetches
            + self.images.allocation_size()
    }
}

impl Drop for CacheState {
    fn drop(&mut self) {
        self.limit.use_instead(self.published, 0);
        self.leave();
    }
}

/// Blocks by the numbers that the cache has room for: those beyond are never in it.
pub(crate) fn narrow(blocks: &Range<u64>) -> Range<u32> {
    let end = |block: u64| u32::try_from(block).unwrap_or(u32::MAX);
    end(blocks.start)..end(blocks.end)
}
