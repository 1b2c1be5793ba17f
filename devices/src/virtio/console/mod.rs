//! Virtio console device (virtio 1.2, section 5.3) with one port, over which a guest that cannot map its
//! memory hole says what its pages are for. Stock kernels drive it: Linux shows the port as a character
//! device, `/dev/vport0p1`, and its name below `/sys/class/virtio-ports`.
//!
//! The stream is that of [`samepage_hole::port`]. What the guest sends is written into the [`Hole`], as the
//! guest itself would have written it, and read there by the same engine. There is no console: port 0, which
//! the numbers of queues provide for, is never added.
//!
//! | queue | what |
//! | --- | --- |
//! | 0, 1 | port 0; not served |
//! | 2, 3 | control messages, to the driver and from it |
//! | 4, 5 | port 1, to the driver and from it |
//!
//! One worker thread serves them all. It holds a few KiB, whatever the guest does.
//!
//! # Errors
//! A stream that makes no sense closes the port: the driver is told so, and what comes after is thrown away
//! until the guest opens the port again. Control messages that make no sense are ignored. A ring or chain
//! that makes no sense, or a buffer outside guest memory, breaks the device until it is reset.

use std::sync::Arc;

use samepage_hole::Hole;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::EventFd;

use super::queue::ServedQueue;
use super::worker::Worker;
use super::{ActivateError, Activation, ActiveQueue, VirtioDevice, read_config};

mod control;
mod service;
mod stream;
#[cfg(test)]
mod tests;

use service::{Ends, Service};

/// The driver knows several ports and control messages.
const VIRTIO_CONSOLE_F_MULTIPORT: u32 = 1;
/// Ports that there could be: numbers 0 and 1.
const PORTS: u32 = 2;
/// Number of the port.
const PORT: u32 = 1;

const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;
const PORT_IN: usize = 4;
const PORT_OUT: usize = 5;
/// Drivers fill the queues to them with a page for each descriptor, so these are short.
const QUEUE_SIZES: [u16; 6] = [2, 2, 8, 8, 4, 8];

/// What lies behind the port.
pub trait PortHole: Send + Sync {
    /// The memory for what the guest says. The guest itself does not reach it.
    fn hole(&self) -> Hole<'_>;

    /// Tells that there is news in it. Guests make that happen as often as they like: it must not wait, and
    /// cost no more the more often it is called.
    fn ring(&self);
}

/// A virtio console device with a port to a memory hole.
pub struct Console {
    thread_name: String,
    hole: Arc<dyn PortHole>,
    news: EventFd,
    worker: Option<Worker>,
}

impl Console {
    /// The device of the VM `vm`. `news` is to be written whenever the host's header in the hole changes, so
    /// that the guest is told.
    pub fn new(vm: &str, hole: Arc<dyn PortHole>, news: EventFd) -> Self {
        // A zero byte would end the thread's name early.
        Self { thread_name: format!("port-{vm}").replace('\0', "?"), hole, news, worker: None }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_CONSOLE_F_MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `struct virtio_console_config`: a size in characters, which no port here has, then the number of
        // ports.
        let mut config = [0; 8];
        config[4..].copy_from_slice(&PORTS.to_le_bytes());
        read_config(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, mut queues, interrupt } = activation;
        if features & (1 << VIRTIO_CONSOLE_F_MULTIPORT) == 0 {
            // Without control messages there is no port.
            return Err(ActivateError::QueueNotReady(CONTROL_IN));
        }
        let mut end = |index| {
            let place = queues.iter().position(|queue| queue.index == index);
            let place = place.ok_or(ActivateError::QueueNotReady(index))?;
            let ActiveQueue { queue, event, .. } = queues.swap_remove(place);
            Ok((ServedQueue::new(queue, memory.clone(), interrupt.clone()), event))
        };
        let ends = Ends {
            control_in: end(CONTROL_IN)?,
            control_out: end(CONTROL_OUT)?,
            port_in: end(PORT_IN)?,
            port_out: end(PORT_OUT)?,
        };
        let news = self.news.try_clone().map_err(ActivateError::Worker)?;
        let hole = self.hole.clone();
        let make = move || Ok(Service::new(hole, ends, news));
        let worker =
            Worker::spawn(self.thread_name.clone(), interrupt, make).map_err(ActivateError::Worker)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if self.worker.take().is_some() {
            // Whoever comes next has said nothing yet.
            self.hole.hole().clear_guest_header();
            self.hole.ring();
        }
    }
}
