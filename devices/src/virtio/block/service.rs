//! Serves one queue: takes requests, has them carried out, and completes them in any order.
//!
//! Requests begin in order. If a request must wait for memory, or for a range that another request writes,
//! the following requests wait too. After their start, requests proceed in parallel.
//! [`transfer`](super::transfer) turns requests into operations.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;
use std::{io, mem};

use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::request::{Clearing, Failure, Job, Rules};
use super::stats::add;
use super::transfer::{Part, PartKind};
use super::{BlockStats, MAX_DESCRIPTORS, MAX_ID_LEN, ReadObserver};
use crate::disk::Disk;
use crate::disk::cache::{BLOCK_SIZE, BlockCache, ImageId};
use crate::disk::channel::{Action, Channel, ChannelLost, Completion, Operation};
use crate::disk::line::CacheLine;
use crate::disk::memory::{BouncePool, Memory, widen};
use crate::disk::ranges::RangeGuard;
use crate::virtio::chain::Buffers;
use crate::virtio::queue::{QueueError, ServedQueue, Taken};
use crate::virtio::worker::{Serve, StopFlag};

/// Limit for requests in progress. A driver that makes the same chain available again and again gets no
/// further.
const MAX_REQUESTS: usize = MAX_DESCRIPTORS;
/// Number of requests to begin before the completed ones are processed.
const BATCH: usize = 32;
/// Limit for bounce buffers of one queue, in bytes.
const BOUNCE_BYTES: usize = 4 << 20;

/// The state that all queues of a disk share.
pub(super) struct Common {
    pub(super) disk: Arc<Disk>,
    pub(super) id: [u8; MAX_ID_LEN],
    pub(super) rules: Rules,
    /// Whether writes must be on the medium before they complete.
    pub(super) write_through: bool,
    pub(super) stats: Arc<BlockStats>,
    pub(super) observer: Option<Arc<dyn ReadObserver>>,
}

/// Blocks whose change was announced to the cache. Dropping this value announces the end of the change.
pub(super) struct Change {
    cache: Arc<dyn BlockCache>,
    image: ImageId,
    blocks: std::ops::Range<u64>,
}

impl Drop for Change {
    fn drop(&mut self) {
        self.cache.end_write(self.image, self.blocks.clone());
    }
}

/// A request that was taken from the queue and has not completed.
pub(super) struct Request {
    taken: Taken,
    status: GuestAddress,
    pub(super) buffers: Buffers,
    pub(super) job: Job,
    kind: Kind,
    /// Length of the data in bytes, for the statistics.
    bytes: u64,
    /// Number of operations in progress.
    pub(super) in_flight: usize,
    pub(super) failure: Option<Failure>,
    /// Number of bytes put into guest memory if the request succeeds.
    written: u64,
    is_prepared: bool,
    /// Whether the request waits to begin.
    is_queued: bool,
    needs_flush: bool,
    changes: Vec<Change>,
    range: Option<RangeGuard>,
}

/// The counter for a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    Zero,
}

/// The result of an attempt to begin a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    /// All of it is in progress or complete.
    Begun,
    /// The request must wait until another one frees memory or a range.
    Blocked,
}

/// The resources for serving one queue.
pub(super) struct Service {
    pub(super) common: Arc<Common>,
    pub(super) channel: Box<dyn Channel>,
    /// The way to a cache in another process.
    pub(super) line: Option<Box<dyn CacheLine>>,
    pub(super) queue: ServedQueue,
    pub(super) bounces: BouncePool,
    requests: Vec<Option<Request>>,
    free_requests: Vec<usize>,
    parts: Vec<Option<Part>>,
    free_parts: Vec<usize>,
    /// Requests with parts that have not begun, in order.
    turns: VecDeque<usize>,
    /// A request that waits because of the disk's limits.
    throttled: Option<usize>,
    timer: TimerFd,
    notified: EventFd,
    /// Written when a range is unlocked or limits change.
    wake: Arc<EventFd>,
    completions: Vec<Completion>,
    /// Unused buffers of completed requests.
    spare: Vec<Buffers>,
}

impl Service {
    /// Returns the service of a queue. `notified` is the driver's notification event. To be called on the
    /// thread that serves, because a ring for host I/O belongs to its thread.
    pub(super) fn new(
        common: Arc<Common>,
        queue: ServedQueue,
        notified: EventFd,
        name: &str,
    ) -> io::Result<Self> {
        Ok(Self {
            notified,
            channel: common.disk.channel(name)?,
            line: common.disk.cache().and_then(|cache| cache.line()),
            wake: common.disk.wakers().register()?,
            timer: TimerFd::new().map_err(io::Error::from)?,
            common,
            queue,
            bounces: BouncePool::new(BOUNCE_BYTES),
            requests: Vec::new(),
            free_requests: Vec::new(),
            parts: Vec::new(),
            free_parts: Vec::new(),
            turns: VecDeque::new(),
            throttled: None,
            completions: Vec::new(),
            spare: Vec::new(),
        })
    }

