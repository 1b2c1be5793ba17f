//! Virtio console device (virtio 1.2, section 5.3) with one port, the substitute for a memory hole. A guest
//! that cannot map its memory hole sends its page flags through the port. Standard kernels support the
//! device: Linux shows the port as a character device, `/dev/vport0p1`, and its name below
//! `/sys/class/virtio-ports`.
//!
//! The stream has the format of [`samepage_hole::port`]. The device writes the guest's data into the
//! [`Hole`], as the guest would, and the same engine reads it there. There is no console: port 0, which the
//! numbering of queues requires, is never added.
//!
//! | queue | purpose |
//! | --- | --- |
//! | 0, 1 | port 0; not served |
//! | 2, 3 | control messages to and from the driver |
//! | 4, 5 | port 1, to and from the driver |
//!
//! One worker thread serves all queues. It needs a few KiB of memory, whatever the guest does.
//!
//! # Errors
//! An invalid stream closes the port. The driver is told, and later data is dropped until the guest opens the
//! port again. Invalid control messages are ignored. An invalid ring or chain, or a buffer outside guest
//! memory, breaks the device until it is reset.

use std::sync::Arc;

use samepage_hole::Hole;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::EventFd;

use super::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice, read_config};

mod control;
mod service;
mod stream;
#[cfg(test)]
mod tests;

use service::{Ends, Service};

/// The driver supports several ports and control messages.
const VIRTIO_CONSOLE_F_MULTIPORT: u32 = 1;
/// Number of possible ports: 0 and 1.
const PORTS: u32 = 2;
/// Number of the port.
const PORT: u32 = 1;

const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;
const PORT_IN: usize = 4;
const PORT_OUT: usize = 5;
/// Queues are short, because drivers fill them with a page for each descriptor.
const QUEUE_SIZES: [u16; 6] = [2, 2, 8, 8, 4, 8];

/// The back end of the port.
pub trait PortHole: Send + Sync {
    /// Returns the memory for the guest's page flags. The guest cannot access this memory.
    fn hole(&self) -> Hole<'_>;

    /// Notifies the engine of new page flags. Guests can cause this at any rate. So the call must not wait,
    /// and frequent calls must not cost more in total.
    fn ring(&self);
}

/// A virtio console device with a port that serves as a memory hole.
pub struct Console {
    thread_name: String,
    hole: Arc<dyn PortHole>,
    news: EventFd,
    worker: Option<Worker>,
}

impl Console {
    /// Returns the device of the VM `vm`. Whoever changes the host's header in the hole must write `news`, so
    /// that the device tells the guest.
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
        // `struct virtio_console_config`: a size in characters, which no port has here, then the number of
        // ports.
        let mut config = [0; 8];
        config[4..].copy_from_slice(&PORTS.to_le_bytes());
        read_config(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        if activation.features & (1 << VIRTIO_CONSOLE_F_MULTIPORT) == 0 {
            // A port requires control messages.
            return Err(ActivateError::QueueNotReady(CONTROL_IN));
        }
        let ends = Ends {
            control_in: activation.take(CONTROL_IN)?,
            control_out: activation.take(CONTROL_OUT)?,
            port_in: activation.take(PORT_IN)?,
            port_out: activation.take(PORT_OUT)?,
        };
        let news = self.news.try_clone().map_err(ActivateError::Worker)?;
        let hole = self.hole.clone();
        let make = move || Ok(Service::new(hole, ends, news));
        let worker = Worker::spawn(self.thread_name.clone(), activation.interrupt, make)
            .map_err(ActivateError::Worker)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if self.worker.take().is_some() {
            // The next user of the port has sent nothing yet.
            self.hole.hole().clear_guest_header();
            self.hole.ring();
        }
    }
}
