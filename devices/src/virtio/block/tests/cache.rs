//! A cache that checks the calls of disks.

#![expect(unsafe_code, reason = "a cache hands out memory by address")]

use std::any::Any;
use std::collections::HashMap;
use std::ops::Range;
use std::ptr::NonNull;

use super::targets::raw;
use super::*;
use crate::GuestMemory;
use crate::disk::cache::{BLOCK_SIZE, BlockCache, BlockRead, Fetch, ReadPlan};
use crate::virtio::RING_FEATURES;

const BLOCK: usize = BLOCK_SIZE as usize;

struct UnderWay {
    image: ImageId,
    first: u64,
    targets: Vec<GuestAddress>,
    /// Blocks that were written during the fetch.
    stale: Vec<bool>,
}

#[derive(Default)]
struct State {
    blocks: HashMap<(ImageId, u64), Vec<u8>>,
    fetches: HashMap<u64, UnderWay>,
    writes: Vec<(ImageId, Range<u64>)>,
    next_token: u64,
    failed_fetches: usize,
    begun_writes: usize,
}

/// Keeps all blocks except each seventh, for which it has no room.
pub(super) struct FakeCache {
    guest: GuestMemory,
    state: Mutex<State>,
}

/// Memory of the host.
struct Pages(Mutex<Vec<u8>>);

impl FakeCache {
    pub(super) fn new(guest: GuestMemory) -> Self {
        Self { guest, state: Mutex::default() }
    }

    fn fetch(state: &mut State, read: &BlockRead<'_>, blocks: Range<usize>) -> Fetch {
        let pages = Arc::new(Pages(Mutex::new(vec![0xcc; (blocks.len() + 1) * BLOCK])));
        let start = pages.0.lock().unwrap().as_mut_ptr();
        let aligned = start.wrapping_add(start.align_offset(BLOCK));
        let token = state.next_token;
        state.next_token += 1;
        let first = read.first + blocks.start as u64;
        let targets = read.targets[blocks.clone()].to_vec();
        let stale = vec![false; targets.len()];
        state.fetches.insert(token, UnderWay { image: read.image, first, targets, stale });
        let lease: Arc<dyn Any + Send + Sync> = pages;
        // SAFETY: aligned, within the allocation that the lease keeps, and unused by others.
        unsafe { Fetch::new(first, blocks.len() as u32, NonNull::new(aligned).unwrap(), token, lease) }
    }
}

impl BlockCache for FakeCache {
    fn begin_read(&self, read: &BlockRead<'_>) -> ReadPlan {
        assert!(!read.targets.is_empty());
        let mut state = self.state.lock().unwrap();
        let mut plan = ReadPlan::default();
        let mut run: Option<Range<usize>> = None;
        let (mut runs, count) = (Vec::new(), read.targets.len());
        for i in 0..count {
            let number = read.first + i as u64;
            let cached = state.blocks.get(&(read.image, number));
            let is_wanted = cached.is_none() && number % 7 != 3;
            if let Some(data) = cached {
                self.guest.write_slice(data, read.targets[i]).unwrap();
                plan.served.from_host += 1;
            } else if !is_wanted {
                plan.past.push(number..number + 1);
            }
            if is_wanted {
                run.get_or_insert(i..i).end = i + 1;
            }
            if !is_wanted || i + 1 == count {
                runs.extend(run.take());
            }
        }
        plan.fetches = runs.into_iter().map(|run| Self::fetch(&mut state, read, run)).collect();
        plan
    }

    fn end_fetch(&self, fetch: Fetch, read: Result<(), ()>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let under_way = state.fetches.remove(&fetch.token()).expect("a fetch is ended once");
        assert_eq!((fetch.first(), fetch.blocks() as usize), (under_way.first, under_way.targets.len()));
        if read.is_err() {
            state.failed_fetches += 1;
            return Ok(());
        }
        // SAFETY: the fetch has ended, so nothing writes there. The lease keeps the memory.
        let data = unsafe { std::slice::from_raw_parts(fetch.buffer().as_ptr(), fetch.bytes()) };
        for (i, block) in data.chunks(BLOCK).enumerate() {
            self.guest.write_slice(block, under_way.targets[i]).map_err(io::Error::other)?;
            if !under_way.stale[i] {
                state.blocks.insert((under_way.image, under_way.first + i as u64), block.to_vec());
            }
        }
        Ok(())
    }