    fn in_progress(&self) -> usize {
        self.requests.len() - self.free_requests.len()
    }

    fn has_room(&self) -> bool {
        self.throttled.is_none() && self.in_progress() < MAX_REQUESTS
    }

    /// Ends all requests: waits for those in progress and drops the others.
    fn end_all(&mut self) -> Result<(), QueueError> {
        self.turns.extend(self.throttled.take());
        for index in mem::take(&mut self.turns) {
            self.request(index).failure.get_or_insert(Failure::Stopped);
            self.request(index).is_queued = false;
            self.finish_request(index)?;
        }
        while self.in_progress() > 0 {
            self.wait()?;
            self.reap()?;
            for index in mem::take(&mut self.turns) {
                self.request(index).failure.get_or_insert(Failure::Stopped);
                self.request(index).is_queued = false;
                self.finish_request(index)?;
            }
            self.channel.kick()?;
        }
        self.queue.notify_driver()
    }

    pub(super) fn request(&mut self, index: usize) -> &mut Request {
        self.requests[index].as_mut().expect("a request stays until it is complete")
    }

    /// Takes requests from the queue and begins them. Returns true if there were any.
    fn take(&mut self) -> Result<bool, QueueError> {
        if let Some(index) = self.throttled {
            let cost = self.request(index).job.cost();
            if !self.is_allowed(cost) {
                return Ok(false);
            }
            self.throttled = None;
            self.enqueue(index);
        }
        let mut taken = 0;
        while taken < BATCH && self.has_room() {
            let mut buffers = self.spare.pop().unwrap_or_else(|| Buffers::new(MAX_DESCRIPTORS));
            let Some(chain) = self.queue.take(&mut buffers)? else {
                self.spare.push(buffers);
                break;
            };
            taken += 1;
            let Some(status) = buffers.writable.split_last_byte() else {
                return Err(chain.break_queue(QueueError::NoStatus));
            };
            let index = self.accept(chain, status, buffers);
            if self.request(index).failure.is_some() {
                self.finish_request(index)?;
                continue;
            }
            let cost = self.request(index).job.cost();
            if self.is_allowed(cost) {
                self.enqueue(index);
            } else {
                add(&self.common.stats.throttled, 1);
                self.throttled = Some(index);
            }
        }
        self.begin()?;
        Ok(taken > 0)
    }

    /// Returns whether the disk's limits let a request of `cost` bytes begin. If not, the worker wakes when
    /// they do.
    fn is_allowed(&mut self, cost: u64) -> bool {
        match self.common.disk.limiter().begin(cost) {
            Ok(()) => true,
            // If the timer cannot be set, the request continues without a limit, because otherwise it would
            // hang.
            Err(wait) => self.timer.reset(wait.max(Duration::from_nanos(1)), None).is_err(),
        }
    }

    fn accept(&mut self, taken: Taken, status: GuestAddress, mut buffers: Buffers) -> usize {
        let capacity = self.common.disk.image().size();
        let parsed = self.common.rules.parse(&mut buffers, self.queue.memory(), capacity);
        let (job, failure) = match parsed {
            Ok(job) => (job, None),
            Err(failure) => (Job::Read(0..0), Some(failure)),
        };
        let kind = match &job {
            Job::Read(_) => Kind::Read,
            Job::Write(_) => Kind::Write,
            Job::Flush => Kind::Flush,
            Job::GetId => Kind::GetId,
            Job::Clear { how: Clearing::Discard, .. } => Kind::Discard,
            Job::Clear { .. } => Kind::Zero,
        };
        let changes = matches!(kind, Kind::Write | Kind::Discard | Kind::Zero);
        let request = Request {
            taken,
            status,
            buffers,
            bytes: job.cost(),
            written: if kind == Kind::Read { job.cost() } else { 0 },
            job,
            kind,
            in_flight: 0,
            failure,
            is_prepared: false,
            is_queued: false,
            needs_flush: self.common.write_through && changes,
            changes: Vec::new(),
            range: None,
        };
        match self.free_requests.pop() {
            Some(index) => {
                self.requests[index] = Some(request);
                index
            }
            None => {
                self.requests.push(Some(request));
                self.requests.len() - 1
            }
        }
    }

    /// Puts a request at the end of the requests that wait to begin.
    fn enqueue(&mut self, index: usize) {
        if !mem::replace(&mut self.request(index).is_queued, true) {
            self.turns.push_back(index);
        }
    }

