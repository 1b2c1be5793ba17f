//! A client of the disk, which reads and writes blocks through its own page cache; see `demo::client`.

use core::hint;

use crate::cache::Cache;
use crate::clock::{self, Clock};
use crate::demo::client::{BLOCK_BYTES, ClientLayout, ClientPlan, MOST_REQUESTS, Units, ranks};
use crate::demo::content::{PAGE_WORDS, SECTOR_BYTES, SECTOR_WORDS, disk_word, version_tag};
use crate::demo::histogram::Histogram;
use crate::demo::layout::Arena;
use crate::demo::plan::{DiskPlan, Plan};
use crate::demo::report::{Hex, Report};
use crate::demo::zipf;
use crate::disk::{DiskError, Header, LOST_US, STATUS_OK, STATUS_UNSET, TYPE_READ, TYPE_WRITE};
use crate::pages::MOST_DESCRIBED;
use crate::port;
use crate::virtio::{Descriptor, Device, INDIRECT, NEXT, WRITE};

const SECTORS_PER_BLOCK: u64 = BLOCK_BYTES / SECTOR_BYTES as u64;
const REQUESTS: usize = MOST_REQUESTS as usize;
/// Time for which the client waits for an answer in a loop. Then it uses short pauses, which take a multiple
/// of a disk's time.
const SPIN_US: u64 = 5000;
const PAUSE_US: u64 = 100;

static mut HEADERS: [Header; REQUESTS] = [Header { kind: 0, reserved: 0, sector: 0 }; REQUESTS];
static mut STATUSES: [u8; REQUESTS] = [0; REQUESTS];

/// A request that the disk has, or is about to get.
#[derive(Clone, Copy)]
struct Request {
    kind: u32,
    /// The blocks.
    first: u32,
    count: u32,
    /// The start time, by the time stamp counter.
    made: u64,
}

/// Counters over a period.
#[derive(Default)]
struct Tally {
    blocks: u64,
    hits: u64,
    misses: u64,
    written: u64,
    requests: u64,
    us: u64,
    /// Durations of requests, in ticks of the time stamp counter.
    latency: Histogram,
}

/// The client.
pub(crate) struct Client<'a> {
    clock: &'a Clock,
    plan: &'a ClientPlan,
    seed: u32,
    sector: u64,
    depth: usize,
    chances: usize,
    /// Address of the first request's table of descriptors.
    tables: u64,
    cache: Cache,
    units: Units,
    requests: [Option<Request>; REQUESTS],
    in_flight: usize,
    passes: u64,
    pass: Tally,
    total: Tally,
    corrupt: u64,
}

impl<'a> Client<'a> {
    /// Returns a client for a disk with this number of sectors, or `None` if the disk or the client's cache
    /// is too small.
    ///
    /// # Safety
    /// The arena's memory for the client must be mapped, unused by others, and untouched since the machine
    /// started. There may be no other client.
    pub(crate) unsafe fn new(
        plan: &'a Plan,
        disk: &'a DiskPlan,
        arena: &Arena,
        clock: &'a Clock,
        sectors: u64,
    ) -> Option<Self> {
        let client = &disk.client;
        let layout = ClientLayout::new(disk)?;
        let depth = disk.depth.clamp(1, MOST_REQUESTS);
        let end = disk.sector.checked_add(u64::from(client.blocks) * SECTORS_PER_BLOCK)?;
        // A unit is being processed while others are in flight, and one more is about to be submitted.
        let in_use = (u64::from(depth) + 1) * u64::from(client.run);
        if end > sectors || client.disk_units() < 2 || u64::from(client.pages) <= in_use {
            return None;
        }
        let chances = (arena.client + layout.chances) as usize;
        let table = core::ptr::with_exposed_provenance_mut::<u64>(chances);
        zipf::chances(ranks(client), client.theta, |rank, chance| {
            // SAFETY: the table has an entry for each rank, and the caller guarantees its memory.
            unsafe { table.add(rank as usize).write(chance) }
        });
        // SAFETY: guaranteed by the caller.
        let cache = unsafe { Cache::new(client, &layout, arena.client) };
        Some(Self {
            clock,
            plan: client,
            seed: plan.seed,
            sector: disk.sector,
            depth: depth as usize,
            chances,
            tables: arena.client + layout.descriptors,
            cache,
            units: Units::new(client, plan.vm),
            requests: [None; REQUESTS],
            in_flight: 0,
            passes: 0,
            pass: Tally::default(),
            total: Tally::default(),
            corrupt: 0,
        })
    }

    /// Uses the planned number of units, and reports.
    pub(crate) fn pass(&mut self, device: &mut Device) -> Result<(), DiskError> {
        let start = clock::now();
        for _ in 0..self.plan.units {
            let table = core::ptr::with_exposed_provenance::<u64>(self.chances);
            // SAFETY: the table has an entry for each rank.
            let unit = self.units.next(|rank| unsafe { table.add(rank as usize).read() });
            let first = unit * self.plan.run;
            if self.plan.writes > 0 && self.units.random() % 100 < u64::from(self.plan.writes) {
                self.write(device, first)?;
            } else {
                self.read(device, first)?;
            }
            self.wait_below(device, self.depth)?;
        }
        self.wait_below(device, 1)?;
        self.pass.us = self.clock.elapsed_us(start);
        self.report();
        Ok(())
    }

