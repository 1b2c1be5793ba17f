//! A cache that answers later, as one in another process does.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use vmm_sys_util::eventfd::EventFd;

use super::targets::raw;
use super::*;
use crate::GuestMemory;
use crate::disk::cache::{BLOCK_SIZE, BlockCache, BlockRead, Fetch, ReadPlan, Served};
use crate::disk::line::{Answer, CacheLine};
use crate::virtio::RING_FEATURES;

const BLOCK: usize = BLOCK_SIZE as usize;
/// Reads in progress at most.
const ROOM: usize = 3;

/// What the disk asks for.
type Asked = (usize, u64, Vec<GuestAddress>);

/// Reads the medium itself. It leaves each seventh block to the disk, and all blocks when it is gone.
struct FakeFar {
    guest: GuestMemory,
    data: Arc<Vec<u8>>,
    is_gone: Arc<AtomicBool>,
    /// Blocks that lines have carried out, by how.
    counts: Arc<Mutex<HashMap<&'static str, u64>>>,
    /// Queues with a line.
    lines: Arc<Mutex<usize>>,
}

impl FakeFar {
    fn new(guest: GuestMemory, data: Vec<u8>) -> Self {
        Self {
            guest,
            data: Arc::new(data),
            is_gone: Arc::default(),
            counts: Arc::default(),
            lines: Arc::default(),
        }
    }

    fn count(&self, what: &str) -> u64 {
        self.counts.lock().unwrap().get(what).copied().unwrap_or(0)
    }
}

impl BlockCache for FakeFar {
    fn line(&self) -> Option<Box<dyn CacheLine>> {
        *self.lines.lock().unwrap() += 1;
        let (asks, asked): (_, Receiver<Asked>) = mpsc::channel();
        let (answers, answered) = mpsc::channel();
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let told = event.try_clone().unwrap();
        let (guest, data, is_gone) = (self.guest.clone(), self.data.clone(), self.is_gone.clone());
        let counts = self.counts.clone();
        thread::spawn(move || {
            // Two at a time, in reverse order.
            while let Ok(first) = asked.recv() {
                let both = [asked.try_recv().ok(), Some(first)];
                for (id, first, targets) in both.into_iter().flatten() {
                    let mut answer = Answer { id, served: Served::default(), fetched: 0, past: Vec::new() };
                    for (number, &target) in (first..).zip(&targets) {
                        let what = if is_gone.load(Relaxed) || number % 7 == 3 { "past" } else { "fetched" };
                        *counts.lock().unwrap().entry(what).or_default() += 1;
                        if what == "past" {
                            answer.past.push(number..number + 1);
                        } else {
                            let from = number as usize * BLOCK;
                            guest.write_slice(&data[from..from + BLOCK], target).unwrap();
                            answer.fetched += 1;
                        }
                    }
                    answers.send(answer).unwrap();
                    told.write(1).unwrap();
                }
            }
        });
        let lines = self.lines.clone();
        Some(Box::new(FakeLine { asks, answered, event, in_flight: 0, waited: Vec::new(), lines }))
    }

    fn begin_read(&self, _: &BlockRead<'_>) -> ReadPlan {
        unreachable!("reads go through the line")
    }

    fn end_fetch(&self, _: Fetch, _: Result<(), ()>) -> io::Result<()> {
        unreachable!("there are no fetches")
    }

    fn begin_write(&self, _: ImageId, _: Range<u64>) {}

    fn end_write(&self, _: ImageId, _: Range<u64>) {}
}

struct FakeLine {
    asks: Sender<Asked>,
    answered: Receiver<Answer>,
    event: EventFd,
    in_flight: usize,
    /// Answers that came while somebody waited.
    waited: Vec<Answer>,
    lines: Arc<Mutex<usize>>,
}

impl Drop for FakeLine {
    fn drop(&mut self) {
        *self.lines.lock().unwrap() -= 1;
        assert_eq!(self.in_flight, 0, "the cache may still write to guest memory");
    }
}

impl CacheLine for FakeLine {
    fn knows(&self, layer: Layer) -> bool {
        layer == Layer(0)
    }

    /// Blocks from 64 to 71 of 128 go past the cache.
    fn divide(&mut self, blocks: Range<u64>) -> (u64, bool) {
        let is_taken = |block: u64| !(64..72).contains(&(block % 128));
        let first = is_taken(blocks.start);
        let same = blocks.clone().take_while(|&block| is_taken(block) == first).count();
        (same as u64, first)
    }

