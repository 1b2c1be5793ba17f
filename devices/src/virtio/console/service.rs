//! Serves the four queues, and answers as far as the driver provides buffers.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::EventFd;

use super::PortHole;
use super::control::{CONTROL_BYTES, Event, Outstanding};
use super::stream::Stream;
use crate::virtio::chain::Buffers;
use crate::virtio::queue::{QueueError, ServedQueue, Taken};
use crate::virtio::worker::{Serve, StopFlag};

/// Limit for descriptors in a chain.
const MAX_DESCRIPTORS: usize = 64;
/// Number of chains to take from a queue before the other queues are checked: the length of the longest
/// queue.
const BATCH: usize = 8;
/// Number of bytes to take from a chain at once.
const STEP: usize = 4096;

/// The queues, each with the driver's notification event.
pub(super) struct Ends {
    pub(super) control_in: (ServedQueue, EventFd),
    pub(super) control_out: (ServedQueue, EventFd),
    pub(super) port_in: (ServedQueue, EventFd),
    pub(super) port_out: (ServedQueue, EventFd),
}

/// The resources for serving the device.
pub(super) struct Service {
    hole: Arc<dyn PortHole>,
    ends: Ends,
    news: EventFd,
    outstanding: Outstanding,
    /// The open stream; `None` if the port is closed or its stream was invalid.
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
            outstanding: Outstanding::default(),
            stream: None,
            is_open: true,
            buffers: Buffers::new(MAX_DESCRIPTORS),
            step: Box::new([0; STEP]),
        }
    }

    /// Takes control messages. Returns true if there were any.
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
            // The driver continues when the message is complete, so handle the message first.
            match event.map_or(Ok(()), |event| self.handle(event, stop)) {
                Ok(()) => self.ends.control_out.0.complete(taken, 0)?,
                Err(error) => return Err(taken.break_queue(error)),
            }
        }
        Ok(true)
    }

    fn handle(&mut self, event: Event, stop: &StopFlag) -> Result<(), QueueError> {
        match event {
            Event::DeviceReady => self.outstanding.add(),
            Event::PortReady => self.outstanding.describe(),
            Event::PortOpen(is_open) => {
                // Earlier data belongs to the previous user of the port.
                self.take_data(stop)?;
                self.stream = is_open.then(Stream::default);
                if is_open && !std::mem::replace(&mut self.is_open, true) {
                    self.outstanding.open();
                }
            }
        }
        Ok(())
    }

    /// Takes data from the guest. Returns true if there was any.
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
                    // The start of the next message is unknown.
                    self.stream = None;
                    self.is_open = false;
                    self.outstanding.open();
                }
            }
            queue.complete(taken, 0)?;
        }
        Ok(true)
    }

    /// Sends outstanding control messages, as far as there are buffers.
    fn send_control(&mut self) -> Result<(), QueueError> {
        let (queue, _) = &mut self.ends.control_in;
        while let Some(message) = self.outstanding.next() {
            let Some(taken) = queue.take(&mut self.buffers)? else { return Ok(()) };
            let bytes = message.bytes(self.is_open);
            if let Err(error) = self.buffers.writable.write(queue.memory(), &bytes) {
                return Err(broken(taken, error));
            }
            queue.complete(taken, bytes.len() as u32)?;
            self.outstanding.remove(message);
        }
        Ok(())
    }

    /// Sends the host's data, as far as there are buffers.
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
            // Require one byte even from an empty buffer. Otherwise a driver that provides empty buffers
            // without end would keep the worker busy.
            let room = self.buffers.writable.remaining().clamp(1, pending.len() as u64) as usize;
            if let Err(error) = self.buffers.writable.write(queue.memory(), &pending[..room]) {
                return Err(broken(taken, error));
            }
            queue.complete(taken, room as u32)?;
            stream.sent(room);
        }
    }

    /// Returns whether control messages and data wait for a buffer.
    fn waits(&mut self) -> (bool, bool) {
        let hole = self.hole.hole();
        let data = self.stream.as_mut().is_some_and(|stream| !stream.pending(&hole).is_empty());
        (self.outstanding.next().is_some(), data)
    }
}

/// Returns the error for a chain that has no room for a message or lies outside guest memory.
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
            // Ask for buffers only where something waits for them.
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

    fn on_idle(&mut self) {}
}
