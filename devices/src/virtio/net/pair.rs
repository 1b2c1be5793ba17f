//! One pair of queues and their link: frames to the guest, and frames of the guest.

use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vmm_sys_util::eventfd::EventFd;

use super::Common;
use super::header::{self, NUM_BUFFERS};
use crate::disk::limit::RateLimiter;
use crate::net::{HEADER_BYTES, Link, MAX_FRAME, MIN_FRAME, Sent};
use crate::virtio::chain::Buffers;
use crate::virtio::queue::{QueueError, ServedQueue, Taken};

/// Limit for descriptors in a chain. Linux sends up to 19.
const MAX_DESCRIPTORS: usize = 64;
/// Frames to take from one queue before the others have their turn.
const BATCH: usize = 64;
/// Bytes of the largest frame and its header.
const BUFFER_BYTES: usize = HEADER_BYTES + MAX_FRAME;

/// How far a queue got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// There may be more to do at once.
    More,
    /// There is nothing to do before the next event.
    Idle,
    /// The limits allow the next frame after this time.
    Throttled(Duration),
}

/// The resources for serving a pair.
pub(super) struct Pair {
    common: Arc<Common>,
    link: Arc<dyn Link>,
    features: u64,
    receiving: (ServedQueue, EventFd),
    sending: (ServedQueue, EventFd),
    incoming: Incoming,
    outgoing: Outgoing,
}

/// Frames to the guest.
#[derive(Default)]
struct Incoming {
    /// Empty while the pair is idle.
    buffer: Vec<u8>,
    /// Length of the frame and its header in `buffer`.
    frame: Option<usize>,
    limit: Limit,
    /// The guest's buffers for the frame so far, and their sizes in total.
    collected: Vec<(Taken, Buffers)>,
    room: u64,
    spare: Vec<Buffers>,
}

/// Frames of the guest.
struct Outgoing {
    /// Empty while the pair is idle.
    buffer: Vec<u8>,
    buffers: Buffers,
    /// A frame in `buffer` that waits: its request, and its length with the header.
    frame: Option<(Taken, usize)>,
    limit: Limit,
}

/// What the device's limits have said of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Limit {
    #[default]
    Unknown,
    /// It waits, and is counted.
    Delayed,
    /// It has paid for its bytes.
    Passed,
}

impl Limit {
    /// Asks the limits of a direction for a frame of so many bytes. A frame that has to wait is counted once,
    /// however often the worker wakes before its time.
    fn ask(&mut self, limiter: &RateLimiter, bytes: usize, throttled: &AtomicU64) -> Result<(), Duration> {
        if *self == Self::Passed {
            return Ok(());
        }
        let begun = limiter.begin(bytes as u64);
        if begun.is_err() && *self == Self::Unknown {
            count(throttled, 1);
        }
        *self = if begun.is_ok() { Self::Passed } else { Self::Delayed };
        begun
    }
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Relaxed);
}

impl Pair {
    pub(super) fn new(
        common: Arc<Common>,
        link: Arc<dyn Link>,
        features: u64,
        receiving: (ServedQueue, EventFd),
        sending: (ServedQueue, EventFd),
    ) -> Self {
        let buffers = Buffers::new(MAX_DESCRIPTORS);
        let outgoing = Outgoing { buffer: Vec::new(), buffers, frame: None, limit: Limit::Unknown };
        Self { common, link, features, receiving, sending, incoming: Incoming::default(), outgoing }
    }

    pub(super) fn link(&self) -> &dyn Link {
        &*self.link
    }

    pub(super) fn events(&self) -> [RawFd; 2] {
        [self.receiving.1.as_raw_fd(), self.sending.1.as_raw_fd()]
    }

    pub(super) fn queues(&mut self) -> [&mut ServedQueue; 2] {
        [&mut self.receiving.0, &mut self.sending.0]
    }

    /// Notes that the link's other end is gone.
    fn lose_link(&self, error: &std::io::Error) {
        if self.common.state.is_alive() {
            let reason = format!("the link is gone: {error}");
            self.common.stats.record_error(reason.clone());
            self.common.state.set_gone(&reason);
        }
    }

