//! Passes over a virtio-blk disk (virtio 1.2, section 5.2).

use core::hint;

use crate::client::Client;
use crate::clock::{self, Clock};
use crate::demo::client::ClientLayout;
use crate::demo::content::{Checksum, SECTOR_BYTES, SECTOR_WORDS, disk_word};
use crate::demo::layout::{Arena, request_bytes, request_window};
use crate::demo::plan::{DiskOp, DiskPlan, Plan};
use crate::demo::report::{Hex, Report, Text};
use crate::hostile;
use crate::pages::MOST_DESCRIBED;
use crate::port;
use crate::virtio::{Descriptor, Device, LARGEST_QUEUE, NEXT, SetupError, WRITE};

const BLOCK_DEVICE: u32 = 2;
const F_FLUSH: u64 = 1 << 9;
/// Feature bit of the queue: requests may be tables of descriptors.
const F_INDIRECT: u64 = 1 << 28;
pub(crate) const TYPE_READ: u32 = 0;
pub(crate) const TYPE_WRITE: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_ID: u32 = 8;
const ID_BYTES: u32 = 20;
pub(crate) const STATUS_OK: u8 = 0;
const STATUS_UNSUPPORTED: u8 = 2;
/// The status byte before the device sets it.
pub(crate) const STATUS_UNSET: u8 = 0xff;

/// Number of a request's descriptors: header, data, status.
const CHAIN: usize = 3;
const SLOTS: usize = LARGEST_QUEUE / CHAIN;
/// The time for which the guest waits for an answer in a loop, and the length of the later pauses.
const SPIN_US: u64 = 100;
/// The time after which a request counts as lost.
pub(crate) const LOST_US: u64 = 30_000_000;

/// The header of a request.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Header {
    pub(crate) kind: u32,
    pub(crate) reserved: u32,
    pub(crate) sector: u64,
}

static mut HEADERS: [Header; SLOTS] = [Header { kind: 0, reserved: 0, sector: 0 }; SLOTS];
static mut STATUSES: [u8; SLOTS] = [0; SLOTS];

/// A request that the device has.
#[derive(Clone, Copy)]
struct Pending {
    /// The number in the pass.
    number: u64,
    sector: u64,
    /// Address and size of the data.
    buffer: u64,
    bytes: u32,
}

/// The result of a pass.
#[derive(Default)]
struct Outcome {
    requests: u64,
    bytes: u64,
    checksum: Checksum,
    errors: u64,
    unsupported: u64,
}

/// The disk of the plan.
pub(crate) struct Disk<'a> {
    pub(crate) device: Device,
    pub(crate) clock: &'a Clock,
    plan: &'a DiskPlan,
    seed: u32,
    /// Address, size and number of the buffers.
    pub(crate) buffers: u64,
    buffer_bytes: u64,
    window: u64,
    pub(crate) sectors: u64,
    pending: [Option<Pending>; SLOTS],
    /// Wrong words so far.
    corrupt: u64,
    client: Option<Client<'a>>,
}

/// The reason why a disk cannot be used any longer.
#[derive(Clone, Copy)]
pub(crate) enum DiskError {
    /// The setup failed.
    Setup(SetupError),
    /// The disk did not answer a request in time.
    Timeout,
    /// The disk returned a request that it did not have.
    UnknownRequest,
    /// The disk is too small for the client, or the client's cache is too small for its requests.
    Size,
    /// The disk does not support tables of descriptors, which the client needs.
    NoTables,
    /// The disk failed a request of the client.
    Failed,
}

impl DiskError {
    /// Returns the error as words joined by hyphens.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Setup(SetupError::OtherDevice) => "no-virtio-blk-device",
            Self::Setup(SetupError::NoReset) => "disk-does-not-reset",
            Self::Setup(SetupError::Rejected) => "disk-rejects-driver",
            Self::Timeout => "disk-does-not-answer",
            Self::UnknownRequest => "disk-returned-unknown-request",
            Self::Size => "disk-or-cache-too-small-for-client",
            Self::NoTables => "disk-lacks-indirect-descriptors",
            Self::Failed => "disk-failed-request-of-client",
        }
    }
}