    fn begin_write(&self, image: ImageId, blocks: Range<u64>) {
        let mut state = self.state.lock().unwrap();
        state.begun_writes += 1;
        state.blocks.retain(|(of, number), _| *of != image || !blocks.contains(number));
        for fetch in state.fetches.values_mut().filter(|fetch| fetch.image == image) {
            for (i, stale) in fetch.stale.iter_mut().enumerate() {
                *stale |= blocks.contains(&(fetch.first + i as u64));
            }
        }
        state.writes.push((image, blocks));
    }

    fn end_write(&self, image: ImageId, blocks: Range<u64>) {
        let mut state = self.state.lock().unwrap();
        // A block that was read during a write may have the old or the new content.
        for fetch in state.fetches.values_mut().filter(|fetch| fetch.image == image) {
            for (i, stale) in fetch.stale.iter_mut().enumerate() {
                *stale |= blocks.contains(&(fetch.first + i as u64));
            }
        }
        let position = state.writes.iter().position(|write| *write == (image, blocks.clone()));
        state.writes.remove(position.expect("a write ends that has begun"));
    }
}

impl Drop for FakeCache {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let state = self.state.lock().unwrap();
            assert!(state.fetches.is_empty(), "{} fetches were not ended", state.fetches.len());
            assert!(state.writes.is_empty(), "{:?} were not ended", state.writes);
        }
    }
}

/// An image that checks whether the cache knows of each write.
struct Watched {
    disk: MemoryDisk,
    cache: Arc<FakeCache>,
    /// What was read, in bytes.
    reads: Mutex<Vec<Range<u64>>>,
}

impl Watched {
    fn expect_announced(&self, offset: u64, len: usize) {
        let blocks = offset / BLOCK_SIZE..(offset + len as u64).div_ceil(BLOCK_SIZE);
        let state = self.cache.state.lock().unwrap();
        let covers = |range: &Range<u64>| range.start <= blocks.start && blocks.end <= range.end;
        assert!(state.writes.iter().any(|(image, range)| *image == MEMORY_IMAGE && covers(range)));
    }
}

impl Image for Watched {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn physical_block_size(&self) -> u32 {
        512
    }
    fn can_discard(&self) -> bool {
        true
    }
    fn identity(&self) -> Option<ImageId> {
        self.disk.identity()
    }
    fn locate(&self, offset: u64, len: u64) -> io::Result<Location> {
        self.disk.locate(offset, len)
    }
    fn read_at(&self, layer: Layer, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.reads.lock().unwrap().push(offset..offset + data.len() as u64);
        self.disk.read_at(layer, offset, data)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.expect_announced(offset, data.len());
        self.disk.write_at(offset, data)
    }
    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.expect_announced(offset, len as usize);
        self.disk.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.expect_announced(offset, len as usize);
        self.disk.write_zeroes(offset, len, unmap)
    }
}

#[test]
fn the_cache_knows_of_writes_from_before_they_begin_until_before_they_complete() {
    let guest = memory();
    let (medium, cache) = (MemoryDisk::new(), Arc::new(FakeCache::new(guest.clone())));
    let watched = Watched { disk: medium.clone(), cache: cache.clone(), reads: Mutex::default() };
    let mut disk = Disk::new(Arc::new(watched), Engine::Auto);
    disk.set_cache(cache.clone());
    let mut driver = Driver::with_memory(Block::new("vm", "disk", 1, disk).unwrap(), guest);
    driver.start(RING_FEATURES | ALL_FEATURES);
    medium.medium().bad_sectors.insert(900);

    let idle = || cache.state.lock().unwrap().writes.is_empty();
    for round in 0..20 {
        assert_eq!(driver.write_sectors(round * 3, &[round as u8; 3 * SECTOR]), OK);
        assert!(idle(), "a write was completed before the cache was told");
        assert_eq!(driver.read_sectors(0, 64).unwrap(), medium.medium().data[..64 * SECTOR]);
    }
    assert_eq!(driver.clear_sectors(DISCARD, &[(16, 8, 0), (32, 1, 0)]), OK);
    assert!(idle());
    assert_eq!(driver.clear_sectors(WRITE_ZEROES, &[(16, 8, 1), (33, 1, 0)]), OK);
    assert!(idle());
    assert_eq!(driver.write_sectors(899, &[1; 3 * SECTOR]), IO_ERROR);
    assert!(idle(), "failed writes end as well");
    assert_eq!(driver.read_sectors(0, 64).unwrap(), medium.medium().data[..64 * SECTOR]);
    assert_eq!(cache.state.lock().unwrap().begun_writes, 25);
}