    /// Delivers frames of the link to the guest.
    pub(super) fn receive(&mut self) -> Result<Progress, QueueError> {
        for _ in 0..BATCH {
            if self.incoming.frame.is_none() {
                if !self.common.state.is_alive() {
                    return Ok(Progress::Idle);
                }
                self.incoming.buffer.resize(BUFFER_BYTES, 0);
                let buffer = &mut self.incoming.buffer;
                let answer = self.common.answer(buffer);
                match answer.map_or_else(|| self.link.receive(buffer), |length| Ok(Some(length))) {
                    Ok(None) => {
                        let wait = self.common.detour(|detour| detour.wait());
                        return Ok(wait.map_or(Progress::Idle, Progress::Throttled));
                    }
                    Ok(Some(_)) if !self.common.state.is_up() => {
                        count(&self.common.stats.received_dropped, 1);
                        continue;
                    }
                    Ok(Some(length)) => self.incoming.frame = Some(length),
                    Err(error) => {
                        self.lose_link(&error);
                        return Ok(Progress::Idle);
                    }
                }
                self.incoming.limit = Limit::Unknown;
            }
            let Some(length) = self.incoming.frame else { return Ok(Progress::Idle) };
            let bytes = length - HEADER_BYTES;
            let throttled = &self.common.stats.throttled;
            if let Err(wait) = self.incoming.limit.ask(&self.common.receive, bytes, throttled) {
                return Ok(Progress::Throttled(wait));
            }
            if !self.collect(length)? {
                return Ok(Progress::Idle);
            }
            self.deliver(length)?;
        }
        Ok(Progress::More)
    }

    /// Takes buffers of the guest for a frame. Returns false if it has to provide more of them.
    fn collect(&mut self, length: usize) -> Result<bool, QueueError> {
        let is_mergeable = self.features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        let Incoming { collected, room, spare, .. } = &mut self.incoming;
        let queue = &mut self.receiving.0;
        while collected.is_empty() || (is_mergeable && *room < length as u64) {
            if collected.len() >= queue.size() {
                // The driver offers the same buffers again and again, and none of them has room.
                return Err(QueueError::NoRoom);
            }
            let mut buffers = spare.pop().unwrap_or_else(|| Buffers::new(MAX_DESCRIPTORS));
            let Some(taken) = queue.take(&mut buffers)? else {
                spare.push(buffers);
                return Ok(false);
            };
            if !buffers.is_in_memory {
                return Err(taken.break_queue(QueueError::NoRoom));
            }
            *room += buffers.writable.remaining();
            collected.push((taken, buffers));
        }
        Ok(true)
    }

    /// Copies the frame into the collected buffers, and completes these all at once.
    fn deliver(&mut self, length: usize) -> Result<(), QueueError> {
        let Incoming { buffer, collected, room, spare, frame, .. } = &mut self.incoming;
        let queue = &mut self.receiving.0;
        let stats = &self.common.stats;
        let fits = mem::take(room) >= length as u64;
        *frame = None;
        let count_of_buffers = collected.len() as u16;
        buffer[NUM_BUFFERS..HEADER_BYTES].copy_from_slice(&count_of_buffers.to_le_bytes());
        let mut rest = if fits { &buffer[..length] } else { &[] };
        let mut done = Vec::with_capacity(collected.len());
        let mut failed = None;
        for (taken, mut buffers) in collected.drain(..) {
            let room = rest.len().min(usize::try_from(buffers.writable.remaining()).unwrap_or(usize::MAX));
            let (part, after) = rest.split_at(room);
            rest = after;
            if failed.is_none() {
                failed = buffers.writable.write(queue.memory(), part).err();
            }
            done.push((taken, room as u32));
            spare.push(buffers);
        }
        if let Some(error) = failed {
            let mut reason = QueueError::Ring(virtio_queue::Error::GuestMemory(error));
            for (taken, _) in done {
                reason = taken.break_queue(reason);
            }
            return Err(reason);
        }
        queue.complete_together(done)?;
        if fits {
            count(&stats.received_frames, 1);
            count(&stats.received_bytes, (length - HEADER_BYTES) as u64);
        } else {
            count(&stats.received_dropped, 1);
        }
        Ok(())
    }