    /// Begins requests until one must wait.
    fn begin(&mut self) -> Result<(), QueueError> {
        while let Some(&index) = self.turns.front() {
            if !self.prepare(index) || self.begin_parts(index) == Flow::Blocked {
                return Ok(());
            }
            self.turns.pop_front();
            self.request(index).is_queued = false;
            self.finish_request(index)?;
        }
        Ok(())
    }

    /// Locks the ranges of the request and announces its changes to the cache. Returns false if the request
    /// must wait.
    fn prepare(&mut self, index: usize) -> bool {
        if self.request(index).is_prepared {
            return true;
        }
        let common = self.common.clone();
        let changes = self.request(index).job.changes();
        let hull = changes.iter().cloned().reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
        let (alignment, _) = self.alignment();
        if let Some(hull) = hull
            && alignment > super::SECTOR_SIZE
        {
            let is_whole = |range: &std::ops::Range<u64>| widen(range, alignment) == *range;
            let exclusive = !changes.iter().all(is_whole);
            match common.disk.locks().try_take(widen(&hull, alignment), exclusive) {
                None => return false,
                range => self.request(index).range = range,
            }
        }
        if let (Some(cache), Some(image)) = (common.disk.cache(), common.disk.image().identity()) {
            for range in changes {
                let range = widen(&range, BLOCK_SIZE);
                let blocks = range.start / BLOCK_SIZE..range.end / BLOCK_SIZE;
                cache.begin_write(image, blocks.clone());
                self.request(index).changes.push(Change { cache: cache.clone(), image, blocks });
            }
        }
        self.request(index).is_prepared = true;
        true
    }

    /// Returns the alignment of offsets and lengths, and that of addresses.
    pub(super) fn alignment(&self) -> (u64, usize) {
        let direct = self.common.disk.image().raw().and_then(|raw| raw.direct());
        direct.map_or((1, 1), |direct| (direct.offset.into(), direct.memory as usize))
    }

    /// Submits an operation for a request.
    pub(super) fn submit(&mut self, part: Part, offset: u64, action: Action) {
        let id = self.keep(part);
        self.channel.submit(Operation { id, offset, action });
    }

    /// Notes a part that is in progress. Returns its number.
    pub(super) fn keep(&mut self, part: Part) -> usize {
        self.request(part.request).in_flight += 1;
        match self.free_parts.pop() {
            Some(id) => {
                self.parts[id] = Some(part);
                id
            }
            None => {
                self.parts.push(Some(part));
                self.parts.len() - 1
            }
        }
    }

    /// Notes that a part is over.
    pub(super) fn end_part(&mut self, id: usize) -> Part {
        let part = self.parts[id].take().expect("a part stays until its operation is over");
        self.free_parts.push(id);
        self.request(part.request).in_flight -= 1;
        part
    }

    /// Puts a request that has not begun in full back to those that wait to begin.
    fn go_on(&mut self, index: usize) {
        if !self.request(index).job.is_begun() && self.request(index).failure.is_none() {
            self.enqueue(index);
        }
    }

    /// Processes completed operations. Returns true if there were any.
    fn reap(&mut self) -> Result<bool, QueueError> {
        let mut completions = mem::take(&mut self.completions);
        self.channel.reap(&mut completions)?;
        let any = !completions.is_empty();
        let mut outcome = Ok(());
        for completion in completions.drain(..) {
            let is_lost = completion.is_lost;
            let index = self.process_completion(completion);
            if is_lost {
                self.common.disk.set_lost();
                outcome = Err(ChannelLost("the code that serves the image has failed".to_owned()).into());
            }
            if outcome.is_ok() {
                outcome = self.finish_request(index);
            }
        }
        self.completions = completions;
        outcome?;
        let answered = self.reap_far();
        for &index in &answered {
            self.go_on(index);
            self.finish_request(index)?;
        }
        Ok(any || !answered.is_empty())
    }

    /// Processes one completion. Returns the request that it belongs to.
    fn process_completion(&mut self, completion: Completion) -> usize {
        let Completion { operation, result, .. } = completion;
        let part = self.end_part(operation.id);
        let index = part.request;
        self.finish_part(part, operation, result);
        self.go_on(index);
        index
    }

    /// Completes the request if all of its parts are complete.
    fn finish_request(&mut self, index: usize) -> Result<(), QueueError> {
        let request = self.request(index);
        if request.in_flight > 0
            || request.is_queued
            || (request.failure.is_none() && !request.job.is_begun())
        {
            return Ok(());
        }
        if request.failure.is_none() && mem::take(&mut request.needs_flush) {
            self.submit(Part { request: index, kind: PartKind::Flush }, 0, Action::Flush);
            return Ok(());
        }
        let Some(request) = self.requests[index].take() else { return Ok(()) };
        self.free_requests.push(index);
        let Request { taken, status, buffers, failure, kind, bytes, written, changes, range, .. } = request;
        // Drop the changes before the guest learns of the completion, and before other requests may write
        // there.
        drop(changes);
        drop(range);
        self.spare.push(buffers);
        let (answer, written) = self.account(kind, bytes, written, failure);
        if self.queue.memory().write_obj(answer as u8, status).is_err() {
            return Err(taken.break_queue(QueueError::NoStatus));
        }
        self.queue.complete(taken, u32::try_from(written + 1).unwrap_or(u32::MAX))
    }

