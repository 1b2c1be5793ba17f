//! Turns requests into operations on the image, and handles the results.
//!
//! - Reads of whole blocks go through the cache, if there is one. Missing blocks are read into the cache's
//!   memory. All other reads use bounce buffers, and so does a read of which the cache wants only a part.
//! - Writes come directly from guest memory if the image supports that and direct I/O's alignment fits.
//!   Otherwise they use bounce buffers.
//! - If the host accepts only larger pieces, the surrounding data is read first and written back with the
//!   request's data. [`ranges`](crate::disk::ranges) excludes other writes meanwhile.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::SECTOR_SIZE;
use super::far::FarRead;
use super::request::{Clearing, Failure, Job};
use super::service::{Flow, Service};
use super::stats::add;
use crate::GuestMemory;
use crate::disk::cache::{BLOCK_SIZE, BlockCache, BlockRead, Fetch, ImageId};
use crate::disk::channel::{Action, Operation};
use crate::disk::image::{Layer, Location};
use crate::disk::memory::{GuestSlices, MAX_BOUNCE, Memory, widen};

/// Limit for one operation directly from guest memory, in bytes. It bounds the number of vectors.
const MAX_DIRECT: u64 = 1 << 20;

/// The guest memory for the bytes of a part, in order.
type Pieces = Vec<(GuestAddress, usize)>;

/// The targets in guest memory for ranges of a buffer.
type Copies = Vec<(GuestAddress, Range<usize>)>;

/// An operation of a request.
pub(super) struct Part {
    pub(super) request: usize,
    pub(super) kind: PartKind,
}

pub(super) enum PartKind {
    /// Copies bytes of the buffer to the guest, or to the cache's memory, after the read.
    Copy {
        /// The image, for the observer.
        image: Option<ImageId>,
        /// The target of each range of the buffer.
        copies: Copies,
        /// The parts that the cache wants and delivers.
        fetches: Vec<Fetch>,
    },
    /// The cache delivers the data that was read into its memory.
    Fetch,
    /// Puts the request's data into the buffer after the surrounding data was read.
    Surround(Source, Range<usize>),
    /// A cache in another process carries it out.
    Far(FarRead),
    Write,
    Flush,
    Clear(Clearing, Range<u64>),
}

/// The data of a write.
pub(super) enum Source {
    Guest(Pieces),
    Zeroes,
}

impl Source {
    fn fill(&self, memory: &GuestMemory, data: &mut [u8]) -> Result<(), GuestMemoryError> {
        match self {
            Self::Zeroes => data.fill(0),
            Self::Guest(pieces) => {
                let mut rest = data;
                for &(address, len) in pieces {
                    let (piece, others) = rest.split_at_mut(len.min(rest.len()));
                    memory.read_slice(piece, address)?;
                    rest = others;
                }
            }
        }
        Ok(())
    }
}

/// Returns the end of the piece of at most `size` bytes that begins at `range.start`. Pieces end at multiples
/// of `size`.
fn piece_end(range: &Range<u64>, size: u64) -> u64 {
    range.end.min((range.start / size + 1).saturating_mul(size))
}

impl Service {
    /// Submits all operations of the request that are possible now.
    pub(super) fn begin_parts(&mut self, index: usize) -> Flow {
        while self.request(index).failure.is_none() && !self.request(index).job.is_begun() {
            let flow = match &mut self.request(index).job {
                Job::GetId => {
                    self.answer_id(index);
                    Ok(Flow::Begun)
                }
                Job::Flush => {
                    self.request(index).job = Job::Read(0..0);
                    self.submit(Part { request: index, kind: PartKind::Flush }, 0, Action::Flush);
                    Ok(Flow::Begun)
                }
                Job::Read(range) => {
                    let range = range.clone();
                    self.begin_read(index, range)
                }
                Job::Write(range) => {
                    let range = range.clone();
                    self.begin_write(index, range)
                }
                Job::Clear { fill, .. } if !fill.is_empty() => {
                    let range = fill[0].clone();
                    self.begin_fill(index, range)
                }
                Job::Clear { how, ranges, .. } => {
                    let (how, range) = (*how, ranges.pop_front());
                    self.begin_clear(index, how, range);
                    Ok(Flow::Begun)
                }
            };
            match flow {
                Ok(Flow::Begun) => {}
                Ok(Flow::Blocked) => return Flow::Blocked,
                Err(failure) => self.request(index).failure = Some(failure),
            }
        }
        Flow::Begun
    }

