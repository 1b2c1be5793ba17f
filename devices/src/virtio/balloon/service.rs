//! Serves the queues of a balloon.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::control::BalloonControl;
use super::stats::ENTRY_BYTES;
use super::{FRAME_BYTES, FreePages};
use crate::virtio::chain::Buffers;
use crate::virtio::queue::{QueueError, ServedQueue, Taken};
use crate::virtio::worker::{Serve, StopFlag};

/// Limit for descriptors in a chain. Linux reports 32 blocks at a time.
const MAX_DESCRIPTORS: usize = 64;
/// Limit for the numbers of page frames that one request is heeded for. Linux sends 256.
const MAX_NUMBERS: usize = 1 << 16;
/// Numbers of page frames that are read at once.
const BATCH: usize = 1024;
/// Limit for the bytes of statistics that are read.
const MAX_STATS_BYTES: usize = 64 * ENTRY_BYTES;
/// Pauses add up to this, so that short pieces cost no system call.
const LEAST_PAUSE: Duration = Duration::from_micros(500);

/// A queue and its event.
type End = (ServedQueue, EventFd);

/// The queues that the driver uses.
pub(super) struct Queues {
    pub(super) inflate: End,
    pub(super) deflate: End,
    pub(super) stats: Option<End>,
    pub(super) hints: Option<End>,
    pub(super) reports: Option<End>,
}

impl Queues {
    fn all(&mut self) -> impl Iterator<Item = &mut ServedQueue> {
        let Self { inflate, deflate, stats, hints, reports } = self;
        let optional = [stats, hints, reports].into_iter().flatten();
        [inflate, deflate].into_iter().chain(optional).map(|(queue, _)| queue)
    }
}

/// Frees what the guest gives up, and pauses.
struct Freeing {
    control: Arc<BalloonControl>,
    pages: Arc<dyn FreePages>,
    pause: Duration,
}

impl Freeing {
    /// Frees page frames, all of them or up to when the device stops.
    fn free(&mut self, frames: Range<u64>, stop: &StopFlag) {
        let mut next = frames.start;
        while next < frames.end && !stop.is_set() {
            let started = Instant::now();
            let freed = self.pages.free(next..frames.end);
            let stats = self.control.stats();
            stats.freed.fetch_add(freed.freed, Relaxed);
            stats.invalid.fetch_add(freed.invalid, Relaxed);
            if freed.next <= next {
                return;
            }
            next = freed.next;
            self.pause += started.elapsed();
            if self.pause >= LEAST_PAUSE {
                thread::sleep(std::mem::take(&mut self.pause));
            }
        }
    }

    /// Frees the whole page frames of ranges that the device may write.
    fn free_buffers(&mut self, buffers: &Buffers, counter: &AtomicU64, is_wanted: bool, stop: &StopFlag) {
        for (address, bytes) in buffers.writable.ranges() {
            let first = address.0.div_ceil(FRAME_BYTES);
            let end = address.0.saturating_add(bytes as u64) / FRAME_BYTES;
            counter.fetch_add(end.saturating_sub(first), Relaxed);
            if is_wanted {
                self.free(first..end, stop);
            }
        }
    }
}

/// The resources for serving the queues.
pub(super) struct Service {
    freeing: Freeing,
    queues: Queues,
    buffers: Buffers,
    /// The buffer for statistics, which the driver fills again when it gets it back.
    held: Option<Taken>,
    timer: TimerFd,
    /// When the guest is asked for statistics next.
    due: Option<Instant>,
    interval: u32,
    /// Written when the interval changes.
    wake: Arc<EventFd>,
}

impl Service {
    pub(super) fn new(
        control: Arc<BalloonControl>,
        pages: Arc<dyn FreePages>,
        queues: Queues,
    ) -> io::Result<Self> {
        Ok(Self {
            queues,
            buffers: Buffers::new(MAX_DESCRIPTORS),
            held: None,
            timer: TimerFd::new().map_err(io::Error::from)?,
            due: None,
            interval: 0,
            wake: control.wakers.register()?,
            freeing: Freeing { control, pages, pause: Duration::ZERO },
        })
    }

    fn work(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        self.queues.all().try_for_each(ServedQueue::silence_driver)?;
        loop {
            if stop.is_set() {
                return self.return_stats();
            }
            self.keep_time()?;
            // One request of each queue at a time, so that none waits for all of another.
            let turns = [Self::inflate, Self::deflate, Self::take_stats, Self::take_hint, Self::take_report];
            let mut was_idle = true;
            for turn in turns {
                was_idle &= !turn(self, stop)?;
            }
            if !was_idle {
                continue;
            }
            let mut has_more = false;
            for queue in self.queues.all() {
                queue.notify_driver()?;
                has_more |= queue.listen_to_driver()?;
            }
            if !has_more {
                return Ok(());
            }
            self.queues.all().try_for_each(ServedQueue::silence_driver)?;
        }
    }

    /// Asks for statistics when it is time.
    fn keep_time(&mut self) -> Result<(), QueueError> {
        let interval = self.freeing.control.stats_interval();
        let every = Duration::from_secs(interval.into());
        let now = Instant::now();
        if interval != self.interval {
            self.interval = interval;
            self.due = (interval > 0).then_some(now + every);
        } else if self.due.is_some_and(|due| due <= now) {
            self.due = Some(now + every);
            self.return_stats()?;
        } else {
            return Ok(());
        }
        let wait = self.due.map_or(Duration::ZERO, |_| every);
        // Without the timer there are no newer statistics, and all else works.
        let _ = self.timer.reset(wait, None);
        Ok(())
    }