#[test]
fn blocks_are_read_once_and_partly_read_blocks_go_past_the_cache() {
    let (guest, directory) = (memory(), tempfile::tempdir().unwrap());
    let data = MemoryDisk::new().medium().data.clone();
    let path = directory.path().join("raw");
    let mut disk = raw(&path, &data, CachePolicy::Exclusive, Engine::Auto, None);
    let cache = Arc::new(FakeCache::new(guest.clone()));
    disk.set_cache(cache.clone());
    let block = Block::new("vm", "disk", 1, disk).unwrap();
    let stats = block.stats();
    let mut driver = Driver::with_memory(block, guest);
    driver.start(RING_FEATURES | ALL_FEATURES);

    let counts =
        |stats: &BlockStats| (stats.blocks_fetched.load(Relaxed), stats.blocks_from_host.load(Relaxed));
    // Two sectors, eight blocks (one is not wanted), one sector.
    assert_eq!(driver.read_sectors(6, 67).unwrap(), data[6 * SECTOR..73 * SECTOR]);
    assert_eq!(counts(&stats), (7, 0));
    assert_eq!(driver.read_sectors(6, 67).unwrap(), data[6 * SECTOR..73 * SECTOR]);
    assert_eq!(counts(&stats), (7, 7));
    // The cache cannot deliver a block to two places of guest memory.
    assert_eq!(driver.request(READ, 80, &[(DATA, 1000, true), (DATA + 0x2000, 3096, true)]).0, OK);
    assert_eq!(counts(&stats), (7, 7));

    // The file is truncated: cached blocks can be read, others give an error, and no fetch is left.
    fs_truncate(&path, 64 * SECTOR as u64);
    assert_eq!(driver.read_sectors(64, 8).unwrap(), data[64 * SECTOR..72 * SECTOR], "as it was");
    assert_eq!(driver.read_sectors(200, 32), Err(IO_ERROR));
    assert_ne!(cache.state.lock().unwrap().failed_fetches, 0);
}

#[test]
fn no_byte_of_a_request_is_read_twice() {
    let guest = memory();
    let (medium, cache) = (MemoryDisk::new(), Arc::new(FakeCache::new(guest.clone())));
    let watched = Arc::new(Watched { disk: medium.clone(), cache: cache.clone(), reads: Mutex::default() });
    let mut disk = Disk::new(watched.clone(), Engine::Auto);
    disk.set_cache(cache.clone());
    let mut driver = Driver::with_memory(Block::new("vm", "disk", 1, disk).unwrap(), guest);
    driver.start(RING_FEATURES | ALL_FEATURES);
    // Blocks 3 and 10 are not wanted, all others are. Block 4 is wanted, and alone.
    for (sector, sectors) in [(0, 96), (200, 24), (32, 8)] {
        watched.reads.lock().unwrap().clear();
        let data = driver.read_sectors(sector, sectors).unwrap();
        let start = sector as usize * SECTOR;
        assert_eq!(data, medium.medium().data[start..start + sectors * SECTOR]);
        let mut reads = watched.reads.lock().unwrap().clone();
        reads.sort_by_key(|read| read.start);
        assert!(reads.windows(2).all(|pair| pair[0].end <= pair[1].start), "{reads:?}");
    }
    let state = cache.state.lock().unwrap();
    let held = |block| state.blocks.contains_key(&(MEMORY_IMAGE, block));
    assert!((0..12).all(|block| held(block) == (block % 7 != 3)));
}

fn fs_truncate(path: &std::path::Path, len: u64) {
    std::fs::File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

#[test]
fn a_reset_ends_every_fetch() {
    let (guest, directory) = (memory(), tempfile::tempdir().unwrap());
    for engine in [Engine::Auto, Engine::Threads] {
        let path = directory.path().join("raw");
        let data = MemoryDisk::new().medium().data.clone();
        let mut disk = raw(&path, &data, CachePolicy::Exclusive, engine, None);
        let cache = Arc::new(FakeCache::new(guest.clone()));
        disk.set_cache(cache.clone());
        let mut driver = Driver::with_memory(Block::new("vm", "disk", 1, disk).unwrap(), guest.clone());
        for round in 0..50 {
            driver.start(RING_FEATURES | ALL_FEATURES);
            for request in 0..4 {
                driver.put_header(READ, (round * 16 + request * 8) % 512);
                driver.submit(&[(HEADER, 16, false), (DATA, 0x20000, true), (STATUS, 1, true)]);
            }
            driver.transport.reset();
            assert!(cache.state.lock().unwrap().fetches.is_empty());
            cache.state.lock().unwrap().blocks.clear();
        }
    }
}
