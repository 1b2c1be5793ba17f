//! Serves all pairs of queues, and the driver's commands.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::Common;
use super::pair::{Pair, Progress};
use crate::virtio::chain::Buffers;
use crate::virtio::queue::{QueueError, ServedQueue};
use crate::virtio::worker::{Serve, StopFlag};

/// Limit for descriptors in a command.
const MAX_DESCRIPTORS: usize = 16;
/// Commands to take before frames have their turn.
const BATCH: usize = 16;

/// The resources for serving the device.
pub(super) struct Service {
    common: Arc<Common>,
    pairs: Vec<Pair>,
    /// How many pairs the driver uses.
    active: usize,
    control: Option<(ServedQueue, EventFd)>,
    buffers: Buffers,
    timer: TimerFd,
    /// Written when the limits change.
    wake: Arc<EventFd>,
}

impl Service {
    pub(super) fn new(
        common: Arc<Common>,
        pairs: Vec<Pair>,
        control: Option<(ServedQueue, EventFd)>,
    ) -> io::Result<Self> {
        let service = Self {
            pairs,
            active: 1,
            control,
            buffers: Buffers::new(MAX_DESCRIPTORS),
            timer: TimerFd::new().map_err(io::Error::from)?,
            wake: common.wakers.register()?,
            common,
        };
        service.enable()?;
        Ok(service)
    }

    /// Tells the links which of them are in use.
    fn enable(&self) -> io::Result<()> {
        let mut pairs = self.pairs.iter().enumerate();
        pairs.try_for_each(|(number, pair)| pair.link().set_enabled(number < self.active))
    }

    /// Carries out the driver's commands. Returns true if there were any.
    fn obey(&mut self) -> Result<bool, QueueError> {
        for done in 0..BATCH {
            let Some((queue, _)) = &mut self.control else { return Ok(false) };
            let Some(taken) = queue.take(&mut self.buffers)? else { return Ok(done > 0) };
            let mut command = [0; 4];
            let length = self.buffers.readable.remaining();
            let read = self.buffers.readable.read(queue.memory(), &mut command[..length.min(4) as usize]);
            let memory = queue.memory().clone();
            if let Err(error) = read {
                return Err(taken.break_queue(QueueError::Ring(virtio_queue::Error::GuestMemory(error))));
            }
            let answer = if length == 4 && self.carry_out(command) { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            if self.buffers.writable.write(&memory, &[answer as u8]).is_err() {
                return Err(taken.break_queue(QueueError::NoStatus));
            }
            if let Some((queue, _)) = &mut self.control {
                queue.complete(taken, 1)?;
            }
        }
        Ok(true)
    }

    /// Carries out one command: class, command, and a number. Returns false if it is unknown or wrong.
    fn carry_out(&mut self, command: [u8; 4]) -> bool {
        let [class, command, low, high] = command;
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        let is_known =
            u32::from(class) == VIRTIO_NET_CTRL_MQ && u32::from(command) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
        if !is_known || !(1..=self.pairs.len()).contains(&pairs) {
            return false;
        }
        self.active = pairs;
        self.enable().inspect_err(|error| self.common.stats.record_error(error.to_string())).is_ok()
    }

    fn queues(&mut self) -> impl Iterator<Item = &mut ServedQueue> {
        let pairs = self.pairs.iter_mut().take(self.active).flat_map(Pair::queues);
        pairs.chain(self.control.iter_mut().map(|(queue, _)| queue))
    }

    fn work(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        self.queues().try_for_each(ServedQueue::silence_driver)?;
        loop {
            if stop.is_set() {
                return Ok(());
            }
            let mut more = self.obey()?;
            let mut wait: Option<Duration> = None;
            for pair in self.pairs.iter_mut().take(self.active) {
                for progress in [pair.send()?, pair.receive()?] {
                    match progress {
                        Progress::More => more = true,
                        Progress::Idle => {}
                        Progress::Throttled(time) => wait = Some(wait.map_or(time, |other| other.min(time))),
                    }
                }
            }
            self.queues().try_for_each(ServedQueue::notify_driver)?;
            if more {
                continue;
            }
            for pair in self.pairs.iter_mut().take(self.active) {
                more |= pair.listen()?;
            }
            if let Some((queue, _)) = &mut self.control {
                more |= queue.listen_to_driver()?;
            }
            if !more {
                if let Some(wait) = wait {
                    let set = self.timer.reset(wait.max(Duration::from_nanos(1)), None);
                    set.map_err(|error| QueueError::Host { what: "set a timer", source: error.into() })?;
                }
                return Ok(());
            }
            self.queues().try_for_each(ServedQueue::silence_driver)?;
        }
    }
}

impl Serve for Service {
    fn events(&self) -> Vec<RawFd> {
        let control = self.control.iter().map(|(_, event)| event.as_raw_fd());
        let own = [self.timer.as_raw_fd(), self.wake.as_raw_fd()];
        self.pairs.iter().flat_map(Pair::events).chain(control).chain(own).collect()
    }

    fn links(&self) -> Vec<RawFd> {
        self.pairs.iter().map(|pair| pair.link().file()).collect()
    }

    fn serve(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        self.work(stop).inspect_err(|error| self.common.stats.record_error(error.to_string()))
    }

    fn on_idle(&mut self) {
        self.pairs.iter_mut().for_each(Pair::trim);
    }
}