    /// Returns the buffer for statistics to the driver.
    fn return_stats(&mut self) -> Result<(), QueueError> {
        match (self.held.take(), &mut self.queues.stats) {
            (Some(taken), Some((queue, _))) => {
                queue.complete(taken, 0)?;
                queue.notify_driver()
            }
            _ => Ok(()),
        }
    }

    /// Serves a request to put page frames into the balloon. Returns whether there was one.
    fn inflate(&mut self, stop: &StopFlag) -> Result<bool, QueueError> {
        let queue = &mut self.queues.inflate.0;
        let Some(mut taken) = queue.take(&mut self.buffers)? else { return Ok(false) };
        let given = (self.buffers.readable.remaining() / 4).min(MAX_NUMBERS as u64) as usize;
        self.freeing.control.stats().inflated.fetch_add(given as u64, Relaxed);
        let mut left = given;
        let mut bytes = [0; 4 * BATCH];
        while left > 0 {
            let count = left.min(BATCH);
            let bytes = &mut bytes[..4 * count];
            taken = queue.read(&mut self.buffers, taken, bytes)?;
            let number = |word: &[u8]| u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            let mut numbers: Vec<u32> = bytes.chunks_exact(4).map(number).collect();
            // Guests often give pages away from the last to the first.
            numbers.sort_unstable();
            numbers.dedup();
            for run in numbers.chunk_by(|one, next| next - one == 1) {
                let first = u64::from(run[0]);
                self.freeing.free(first..first + run.len() as u64, stop);
            }
            left -= count;
        }
        queue.complete(taken, 0)?;
        queue.notify_driver()?;
        Ok(true)
    }

    /// Serves a request to take page frames out of the balloon: there is nothing to do.
    fn deflate(&mut self, _: &StopFlag) -> Result<bool, QueueError> {
        let queue = &mut self.queues.deflate.0;
        let Some(taken) = queue.take(&mut self.buffers)? else { return Ok(false) };
        let count = (self.buffers.readable.remaining() / 4).min(MAX_NUMBERS as u64);
        self.freeing.control.stats().deflated.fetch_add(count, Relaxed);
        queue.complete(taken, 0)?;
        queue.notify_driver()?;
        Ok(true)
    }

    /// Takes statistics in, and keeps their buffer.
    fn take_stats(&mut self, _: &StopFlag) -> Result<bool, QueueError> {
        let Some((queue, _)) = &mut self.queues.stats else { return Ok(false) };
        let Some(mut taken) = queue.take(&mut self.buffers)? else { return Ok(false) };
        let mut entries = [0; MAX_STATS_BYTES];
        let count = self.buffers.readable.remaining().min(MAX_STATS_BYTES as u64) as usize;
        let entries = &mut entries[..count];
        taken = queue.read(&mut self.buffers, taken, entries)?;
        self.freeing.control.take_guest_stats(entries);
        // A driver has one such buffer.
        self.return_stats()?;
        self.held = Some(taken);
        Ok(true)
    }

    /// Takes a command or pages of free page hints.
    fn take_hint(&mut self, stop: &StopFlag) -> Result<bool, QueueError> {
        let Some((queue, _)) = &mut self.queues.hints else { return Ok(false) };
        let Some(mut taken) = queue.take(&mut self.buffers)? else { return Ok(false) };
        let control = Arc::clone(&self.freeing.control);
        if self.buffers.readable.remaining() >= 4 {
            let mut command = [0; 4];
            taken = queue.read(&mut self.buffers, taken, &mut command)?;
            control.take_hint_command(u32::from_le_bytes(command));
        }
        let is_wanted = control.wants_hints() && !control.is_poisoned();
        self.freeing.free_buffers(&self.buffers, &control.stats().hinted, is_wanted, stop);
        queue.complete(taken, 0)?;
        queue.notify_driver()?;
        Ok(true)
    }

    /// Frees what the guest reports.
    fn take_report(&mut self, stop: &StopFlag) -> Result<bool, QueueError> {
        let Some((queue, _)) = &mut self.queues.reports else { return Ok(false) };
        let Some(taken) = queue.take(&mut self.buffers)? else { return Ok(false) };
        let control = Arc::clone(&self.freeing.control);
        let is_wanted = !control.is_poisoned();
        self.freeing.free_buffers(&self.buffers, &control.stats().reported, is_wanted, stop);
        queue.complete(taken, 0)?;
        queue.notify_driver()?;
        Ok(true)
    }
}

impl Serve for Service {
    fn events(&self) -> Vec<RawFd> {
        let Queues { inflate, deflate, stats, hints, reports } = &self.queues;
        let optional = [stats, hints, reports].into_iter().flatten();
        let notified = [inflate, deflate].into_iter().chain(optional).map(|(_, event)| event.as_raw_fd());
        notified.chain([self.timer.as_raw_fd(), self.wake.as_raw_fd()]).collect()
    }

    fn serve(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        self.work(stop).inspect_err(|_| {
            self.freeing.control.stats().errors.fetch_add(1, Relaxed);
        })
    }

    fn on_idle(&mut self) {}
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(taken) = self.held.take() {
            // The queue is not served any more.
            let _ = taken.break_queue(QueueError::MemoryLost);
        }
    }
}