    fn has_room(&self) -> bool {
        self.in_flight < ROOM
    }

    fn begin(&mut self, id: usize, read: &BlockRead<'_>) {
        assert!(self.has_room() && !read.targets.is_empty());
        self.in_flight += 1;
        self.asks.send((id, read.first, read.targets.to_vec())).unwrap();
    }

    fn reap(&mut self, answers: &mut Vec<Answer>) {
        let before = answers.len();
        answers.append(&mut self.waited);
        answers.extend(self.answered.try_iter());
        self.in_flight -= answers.len() - before;
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn wait(&mut self) {
        if self.in_flight > self.waited.len() {
            self.waited.push(self.answered.recv().unwrap());
        }
    }

    fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

#[test]
fn a_line_reads_whole_blocks_and_the_disk_the_others() {
    let (guest, directory) = (memory(), tempfile::tempdir().unwrap());
    let data = MemoryDisk::new().medium().data.clone();
    for engine in [Engine::Auto, Engine::Threads] {
        let path = directory.path().join("raw");
        let mut disk = raw(&path, &data, CachePolicy::Exclusive, engine, None);
        let far = Arc::new(FakeFar::new(guest.clone(), data.clone()));
        disk.set_cache(far.clone());
        let block = Block::new("vm", "disk", 1, disk).unwrap();
        let stats = block.stats();
        let mut driver = Driver::with_memory(block, guest.clone());
        driver.start(RING_FEATURES | ALL_FEATURES);
        // Two sectors, eight blocks of which one is left to the disk, one sector.
        assert_eq!(driver.read_sectors(6, 67).unwrap(), data[6 * SECTOR..73 * SECTOR]);
        assert_eq!((far.count("fetched"), far.count("past")), (7, 1));
        assert_eq!(stats.blocks_fetched.load(Relaxed), 7);
        // From block 56 to 79; the eight blocks in the middle are not taken, and 59, 73 are left to the disk.
        assert_eq!(driver.read_sectors(448, 192).unwrap(), data[448 * SECTOR..640 * SECTOR]);
        assert_eq!((far.count("fetched"), far.count("past")), (21, 3));
        // A block that goes to two places is the disk's.
        assert_eq!(driver.request(READ, 80, &[(DATA, 1000, true), (DATA + 0x2000, 3096, true)]).0, OK);
        assert_eq!(far.count("fetched"), 21);
        far.is_gone.store(true, Relaxed);
        assert_eq!(driver.read_sectors(0, 64).unwrap(), data[..64 * SECTOR]);
        assert_eq!((far.count("fetched"), far.count("past")), (21, 11));
        // The disk finds out itself why a block cannot be read.
        std::fs::File::options().write(true).open(&path).unwrap().set_len(64 * SECTOR as u64).unwrap();
        assert_eq!(driver.read_sectors(200, 32), Err(IO_ERROR));
        drop(driver);
        assert_eq!(*far.lines.lock().unwrap(), 0);
    }
}

#[test]
fn more_reads_than_a_line_has_room_for_wait_and_a_reset_waits_for_the_line() {
    let (guest, directory) = (memory(), tempfile::tempdir().unwrap());
    let data = MemoryDisk::new().medium().data.clone();
    let disk = raw(&directory.path().join("raw"), &data, CachePolicy::Exclusive, Engine::Auto, None);
    let (mut disk, far) = (disk, Arc::new(FakeFar::new(guest.clone(), data.clone())));
    disk.set_cache(far.clone());
    let mut driver = Driver::with_memory(Block::new("vm", "disk", 1, disk).unwrap(), guest.clone());
    for round in 0..50 {
        driver.start(RING_FEATURES | ALL_FEATURES);
        for request in 0..2 * ROOM as u64 {
            driver.put_header(READ, (round * 16 + request * 8) % 512);
            driver.submit(&[(HEADER, 16, false), (DATA, 0x20000, true), (STATUS, 1, true)]);
        }
        if round % 2 == 0 {
            (0..2 * ROOM).for_each(|_| {
                driver.wait_used();
            });
            assert_eq!(guest.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), OK);
        }
        // No read is in progress after it, or the line complains.
        driver.transport.reset();
        assert_eq!(*far.lines.lock().unwrap(), 0);
    }
}