impl<'a> Disk<'a> {
    /// Sets up the disk of `plan`.
    ///
    /// # Safety
    /// There may be no other disk. Nothing else may use the arena's disk buffers or the memory of its client,
    /// which has not been touched since the machine started.
    pub(crate) unsafe fn open(
        plan: &'a Plan,
        disk: &'a DiskPlan,
        arena: &Arena,
        clock: &'a Clock,
    ) -> Result<Self, DiskError> {
        let with_client = ClientLayout::new(disk).is_some();
        // Malformed requests should be malformed under the negotiated features.
        let features = if with_client { F_FLUSH | F_INDIRECT } else { F_FLUSH };
        // SAFETY: no other disk uses the queue.
        let device = unsafe { Device::open(disk.base, BLOCK_DEVICE, features) }.map_err(DiskError::Setup)?;
        let sectors = device.config64();
        port::print(Report::Disk { sectors, features: Hex(device.offered), queue: device.queue_size.into() });
        let client = if with_client {
            if device.offered & F_INDIRECT == 0 {
                return Err(DiskError::NoTables);
            }
            // SAFETY: guaranteed by the caller.
            Some(unsafe { Client::new(plan, disk, arena, clock, sectors) }.ok_or(DiskError::Size)?)
        } else {
            None
        };
        Ok(Self {
            device,
            clock,
            plan: disk,
            seed: plan.seed,
            buffers: arena.buffers,
            buffer_bytes: request_bytes(plan),
            window: request_window(plan),
            sectors,
            pending: [None; SLOTS],
            corrupt: 0,
            client,
        })
    }

    /// Returns the address of the disk's registers.
    pub(crate) fn base(&self) -> u64 {
        self.plan.base
    }

    /// Does the passes of a round.
    pub(crate) fn round(&mut self) -> Result<(), DiskError> {
        for op in self.plan.ops.iter() {
            let start = clock::now();
            let outcome = match op {
                DiskOp::Read | DiskOp::Write | DiskOp::Verify => self.transfer(op)?,
                DiskOp::Flush => self.single(TYPE_FLUSH, 0)?,
                DiskOp::Id => self.id()?,
                DiskOp::Client => {
                    if let Some(client) = &mut self.client {
                        client.pass(&mut self.device)?;
                    }
                    continue;
                }
                DiskOp::Hostile => {
                    hostile::attack(self)?;
                    continue;
                }
            };
            port::print(Report::Blk {
                mode: op,
                requests: outcome.requests,
                bytes: outcome.bytes,
                us: self.clock.elapsed_us(start),
                checksum: Hex(outcome.checksum.0),
                errors: outcome.errors,
                unsupported: outcome.unsupported,
            });
        }
        Ok(())
    }

    /// Prints the client's totals. Returns the total number of wrong words.
    pub(crate) fn finish(self) -> u64 {
        self.corrupt + self.client.map_or(0, Client::finish)
    }

    /// Reads one sector. Returns whether that succeeded.
    pub(crate) fn probe(&mut self) -> Result<bool, DiskError> {
        let outcome = self.single(TYPE_READ, SECTOR_BYTES as u32)?;
        Ok(outcome.errors + outcome.unsupported == 0)
    }

    /// Resets the disk and drops its pending requests.
    pub(crate) fn restart(&mut self) -> Result<(), DiskError> {
        self.pending = [None; SLOTS];
        self.device.start().map_err(DiskError::Setup)
    }