    /// Begins to read the first piece of `range`.
    fn begin_read(&mut self, index: usize, range: Range<u64>) -> Result<Flow, Failure> {
        let end = piece_end(&range, MAX_BOUNCE as u64);
        let location = self.locate(range.start, end - range.start)?;
        let mut end = end.min(range.start + location.len.max(1));
        let (alignment, _) = self.alignment();
        let has_cache = self.common.disk.cache().is_some() && alignment <= BLOCK_SIZE;
        let image = location.image.filter(|_| has_cache);
        // Separate the whole blocks from the bytes before and after them.
        let first_block = range.start.next_multiple_of(BLOCK_SIZE);
        let last_block = end / BLOCK_SIZE * BLOCK_SIZE;
        let is_whole = first_block == range.start && last_block > first_block;
        let blocks = first_block / BLOCK_SIZE..last_block / BLOCK_SIZE;
        let admits = |cache: &Arc<dyn BlockCache>| is_whole && cache.admits(blocks.clone());
        let mut is_cached = image.is_some() && self.common.disk.cache().is_some_and(admits);
        if is_cached {
            end = last_block;
            if let Some(line) = &mut self.line {
                if !line.has_room() {
                    return Ok(Flow::Blocked);
                }
                is_cached = line.knows(location.layer);
                if is_cached {
                    let (same, is_taken) = line.divide(blocks);
                    (end, is_cached) = (range.start + same * BLOCK_SIZE, is_taken);
                }
            }
        } else if image.is_some() && first_block > range.start && first_block < end {
            end = first_block;
        }

        let wide = widen(&(range.start..end), alignment);
        let Some(bounce) = self.bounces.take((wide.end - wide.start) as usize) else {
            return Ok(Flow::Blocked);
        };
        let request = self.request(index);
        request.job = Job::Read(end..range.end);
        let pieces = match request.buffers.writable.take((end - range.start) as usize) {
            Ok(pieces) => pieces,
            Err(error) => {
                self.bounces.give(bounce);
                return Err(error.into());
            }
        };
        if let Some(image) = image.filter(|_| is_cached && self.line.is_some())
            && let Some(targets) = whole_blocks(&pieces)
        {
            self.begin_far(index, (image, location.layer), range.start / BLOCK_SIZE, targets, bounce);
            return Ok(Flow::Begun);
        }
        let (copies, fetches) = match image {
            Some(image) if is_cached => self.begin_cached(image, range.start, &pieces),
            _ => (copies_of(&pieces, (range.start - wide.start) as usize), Vec::new()),
        };
        // What the cache wants of a piece that is read anyway is copied to it, and not read a second time.
        if !copies.is_empty() {
            let kind = PartKind::Copy { image: location.image, copies, fetches };
            let action = Action::Read(location.layer, Memory::Bounce(bounce));
            self.submit(Part { request: index, kind }, wide.start, action);
            return Ok(Flow::Begun);
        }
        self.bounces.give(bounce);
        for fetch in fetches {
            let offset = fetch.first() * BLOCK_SIZE;
            let part = Part { request: index, kind: PartKind::Fetch };
            self.submit(part, offset, Action::Read(location.layer, Memory::Fetch(fetch)));
        }
        Ok(Flow::Begun)
    }

    /// Fails if data that was read from guest memory may be content that the guest never wrote. To be called
    /// before the data goes to an image.
    fn check_memory(&self) -> Result<(), Failure> {
        self.queue.check_memory().map_err(|_| Failure::MemoryLost)
    }

    /// Returns the source of the bytes. For raw images it is known without a call.
    fn locate(&self, offset: u64, len: u64) -> Result<Location, Failure> {
        self.common.disk.image().locate(offset, len).map_err(host_failure("locate", offset, len))
    }

