//! Fills buffers with random bytes.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::{Common, MAX_REQUEST_BYTES};
use crate::virtio::chain::Buffers;
use crate::virtio::queue::{QueueError, ServedQueue, Taken};
use crate::virtio::worker::{Serve, StopFlag};

/// Limit for descriptors in a chain.
const MAX_DESCRIPTORS: usize = 32;
/// Number of bytes to fill at once.
const STEP: usize = 4096;

/// The resources for serving the queue.
pub(super) struct Service {
    common: Arc<Common>,
    queue: ServedQueue,
    notified: EventFd,
    timer: TimerFd,
    /// Written when the limits change.
    wake: Arc<EventFd>,
    buffers: Buffers,
    /// A request that waits because of the limits. Its buffers are in `buffers`.
    throttled: Option<Taken>,
    step: Box<[u8; STEP]>,
}

impl Service {
    pub(super) fn new(common: Arc<Common>, queue: ServedQueue, notified: EventFd) -> io::Result<Self> {
        Ok(Self {
            queue,
            notified,
            timer: TimerFd::new().map_err(io::Error::from)?,
            wake: common.wakers.register()?,
            buffers: Buffers::new(MAX_DESCRIPTORS),
            throttled: None,
            step: Box::new([0; STEP]),
            common,
        })
    }

    /// Answers requests until there are none, until the limits stop them, or until the device stops.
    fn work(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        self.queue.silence_driver()?;
        loop {
            if stop.is_set() {
                // Nobody waits for this request any more.
                if let Some(taken) = self.throttled.take() {
                    self.queue.complete(taken, 0)?;
                }
                return Ok(());
            }
            let delayed = self.throttled.take();
            // The worker may wake before its time: for other events, or since clocks differ.
            let is_new = delayed.is_none();
            let taken = match delayed {
                Some(taken) => Some(taken),
                None => self.queue.take(&mut self.buffers)?,
            };
            let Some(taken) = taken else {
                self.queue.notify_driver()?;
                if !self.queue.listen_to_driver()? {
                    return Ok(());
                }
                self.queue.silence_driver()?;
                continue;
            };
            let wanted = self.buffers.writable.remaining().min(MAX_REQUEST_BYTES as u64);
            if let Err(wait) = self.common.limiter.begin(wanted) {
                // If the timer cannot be set, the request continues without a limit: otherwise it would hang.
                if self.timer.reset(wait.max(Duration::from_nanos(1)), None).is_ok() {
                    self.common.stats.throttled.fetch_add(u64::from(is_new), Relaxed);
                    self.throttled = Some(taken);
                    return self.queue.notify_driver();
                }
            }
            self.answer(taken, wanted as usize)?;
        }
    }

    /// Fills the first `wanted` bytes of the request's buffers, and completes it.
    fn answer(&mut self, taken: Taken, wanted: usize) -> Result<(), QueueError> {
        let mut left = wanted;
        while left > 0 {
            let step = &mut self.step[..left.min(STEP)];
            if let Err(source) = fill(step) {
                return Err(taken.break_queue(QueueError::Host { what: "get random bytes", source }));
            }
            if let Err(error) = self.buffers.writable.write(self.queue.memory(), step) {
                return Err(taken.break_queue(QueueError::Ring(virtio_queue::Error::GuestMemory(error))));
            }
            left -= step.len();
        }
        self.common.stats.requests.fetch_add(1, Relaxed);
        self.common.stats.bytes.fetch_add(wanted as u64, Relaxed);
        self.queue.complete(taken, wanted as u32)
    }
}

/// Fills `bytes` from the kernel's generator.
fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match getrandom(&mut bytes[done..], GetRandomFlags::empty()) {
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl Serve for Service {
    fn events(&self) -> Vec<RawFd> {
        vec![self.notified.as_raw_fd(), self.timer.as_raw_fd(), self.wake.as_raw_fd()]
    }

    fn serve(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        self.work(stop).inspect_err(|_| {
            self.common.stats.errors.fetch_add(1, Relaxed);
        })
    }

    fn on_idle(&mut self) {}
}