    /// Transfers the planned range, with the planned number of requests in flight.
    fn transfer(&mut self, op: DiskOp) -> Result<Outcome, DiskError> {
        let sectors_each = self.buffer_bytes / SECTOR_BYTES as u64;
        let to_end = self.sectors.saturating_sub(self.plan.sector);
        let count = if self.plan.count == 0 { to_end.div_ceil(sectors_each) } else { self.plan.count };
        let depth = (self.plan.depth.max(1) as usize).min(usize::from(self.device.queue_size) / CHAIN);

        let mut outcome = Outcome::default();
        let mut next = 0;
        while outcome.requests < count {
            let mut offered = false;
            while next < count {
                let Some(slot) = self.free_slot(depth, next) else { break };
                let sector = self.plan.sector.wrapping_add(next.wrapping_mul(sectors_each));
                let left = self.sectors.saturating_sub(sector);
                let sectors = if self.plan.count == 0 { sectors_each.min(left) } else { sectors_each };
                let request = Pending {
                    number: next,
                    sector,
                    buffer: self.buffers + next % self.window * self.buffer_bytes,
                    bytes: (sectors * SECTOR_BYTES as u64) as u32,
                };
                if op == DiskOp::Write {
                    self.fill(request, &mut outcome);
                }
                let kind = if op == DiskOp::Write { TYPE_WRITE } else { TYPE_READ };
                self.offer(slot, kind, request);
                offered = true;
                next += 1;
            }
            if offered {
                self.device.publish();
            }
            let (request, status) = self.wait()?;
            if self.count(&mut outcome, status) {
                outcome.bytes += u64::from(request.bytes);
                if op != DiskOp::Write {
                    self.check(request, op == DiskOp::Verify, &mut outcome);
                }
            }
        }
        Ok(outcome)
    }

    /// Returns a slot for request `number`, if one of the first `depth` is free and so is the request's
    /// buffer.
    fn free_slot(&self, depth: usize, number: u64) -> Option<usize> {
        let slots = &self.pending[..depth];
        let buffer_in_use =
            slots.iter().flatten().any(|other| other.number % self.window == number % self.window);
        if buffer_in_use {
            return None;
        }
        slots.iter().position(Option::is_none)
    }

    /// Does a single request at the start of the planned range, with `bytes` of data for the device to write.
    fn single(&mut self, kind: u32, bytes: u32) -> Result<Outcome, DiskError> {
        let sector = if kind == TYPE_READ { self.plan.sector } else { 0 };
        self.offer(0, kind, Pending { number: 0, sector, buffer: self.buffers, bytes });
        self.device.publish();
        let (_, status) = self.wait()?;
        let mut outcome = Outcome::default();
        self.count(&mut outcome, status);
        Ok(outcome)
    }

    fn id(&mut self) -> Result<Outcome, DiskError> {
        self.words().take(ID_BYTES.div_ceil(8) as usize).for_each(|word| {
            // SAFETY: the first buffer has at least a sector, and no request is pending.
            unsafe { word.write_volatile(0) }
        });
        let outcome = self.single(TYPE_ID, ID_BYTES)?;
        let mut id = [0; 24];
        for (bytes, word) in id.chunks_exact_mut(8).zip(self.words()) {
            // SAFETY: as above.
            bytes.copy_from_slice(&unsafe { word.read_volatile() }.to_le_bytes());
        }
        let len = id.iter().take(ID_BYTES as usize).position(|byte| *byte == 0).unwrap_or(ID_BYTES as usize);
        port::print(Report::BlkId { id: Text::new(&id[..len]) });
        Ok(outcome)
    }

    /// Returns the words of the first sector of the first buffer.
    fn words(&self) -> impl Iterator<Item = *mut u64> + use<> {
        let first = core::ptr::with_exposed_provenance_mut::<u64>(self.buffers as usize);
        (0..SECTOR_WORDS).map(move |i| first.wrapping_add(i))
    }

    fn offer(&mut self, slot: usize, kind: u32, request: Pending) {
        let head = slot * CHAIN;
        // SAFETY: the slot is free, so the device has neither its header nor its status.
        let (header, status) = unsafe {
            let header = &raw mut HEADERS[slot];
            header.write_volatile(Header { kind, reserved: 0, sector: request.sector });
            let status = &raw mut STATUSES[slot];
            status.write_volatile(STATUS_UNSET);
            (header.addr() as u64, status.addr() as u64)
        };
        let next = |place: usize| (head + place) as u16;
        let data = if request.bytes > 0 { 1 } else { 2 };
        let header = Descriptor { address: header, len: 16, flags: NEXT, next: next(data) };
        self.device.describe(head, header);
        if request.bytes > 0 {
            let direction = if kind == TYPE_WRITE { 0 } else { WRITE };
            let flags = NEXT | direction;
            let data = Descriptor { address: request.buffer, len: request.bytes, flags, next: next(2) };
            self.device.describe(head + 1, data);
        }
        self.device.describe(head + 2, Descriptor { address: status, len: 1, flags: WRITE, next: 0 });
        self.device.offer(head as u16);
        self.pending[slot] = Some(request);
    }