    /// Prints the totals after the first passes. Returns the number of wrong words.
    pub(crate) fn finish(self) -> u64 {
        let Tally { blocks, hits, misses, written, requests, us, ref latency } = self.total;
        port::print(Report::ClientTotal {
            passes: self.passes.saturating_sub(self.plan.warmup),
            blocks,
            hits,
            misses,
            written,
            requests,
            us,
            p50: self.nanoseconds(latency.percentile(50)),
            p99: self.nanoseconds(latency.percentile(99)),
            held: self.cache.held.into(),
            corrupt: self.corrupt,
        });
        self.corrupt
    }

    fn report(&mut self) {
        let Tally { blocks, hits, misses, written, requests, us, ref latency } = self.pass;
        port::print(Report::Client {
            blocks,
            hits,
            misses,
            written,
            requests,
            us,
            p50: self.nanoseconds(latency.percentile(50)),
            p99: self.nanoseconds(latency.percentile(99)),
        });
        self.passes += 1;
        if self.passes > self.plan.warmup {
            self.total.blocks += blocks;
            self.total.hits += hits;
            self.total.misses += misses;
            self.total.written += written;
            self.total.requests += requests;
            self.total.us += us;
            self.total.latency.add_all(latency);
        }
        self.pass = Tally::default();
    }

    fn nanoseconds(&self, ticks: u64) -> u64 {
        ticks.saturating_mul(1_000_000) / self.clock.tsc_khz
    }

    /// Uses the blocks of a unit: checks blocks in the cache, and reads the others.
    fn read(&mut self, device: &mut Device, first: u32) -> Result<(), DiskError> {
        let mut missing = first..first;
        for block in first..first + self.plan.run {
            if let Some(place) = self.cache.find(block) {
                self.submit(device, TYPE_READ, missing.start, missing.end)?;
                missing = block + 1..block + 1;
                while self.cache.busy(place) {
                    self.wait(device)?;
                }
                self.cache.touch(place);
                self.check(block, place);
                self.pass.hits += 1;
            } else {
                let place = self.take(device, block)?;
                if self.plan.clear {
                    self.page(place).for_each(|word| {
                        // SAFETY: the page belongs to the cache, and the disk does not have it.
                        unsafe { word.write_volatile(0) }
                    });
                }
                self.pass.misses += 1;
                missing.end = block + 1;
            }
            self.pass.blocks += 1;
        }
        self.submit(device, TYPE_READ, missing.start, missing.end)
    }

    /// Writes new versions of a unit's blocks.
    fn write(&mut self, device: &mut Device, first: u32) -> Result<(), DiskError> {
        for block in first..first + self.plan.run {
            let (place, held) = match self.cache.find(block) {
                Some(place) => (place, true),
                None => (self.take(device, block)?, false),
            };
            while self.cache.busy(place) && held {
                self.wait(device)?;
            }
            self.cache.touch(place);
            self.cache.next_version(block);
            // Checked blocks differ only in the first word of each sector.
            let step = if held && self.plan.check { SECTOR_WORDS } else { 1 };
            for (index, word) in self.page(place).enumerate().step_by(step) {
                let (content, _) = self.content(block, index);
                // SAFETY: the page belongs to the cache, and the disk does not have it.
                unsafe { word.write_volatile(content) };
            }
            self.cache.set_busy(place, true);
            self.pass.written += 1;
            self.pass.blocks += 1;
        }
        self.submit(device, TYPE_WRITE, first, first + self.plan.run)
    }

    /// Evicts the least recently used block, and returns its place for this block. The place is then busy.
    fn take(&mut self, device: &mut Device, block: u32) -> Result<u32, DiskError> {
        loop {
            let place = self.cache.oldest();
            if !self.cache.busy(place) {
                self.cache.assign(place, block);
                self.cache.set_busy(place, true);
                return Ok(place);
            }
            self.wait(device)?;
        }
    }

