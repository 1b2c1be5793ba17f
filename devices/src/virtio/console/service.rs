//! The worker's side: takes what comes on four queues, and answers as far as the driver gives buffers.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::EventFd;

use super::PortHole;
use super::control::{CONTROL_BYTES, Event, Owed};
use super::stream::Stream;
use crate::virtio::chain::Buffers;
use crate::virtio::queue::{QueueError, ServedQueue, Taken};
use crate::virtio::worker::{Serve, StopFlag};

/// Most descriptors of a chain.
const MAX_DESCRIPTORS: usize = 64;
/// Chains that are taken from a queue before the others are looked at: as many as fit into the longest.
const BATCH: usize = 8;
/// Bytes that are taken from a chain at once.
const STEP: usize = 4096;

/// The queues, each with the event by which the driver notifies it.
pub(super) struct Ends {
    pub(super) control_in: (ServedQueue, EventFd),
    pub(super) control_out: (ServedQueue, EventFd),
    pub(super) port_in: (ServedQueue, EventFd),
    pub(super) port_out: (ServedQueue, EventFd),
}

/// Everything that serving takes.
pub(super) struct Service {
    hole: Arc<dyn PortHole>,
    ends: Ends,
    news: EventFd,
    owed: Owed,
    /// Where a program of the guest's listens and has made sense so far.
    stream: Option<Stream>,
    /// Whether the host's end of the port is open.
    is_open: bool,
    buffers: Buffers,
    step: Box<[u8; STEP]>,
}

impl Service {
    pub(super) fn new(hole: Arc<dyn PortHole>, ends: Ends, news: EventFd) -> Self {
        Self {
            hole,
            ends,
            news,
            owed: Owed::default(),
            stream: None,
            is_open: true,
            buffers: Buffers::new(MAX_DESCRIPTORS),
            step: Box::new([0; STEP]),
        }
    }

    /// Takes control messages. True if there were any.
    fn take_control(&mut self, stop: &StopFlag) -> Result<bool, QueueError> {
        for done in 0..BATCH {
            let (queue, _) = &mut self.ends.control_out;
            let Some(taken) = queue.take(&mut self.buffers)? else { return Ok(done > 0) };
            let mut message = [0; CONTROL_BYTES];
            let event = if self.buffers.readable.remaining() < CONTROL_BYTES as u64 {
                None
            } else {
                match self.buffers.readable.read(queue.memory(), &mut message) {
                    Ok(()) => Event::parse(&message),
                    Err(error) => return Err(broken(taken, error)),
                }
            };
            // The driver goes on when the message is complete, and what it does then is to come later.
            match event.map_or(Ok(()), |event| self.handle(event, stop)) {
                Ok(()) => self.ends.control_out.0.complete(taken, 0)?,
                Err(error) => return Err(taken.break_queue(error)),
            }
        }
        Ok(true)
    }

    fn handle(&mut self, event: Event, stop: &StopFlag) -> Result<(), QueueError> {
        match event {
            Event::DeviceReady => self.owed.add(),
            Event::PortReady => self.owed.describe(),
            Event::PortOpen(is_open) => {
                // What was sent before belongs to who has had the port open.
                self.take_data(stop)?;
                self.stream = is_open.then(Stream::default);
                if is_open && !std::mem::replace(&mut self.is_open, true) {
                    self.owed.open();
                }
            }
        }
        Ok(())
    }

    /// Takes what the guest sends on the port. True if there was anything.
    fn take_data(&mut self, stop: &StopFlag) -> Result<bool, QueueError> {
        for done in 0..BATCH {
            let (queue, _) = &mut self.ends.port_out;
            let Some(taken) = queue.take(&mut self.buffers)? else { return Ok(done > 0) };
            while let Some(stream) = self.stream.as_mut().filter(|_| !stop.is_set()) {
                let length = self.buffers.readable.remaining().min(STEP as u64) as usize;
                if length == 0 {
                    break;
                }
                let bytes = &mut self.step[..length];
                if let Err(error) = self.buffers.readable.read(queue.memory(), bytes) {
                    return Err(broken(taken, error));
                }
                if stream.take(bytes, &*self.hole).is_err() {
                    // Nobody knows where the next message begins.
                    self.stream = None;
                    self.is_open = false;
                    self.owed.open();
                }
            }
            queue.complete(taken, 0)?;
        }
        Ok(true)
    }