    /// Counts a completed request. Returns its status and the number of bytes written before the status.
    fn account(&self, kind: Kind, bytes: u64, written: u64, failure: Option<Failure>) -> (u32, u64) {
        let stats = &self.common.stats;
        if let Some(failure) = failure {
            if failure.is_host_error() {
                stats.record_host_error(failure.to_string());
            } else {
                stats.record_error(failure.to_string());
            }
            let status = if failure.is_unsupported() { VIRTIO_BLK_S_UNSUPP } else { VIRTIO_BLK_S_IOERR };
            return (status, 0);
        }
        match kind {
            Kind::Read => {
                add(&stats.reads, 1);
                add(&stats.read_bytes, bytes);
            }
            Kind::Write => {
                add(&stats.writes, 1);
                add(&stats.written_bytes, bytes);
            }
            Kind::Flush => add(&stats.flushes, 1),
            Kind::Discard => add(&stats.discards, 1),
            Kind::Zero => add(&stats.write_zeroes, 1),
            Kind::GetId => {}
        }
        (VIRTIO_BLK_S_OK, written)
    }

    /// Answers a request for the disk's name.
    pub(super) fn answer_id(&mut self, index: usize) {
        let (id, memory) = (self.common.id, self.queue.memory().clone());
        let request = self.request(index);
        let len = id.len().min(usize::try_from(request.buffers.writable.remaining()).unwrap_or(usize::MAX));
        match request.buffers.writable.write(&memory, &id[..len]) {
            Ok(()) => request.written = len as u64,
            Err(error) => request.failure = Some(error.into()),
        }
        request.job = Job::Read(0..0);
    }

    /// Returns a buffer to its owner and discards the content.
    pub(super) fn return_buffer(&mut self, memory: Memory) {
        match memory {
            Memory::Bounce(bounce) => self.bounces.give(bounce),
            Memory::Fetch(fetch) => {
                if let Some(cache) = self.common.disk.cache() {
                    // The result of the request is already known.
                    let _ = cache.end_fetch(fetch, Err(()));
                }
            }
            Memory::Guest(_) => {}
        }
    }
}

impl Serve for Service {
    fn events(&self) -> Vec<RawFd> {
        let [notified, timer, wake] =
            [self.notified.as_raw_fd(), self.timer.as_raw_fd(), self.wake.as_raw_fd()];
        let line = self.line.as_ref().map(|line| line.event());
        [notified, self.channel.event(), timer, wake].into_iter().chain(line).collect()
    }

    fn serve(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        self.work(stop).inspect_err(|error| self.common.stats.record_error(error.to_string()))
    }

    fn on_idle(&mut self) {
        if self.in_progress() == 0 {
            self.bounces.trim();
            self.spare.truncate(1);
        }
    }
}

impl Service {
    /// Does all available work, until it must wait or the device stops.
    fn work(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        self.queue.silence_driver()?;
        loop {
            if stop.is_set() {
                return self.end_all();
            }
            let mut progress = self.reap()?;
            self.begin()?;
            progress |= self.take()?;
            self.channel.kick()?;
            // Operations that the host could do immediately are complete already.
            progress |= self.reap()?;
            self.queue.notify_driver()?;
            if progress {
                continue;
            }
            if !self.has_room() || !self.queue.listen_to_driver()? {
                return Ok(());
            }
            self.queue.silence_driver()?;
        }
    }
}

impl Drop for Service {
    /// Waits for operations in progress, and drops remaining requests, because the queue is broken.
    fn drop(&mut self) {
        self.end_far();
        while self.channel.in_flight() > 0 {
            let mut completions = Vec::new();
            if self.channel.wait().is_err() || self.channel.reap(&mut completions).is_err() {
                break;
            }
            for completion in completions {
                if let Action::Read(_, memory) | Action::Write(memory) = completion.operation.action {
                    self.return_buffer(memory);
                }
            }
        }
        for part in self.parts.drain(..).flatten() {
            if let (PartKind::Copy { fetches, .. }, Some(cache)) = (part.kind, self.common.disk.cache()) {
                fetches.into_iter().for_each(|fetch| drop(cache.end_fetch(fetch, Err(()))));
            }
        }
        for request in self.requests.drain(..).flatten() {
            let Request { taken, changes, range, .. } = request;
            drop((changes, range));
            let _ = taken.break_queue(QueueError::NoStatus);
        }
    }
}