    /// Asks the cache for whole blocks from byte `start` on, for the targets `pieces`. Returns the remaining copies to
    /// the guest, and the fetches that the cache requests.
    fn begin_cached(
        &self,
        image: ImageId,
        start: u64,
        pieces: &[(GuestAddress, usize)],
    ) -> (Copies, Vec<Fetch>) {
        let common = &self.common;
        let Some(cache) = common.disk.cache() else { return (copies_of(pieces, 0), Vec::new()) };
        let (mut copies, mut fetches) = (Vec::new(), Vec::new());
        let mut run: Vec<GuestAddress> = Vec::new();
        let mut run_first = start / BLOCK_SIZE;
        let blocks = split_blocks(pieces);
        let count = blocks.len();
        for (i, block) in blocks.into_iter().enumerate() {
            let number = start / BLOCK_SIZE + i as u64;
            let offset = i * BLOCK_SIZE as usize;
            match block[..] {
                [(address, _)] => run.push(address),
                // The cache cannot deliver a block to several places.
                _ => copies.extend(copies_of(&block, offset)),
            }
            if (block.len() > 1 || i + 1 == count) && !run.is_empty() {
                let plan = cache.begin_read(&BlockRead { image, first: run_first, targets: &run });
                add(&common.stats.blocks_from_guests, plan.served.from_guests);
                add(&common.stats.blocks_from_host, plan.served.from_host);
                let fetched = plan.fetches.iter().map(|fetch| u64::from(fetch.blocks())).sum();
                add(&common.stats.blocks_fetched, fetched);
                fetches.extend(plan.fetches);
                for number in plan.past.into_iter().flatten() {
                    let target = run[(number - run_first) as usize];
                    let offset = (number * BLOCK_SIZE - start) as usize;
                    copies.push((target, offset..offset + BLOCK_SIZE as usize));
                }
                run.clear();
            }
            if run.is_empty() {
                run_first = number + 1;
            }
        }
        (copies, fetches)
    }

    /// Begins to write the first piece of `range` with the guest's data.
    fn begin_write(&mut self, index: usize, range: Range<u64>) -> Result<Flow, Failure> {
        let (alignment, memory_alignment) = self.alignment();
        if self.common.disk.image().raw().is_some() && range.start.is_multiple_of(alignment) {
            let end = piece_end(&range, MAX_DIRECT);
            let memory = self.queue.memory().clone();
            let mut ahead = self.request(index).buffers.readable.clone();
            let pieces = ahead.take((end - range.start) as usize)?;
            if let Some(slices) = GuestSlices::new(&memory, &pieces, memory_alignment, alignment as usize) {
                self.check_memory()?;
                let request = self.request(index);
                request.buffers.readable = ahead;
                request.job = Job::Write(end..range.end);
                let action = Action::Write(Memory::Guest(slices));
                self.submit(Part { request: index, kind: PartKind::Write }, range.start, action);
                return Ok(Flow::Begun);
            }
        }
        let piece = range.start..piece_end(&range, MAX_BOUNCE as u64);
        let mut ahead = self.request(index).buffers.readable.clone();
        let pieces = ahead.take((piece.end - piece.start) as usize)?;
        let flow = self.begin_buffered(index, piece.clone(), Source::Guest(pieces))?;
        if flow == Flow::Begun {
            let request = self.request(index);
            request.buffers.readable = ahead;
            request.job = Job::Write(piece.end..range.end);
        }
        Ok(flow)
    }

    /// Begins to write zeros to the first piece of `range`, the first range that the request must fill.
    fn begin_fill(&mut self, index: usize, range: Range<u64>) -> Result<Flow, Failure> {
        let piece = range.start..piece_end(&range, MAX_BOUNCE as u64);
        let flow = self.begin_buffered(index, piece.clone(), Source::Zeroes)?;
        if flow == Flow::Begun
            && let Job::Clear { fill, .. } = &mut self.request(index).job
        {
            fill[0].start = piece.end;
            if fill[0].is_empty() {
                fill.pop_front();
            }
        }
        Ok(flow)
    }