    /// Sends the control messages that are owed, as far as there are buffers.
    fn send_control(&mut self) -> Result<(), QueueError> {
        let (queue, _) = &mut self.ends.control_in;
        while let Some(message) = self.owed.next() {
            let Some(taken) = queue.take(&mut self.buffers)? else { return Ok(()) };
            let bytes = message.bytes(self.is_open);
            if let Err(error) = self.buffers.writable.write(queue.memory(), &bytes) {
                return Err(broken(taken, error));
            }
            queue.complete(taken, bytes.len() as u32)?;
            self.owed.settle(message);
        }
        Ok(())
    }

    /// Sends what the host says, as far as there are buffers.
    fn send_data(&mut self) -> Result<(), QueueError> {
        let (queue, _) = &mut self.ends.port_in;
        let Some(stream) = &mut self.stream else { return Ok(()) };
        let hole = self.hole.hole();
        loop {
            let pending = stream.pending(&hole);
            if pending.is_empty() {
                return Ok(());
            }
            let Some(taken) = queue.take(&mut self.buffers)? else { return Ok(()) };
            // Of a buffer without any room one byte is wanted too: a driver that gives such without end would
            // keep the worker busy with nothing.
            let room = self.buffers.writable.remaining().clamp(1, pending.len() as u64) as usize;
            if let Err(error) = self.buffers.writable.write(queue.memory(), &pending[..room]) {
                return Err(broken(taken, error));
            }
            queue.complete(taken, room as u32)?;
            stream.sent(room);
        }
    }

    /// Whether there is something to be sent that waits for a buffer.
    fn waits(&mut self) -> (bool, bool) {
        let hole = self.hole.hole();
        let data = self.stream.as_mut().is_some_and(|stream| !stream.pending(&hole).is_empty());
        (self.owed.next().is_some(), data)
    }
}

/// A chain has no room for a message, or lies outside guest memory.
fn broken(taken: Taken, error: GuestMemoryError) -> QueueError {
    taken.break_queue(QueueError::Ring(virtio_queue::Error::GuestMemory(error)))
}

impl Ends {
    fn all(&mut self) -> [&mut (ServedQueue, EventFd); 4] {
        [&mut self.control_in, &mut self.control_out, &mut self.port_in, &mut self.port_out]
    }
}

impl Serve for Service {
    fn events(&self) -> Vec<RawFd> {
        let Ends { control_in, control_out, port_in, port_out } = &self.ends;
        let notified = [control_in, control_out, port_in, port_out].map(|(_, event)| event.as_raw_fd());
        notified.into_iter().chain([self.news.as_raw_fd()]).collect()
    }

    fn serve(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        while !stop.is_set() {
            for (queue, _) in self.ends.all() {
                queue.silence_driver()?;
            }
            let mut more = true;
            while more && !stop.is_set() {
                more = self.take_control(stop)?;
                more |= self.take_data(stop)?;
                self.send_control()?;
                self.send_data()?;
                for (queue, _) in self.ends.all() {
                    queue.notify_driver()?;
                }
            }
            // Buffers are of interest where something waits for them.
            let (control, data) = self.waits();
            let mut more = self.ends.control_out.0.listen_to_driver()?;
            more |= self.ends.port_out.0.listen_to_driver()?;
            more |= control && self.ends.control_in.0.listen_to_driver()?;
            more |= data && self.ends.port_in.0.listen_to_driver()?;
            if !more {
                break;
            }
        }
        Ok(())
    }

    fn rest(&mut self) {}
}