    /// Submits a request for blocks whose places are busy, if there are any.
    fn submit(&mut self, device: &mut Device, kind: u32, first: u32, end: u32) -> Result<(), DiskError> {
        if first == end {
            return Ok(());
        }
        self.wait_below(device, self.depth)?;
        let Some(slot) = self.requests[..self.depth].iter().position(Option::is_none) else {
            return Ok(());
        };
        let made = clock::now();
        let (header, status) = {
            // SAFETY: the slot is free, so the disk has neither its header nor its status.
            unsafe {
                let header = &raw mut HEADERS[slot];
                let sector = self.sector + u64::from(first) * SECTORS_PER_BLOCK;
                header.write_volatile(Header { kind, reserved: 0, sector });
                let status = &raw mut STATUSES[slot];
                status.write_volatile(STATUS_UNSET);
                (header.addr() as u64, status.addr() as u64)
            }
        };
        let table = self.tables + slot as u64 * ClientLayout::DESCRIPTORS;
        let direction = if kind == TYPE_WRITE { 0 } else { WRITE };
        let mut descriptors = 0;
        let mut describe = |descriptor: Descriptor| {
            let place = core::ptr::with_exposed_provenance_mut::<Descriptor>(table as usize);
            descriptors += 1;
            let next = Descriptor { next: descriptors, ..descriptor };
            // SAFETY: the table belongs to the slot and has room for the longest run. The disk does not have
            // it.
            unsafe { place.add(usize::from(descriptors) - 1).write_volatile(next) };
        };
        describe(Descriptor { address: header, len: size_of::<Header>() as u32, flags: NEXT, next: 0 });
        let mut data: Option<Descriptor> = None;
        for place in (first..end).filter_map(|block| self.cache.find(block)) {
            let page = self.cache.page(place);
            match &mut data {
                Some(data) if data.address + u64::from(data.len) == page => data.len += BLOCK_BYTES as u32,
                _ => {
                    let next = Descriptor {
                        address: page,
                        len: BLOCK_BYTES as u32,
                        flags: NEXT | direction,
                        next: 0,
                    };
                    data.replace(next).into_iter().for_each(&mut describe);
                }
            }
        }
        data.into_iter().for_each(&mut describe);
        describe(Descriptor { address: status, len: 1, flags: WRITE, next: 0 });
        let len = u32::from(descriptors) * size_of::<Descriptor>() as u32;
        device.describe(slot, Descriptor { address: table, len, flags: INDIRECT, next: 0 });
        device.offer(slot as u16);
        device.publish();
        self.requests[slot] = Some(Request { kind, first, count: end - first, made });
        self.in_flight += 1;
        Ok(())
    }

    /// Waits until fewer than this number of requests are in flight.
    fn wait_below(&mut self, device: &mut Device, most: usize) -> Result<(), DiskError> {
        while self.in_flight >= most {
            self.wait(device)?;
        }
        Ok(())
    }

    /// Waits for a request, and checks the read data.
    fn wait(&mut self, device: &mut Device) -> Result<(), DiskError> {
        let start = clock::now();
        let slot = loop {
            if let Some(head) = device.take_used() {
                break head as usize;
            }
            match self.clock.elapsed_us(start) {
                waited if waited >= LOST_US => return Err(DiskError::Timeout),
                waited if waited < SPIN_US => hint::spin_loop(),
                _ => self.clock.sleep(PAUSE_US),
            }
        };
        let request = self.requests.get_mut(slot).and_then(Option::take).ok_or(DiskError::UnknownRequest)?;
        self.in_flight -= 1;
        self.pass.requests += 1;
        self.pass.latency.add(clock::now().saturating_sub(request.made));
        // SAFETY: the index has been checked. The read is volatile, because the disk has written the byte.
        if unsafe { (&raw const STATUSES[slot]).read_volatile() } != STATUS_OK {
            return Err(DiskError::Failed);
        }
        for block in request.first..request.first + request.count {
            if let Some(place) = self.cache.find(block) {
                self.cache.set_busy(place, false);
                if request.kind == TYPE_READ {
                    self.check(block, place);
                }
            }
        }
        Ok(())
    }

    /// Checks that a page holds its block.
    fn check(&mut self, block: u32, place: u32) {
        let words = if self.plan.check { PAGE_WORDS } else { 1 };
        for (index, word) in self.page(place).enumerate().take(words) {
            // SAFETY: the page belongs to the cache, and the disk does not have it. The read is volatile,
            // because the disk wrote it.
            let found = unsafe { word.read_volatile() };
            let (expected, sector) = self.content(block, index);
            if found != expected {
                self.corrupt += 1;
                if self.corrupt <= MOST_DESCRIBED {
                    let word = (index % SECTOR_WORDS) as u64;
                    port::print(Report::BlkCorrupt {
                        sector,
                        word,
                        expected: Hex(expected),
                        found: Hex(found),
                    });
                }
            }
        }
    }

    /// Returns the words of a place's page.
    fn page(&self, place: u32) -> impl Iterator<Item = *mut u64> + use<> {
        let first = core::ptr::with_exposed_provenance_mut::<u64>(self.cache.page(place) as usize);
        (0..PAGE_WORDS).map(move |index| first.wrapping_add(index))
    }

    /// Returns the expected word of a block, and its sector.
    fn content(&self, block: u32, index: usize) -> (u64, u64) {
        let sector = self.sector + u64::from(block) * SECTORS_PER_BLOCK + (index / SECTOR_WORDS) as u64;
        let word = disk_word(self.seed, sector, index % SECTOR_WORDS);
        let tag = match index % SECTOR_WORDS {
            0 => version_tag(self.seed, sector, self.cache.version(block)),
            _ => 0,
        };
        (word ^ tag, sector)
    }
}