    /// Writes `range` from `source` through a buffer.
    fn begin_buffered(&mut self, index: usize, range: Range<u64>, source: Source) -> Result<Flow, Failure> {
        let (alignment, _) = self.alignment();
        let wide = widen(&range, alignment);
        let Some(mut bounce) = self.bounces.take((wide.end - wide.start) as usize) else {
            return Ok(Flow::Blocked);
        };
        if wide != range {
            let inner = (range.start - wide.start) as usize..(range.end - wide.start) as usize;
            let part = Part { request: index, kind: PartKind::Surround(source, inner) };
            self.submit(part, wide.start, Action::Read(Layer(0), Memory::Bounce(bounce)));
            return Ok(Flow::Begun);
        }
        let filled = source.fill(self.queue.memory(), bounce.bytes_mut()).map_err(Failure::from);
        if let Err(failure) = filled.and_then(|()| self.check_memory()) {
            self.bounces.give(bounce);
            return Err(failure);
        }
        let action = Action::Write(Memory::Bounce(bounce));
        self.submit(Part { request: index, kind: PartKind::Write }, range.start, action);
        Ok(Flow::Begun)
    }

    fn begin_clear(&mut self, index: usize, how: Clearing, range: Option<Range<u64>>) {
        let Some(range) = range else { return };
        let len = range.end - range.start;
        let action = match how {
            Clearing::Discard => Action::Discard(len),
            Clearing::Zero { .. } if self.common.disk.must_write_zeros() => {
                return self.fill(index, range);
            }
            Clearing::Zero { unmap } => Action::Zero { len, unmap },
        };
        let offset = range.start;
        self.submit(Part { request: index, kind: PartKind::Clear(how, range) }, offset, action);
    }

    fn fill(&mut self, index: usize, range: Range<u64>) {
        if let Job::Clear { fill, .. } = &mut self.request(index).job {
            fill.push_back(range);
        }
    }

    /// Handles the end of an operation.
    pub(super) fn finish_part(&mut self, part: Part, operation: Operation, result: io::Result<()>) {
        let index = part.request;
        if let Err(failure) = self.try_finish_part(part, operation, result) {
            self.request(index).failure.get_or_insert(failure);
        }
    }