    /// Passes frames of the guest to the link.
    pub(super) fn send(&mut self) -> Result<Progress, QueueError> {
        if let Err(error) = self.link.flush() {
            self.lose_link(&error);
        }
        for _ in 0..BATCH {
            if self.outgoing.frame.is_none() && !self.take()? {
                return Ok(Progress::Idle);
            }
            let Some((_, length)) = &self.outgoing.frame else { continue };
            let length = *length;
            let bytes = length - HEADER_BYTES;
            let throttled = &self.common.stats.throttled;
            if let Err(wait) = self.outgoing.limit.ask(&self.common.send, bytes, throttled) {
                return Ok(Progress::Throttled(wait));
            }
            let sent = if !self.common.state.is_up() {
                Sent::Dropped
            } else if self.common.is_taken(&self.outgoing.buffer[..length]) {
                Sent::Done
            } else {
                self.link.send(&self.outgoing.buffer[..length]).unwrap_or_else(|error| {
                    self.lose_link(&error);
                    Sent::Dropped
                })
            };
            let stats = &self.common.stats;
            match sent {
                Sent::Full => return Ok(Progress::Idle),
                Sent::Done => {
                    count(&stats.sent_frames, 1);
                    count(&stats.sent_bytes, (length - HEADER_BYTES) as u64);
                }
                Sent::Dropped => count(&stats.sent_dropped, 1),
            }
            if let Some((taken, _)) = self.outgoing.frame.take() {
                self.sending.0.complete(taken, 0)?;
            }
        }
        Ok(Progress::More)
    }

    /// Takes the next frame of the guest, or drops it. Returns false if there is none.
    fn take(&mut self) -> Result<bool, QueueError> {
        let (queue, _) = &mut self.sending;
        let Outgoing { buffer, buffers, frame, limit } = &mut self.outgoing;
        let Some(taken) = queue.take(buffers)? else { return Ok(false) };
        let length = usize::try_from(buffers.readable.remaining()).unwrap_or(usize::MAX);
        let drops = |queue: &mut ServedQueue, taken| {
            count(&self.common.stats.sent_dropped, 1);
            queue.complete(taken, 0).map(|()| true)
        };
        if !(HEADER_BYTES + MIN_FRAME..=BUFFER_BYTES).contains(&length) {
            return drops(queue, taken);
        }
        buffer.resize(BUFFER_BYTES, 0);
        if let Err(error) = buffers.readable.read(queue.memory(), &mut buffer[..length]) {
            return Err(taken.break_queue(QueueError::Ring(virtio_queue::Error::GuestMemory(error))));
        }
        // What replaces lost memory is not to leave the host.
        if let Err(lost) = queue.check_memory() {
            return Err(taken.break_queue(lost));
        }
        let checked = buffer
            .first_chunk_mut()
            .map(|header| header::check(header, length - HEADER_BYTES, self.features));
        if checked != Some(Ok(())) {
            return drops(queue, taken);
        }
        *limit = Limit::Unknown;
        *frame = Some((taken, length));
        Ok(true)
    }

    /// Asks the driver to notify where that would help. Returns true if there is something to do already.
    pub(super) fn listen(&mut self) -> Result<bool, QueueError> {
        // A frame that waits for the limits or for the link goes first.
        let mut more = self.outgoing.frame.is_none() && self.sending.0.listen_to_driver()?;
        let waits_for_buffers = self.incoming.frame.is_some() && self.incoming.limit == Limit::Passed;
        more |= waits_for_buffers && self.receiving.0.listen_to_driver()?;
        Ok(more)
    }

    /// Frees the buffers that hold no frame.
    pub(super) fn trim(&mut self) {
        if self.incoming.frame.is_none() {
            self.incoming.buffer = Vec::new();
            self.incoming.spare.truncate(1);
        }
        if self.outgoing.frame.is_none() {
            self.outgoing.buffer = Vec::new();
        }
    }
}

impl Drop for Pair {
    /// Frames that wait are lost, as on any network.
    fn drop(&mut self) {
        let outgoing = self.outgoing.frame.take().map(|(taken, _)| taken);
        let incoming = self.incoming.collected.drain(..).map(|(taken, _)| taken);
        for taken in incoming.chain(outgoing) {
            let _ = taken.break_queue(QueueError::NoRoom);
        }
    }
}