    /// Returns the next completed request and its status.
    fn wait(&mut self) -> Result<(Pending, u8), DiskError> {
        let head = self.wait_for_used(LOST_US).ok_or(DiskError::Timeout)? as usize;
        let slot = head / CHAIN;
        let pending = self.pending.get_mut(slot).filter(|_| head.is_multiple_of(CHAIN));
        let request = pending.and_then(Option::take).ok_or(DiskError::UnknownRequest)?;
        // SAFETY: the index has been checked. The read is volatile, because the device has written the byte.
        let status = unsafe { (&raw const STATUSES[slot]).read_volatile() };
        Ok((request, status))
    }

    /// Returns the head of a completed chain, if one completes within `us` microseconds.
    pub(crate) fn wait_for_used(&mut self, us: u64) -> Option<u32> {
        let start = clock::now();
        loop {
            if let Some(head) = self.device.take_used() {
                return Some(head);
            }
            match self.clock.elapsed_us(start) {
                waited if waited >= us => return None,
                waited if waited < SPIN_US => hint::spin_loop(),
                _ => self.clock.sleep(SPIN_US),
            }
        }
    }

    /// Counts a completed request. Returns whether it succeeded.
    fn count(&self, outcome: &mut Outcome, status: u8) -> bool {
        outcome.requests += 1;
        match status {
            STATUS_OK => return true,
            STATUS_UNSUPPORTED => outcome.unsupported += 1,
            _ => outcome.errors += 1,
        }
        false
    }

    /// Fills a request's buffer with the pattern.
    fn fill(&self, request: Pending, outcome: &mut Outcome) {
        for (position, place) in self.positions(request) {
            let word = self.pattern(request, position);
            // SAFETY: the caller of `open` guarantees the buffer, and the device does not have it yet.
            unsafe { place.write_volatile(word) };
            outcome.checksum.add(self.first_word(request) + position, word);
        }
    }

    /// Adds the data of a completed read to the checksum. With `compare`, also compares it with the pattern.
    fn check(&mut self, request: Pending, compare: bool, outcome: &mut Outcome) {
        for (position, place) in self.positions(request) {
            // SAFETY: the caller of `open` guarantees the buffer, and the device has returned it.
            let found = unsafe { place.read_volatile() };
            outcome.checksum.add(self.first_word(request) + position, found);
            let expected = self.pattern(request, position);
            if compare && found != expected {
                self.corrupt += 1;
                if self.corrupt <= MOST_DESCRIBED {
                    port::print(Report::BlkCorrupt {
                        sector: request.sector + position / SECTOR_WORDS as u64,
                        word: position % SECTOR_WORDS as u64,
                        expected: Hex(expected),
                        found: Hex(found),
                    });
                }
            }
        }
    }

    /// Returns numbers and places of the words of a request's data.
    fn positions(&self, request: Pending) -> impl Iterator<Item = (u64, *mut u64)> + use<> {
        let first = core::ptr::with_exposed_provenance_mut::<u64>(request.buffer as usize);
        (0..u64::from(request.bytes) / 8).map(move |i| (i, first.wrapping_add(i as usize)))
    }

    fn pattern(&self, request: Pending, position: u64) -> u64 {
        let sectors = SECTOR_WORDS as u64;
        disk_word(self.seed, request.sector + position / sectors, (position % sectors) as usize)
    }

    /// Returns the number of a request's first word in the pass.
    fn first_word(&self, request: Pending) -> u64 {
        request.number.wrapping_mul(self.buffer_bytes / 8)
    }
}