    fn try_finish_part(
        &mut self,
        part: Part,
        operation: Operation,
        result: io::Result<()>,
    ) -> Result<(), Failure> {
        let Part { request: index, kind } = part;
        let offset = operation.offset;
        match (kind, operation.action) {
            (PartKind::Copy { image, copies, fetches }, Action::Read(_, Memory::Bounce(bounce))) => {
                let data = bounce.bytes();
                let is_read = result.is_ok();
                let mut copied = result
                    .map_err(host_failure("read", offset, data.len() as u64))
                    .and_then(|()| self.copy_to_guest(offset, data, image, &copies));
                for mut fetch in fetches {
                    let from = (fetch.first() * BLOCK_SIZE - offset) as usize;
                    if is_read {
                        fetch.fill(&data[from..from + fetch.bytes()]);
                    }
                    copied = copied.and(self.end_fetch(fetch, is_read));
                }
                self.bounces.give(bounce);
                copied
            }
            (PartKind::Fetch, Action::Read(_, Memory::Fetch(fetch))) => {
                let len = fetch.bytes() as u64;
                let delivered = self.end_fetch(fetch, result.is_ok());
                result.map_err(host_failure("read", offset, len))?;
                delivered
            }
            (PartKind::Surround(source, inner), Action::Read(_, Memory::Bounce(mut bounce))) => {
                let len = bounce.bytes().len() as u64;
                let filled = result
                    .map_err(host_failure("read what surrounds", offset, len))
                    .and_then(|()| Ok(source.fill(self.queue.memory(), &mut bounce.bytes_mut()[inner])?))
                    .and_then(|()| self.check_memory());
                if let Err(failure) = filled {
                    self.bounces.give(bounce);
                    return Err(failure);
                }
                let action = Action::Write(Memory::Bounce(bounce));
                self.submit(Part { request: index, kind: PartKind::Write }, offset, action);
                Ok(())
            }
            (PartKind::Write, Action::Write(memory)) => {
                let len = memory.len() as u64;
                if let (Memory::Guest(slices), Err(error)) = (&memory, &result)
                    && matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EHWPOISON))
                {
                    // The kernel could not read the guest's data. A read of each page detects a loss.
                    slices.touch();
                }
                self.return_buffer(memory);
                result.map_err(host_failure("write", offset, len))
            }
            (PartKind::Flush, _) => result.map_err(Failure::Flush),
            (PartKind::Clear(how, range), _) => match (result, how) {
                (Err(error), Clearing::Discard) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                (Err(error), Clearing::Zero { .. }) if error.kind() == io::ErrorKind::Unsupported => {
                    self.common.disk.set_must_write_zeros();
                    self.fill(index, range);
                    Ok(())
                }
                (result, how) => {
                    let action = if how == Clearing::Discard { "discard" } else { "zero" };
                    result.map_err(host_failure(action, offset, range.end - range.start))
                }
            },
            // The operation differs from the submitted one.
            (_, action) => {
                if let Action::Read(_, memory) | Action::Write(memory) = action {
                    self.return_buffer(memory);
                }
                Err(Failure::Malformed("it came back as another one"))
            }
        }
    }

    /// Has the cache deliver what was read, if it was.
    fn end_fetch(&self, fetch: Fetch, is_read: bool) -> Result<(), Failure> {
        let (offset, len) = (fetch.first() * BLOCK_SIZE, fetch.bytes() as u64);
        let Some(cache) = self.common.disk.cache() else { return Ok(()) };
        let outcome = if is_read { Ok(()) } else { Err(()) };
        cache.end_fetch(fetch, outcome).map_err(host_failure("deliver", offset, len))
    }

    fn copy_to_guest(
        &self,
        offset: u64,
        data: &[u8],
        image: Option<ImageId>,
        copies: &[(GuestAddress, Range<usize>)],
    ) -> Result<(), Failure> {
        for (address, range) in copies {
            self.queue.memory().write_slice(&data[range.clone()], *address)?;
            if let (Some(observer), Some(image)) = (&self.common.observer, image) {
                observer.filled(image, *address, range.len(), offset + range.start as u64);
            }
        }
        Ok(())
    }
}

/// Returns the sources of `pieces` in a buffer. The first piece is at byte `offset` of the buffer.
fn copies_of(pieces: &[(GuestAddress, usize)], mut offset: usize) -> Copies {
    let copy = |&(address, len): &(GuestAddress, usize)| {
        offset += len;
        (address, offset - len..offset)
    };
    pieces.iter().map(copy).collect()
}

/// Returns where each block of data goes, if each goes to one place.
fn whole_blocks(pieces: &[(GuestAddress, usize)]) -> Option<Vec<GuestAddress>> {
    let one = |block: Pieces| match block[..] {
        [(address, _)] => Some(address),
        _ => None,
    };
    split_blocks(pieces).into_iter().map(one).collect()
}

/// Returns the parts of each block of data that goes to `pieces`.
fn split_blocks(pieces: &[(GuestAddress, usize)]) -> Vec<Pieces> {
    let mut blocks: Vec<Pieces> = Vec::new();
    let mut room = 0;
    for &(mut address, mut len) in pieces {
        while len > 0 {
            if room == 0 {
                blocks.push(Vec::new());
                room = BLOCK_SIZE as usize;
            }
            let step = len.min(room);
            if let Some(block) = blocks.last_mut() {
                block.push((address, step));
            }
            // The ranges lie in guest memory, as was checked.
            address = GuestAddress(address.0.wrapping_add(step as u64));
            (len, room) = (len - step, room - step);
        }
    }
    blocks
}

fn host_failure(action: &'static str, offset: u64, len: u64) -> impl FnOnce(io::Error) -> Failure {
    move |source| Failure::Host { action, len, sector: offset / SECTOR_SIZE, source }
}
