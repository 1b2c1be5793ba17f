//! Virtio devices (virtio 1.2, modern interface only).
//!
//! There are three separate parts:
//! - A transport, [`mmio::MmioTransport`] or [`pci::PciTransport`], is the registers that the driver uses. It owns
//!   the lasting state: status, negotiated features and queue addresses.
//! - A [`VirtioDevice`] is one kind of device. It starts when the driver is ready
//!   ([`VirtioDevice::activate`]) and drops the driver's state at [`VirtioDevice::reset`].
//! - The queues (`virtio_queue::Queue`) hold ring positions. They live from activation to reset, and belong
//!   only to the device's worker.
//!
//! # Locking
//! A vCPU holds the transport while it accesses a register, so a worker never uses the transport. A worker
//! notifies the driver through [`Interrupt`], whose locks nobody holds while waiting. This matters because a worker's
//! write to guest memory may block briefly while the engine has the page write-protected.
//!
//! # Errors
//! An invalid request gets an error status. An invalid ring or chain has no place for a status, so it breaks
//! the device. The device sets DEVICE_NEEDS_RESET, notifies the driver with a configuration interrupt, and
//! stops until the reset.
//!
//! If the host cannot supply guest memory, it sets a flag ([`mmio::MmioTransport::set_memory_lost_flag`]),
//! and the memory then reads as zeros. Workers check the flag between reading guest memory and using the
//! content. After a loss, no request writes such content to a disk's image, and none completes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use messages::Messages;
use queue::ServedQueue;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;

pub mod balloon;
pub mod block;
mod chain;
pub mod console;
pub mod messages;
pub mod mmio;
pub mod net;
pub mod pci;
#[cfg(test)]
mod probe;
mod queue;
pub mod rng;
#[cfg(test)]
mod testing;
mod transport;
pub mod vsock;
mod worker;

/// Features of every device here. The transport and the split rings provide them.
pub const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// One kind of virtio device behind a transport.
///
/// The caller of any method holds the transport. Callers are vCPU threads and the VMM.
pub trait VirtioDevice: Send {
    /// Returns the device ID (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// Returns the feature bits that the device offers in addition to [`RING_FEATURES`].
    fn features(&self) -> u64;

    /// Returns the largest size of each queue in descriptors: powers of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the device's configuration space. [`read_config`] helps with bounds.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Handles a write to the configuration space. Most devices have no writable fields.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Returns a number that changes with the configuration space (virtio 1.2, section 2.5).
    fn config_generation(&self) -> u32 {
        0
    }

    /// Starts to serve the queues, because the driver is ready (DRIVER_OK). The device is new or was reset
    /// before.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops serving. On return, no thread accesses guest memory or the queues for this device. Requests in
    /// flight have completed or failed. Does nothing if the device is not active.
    fn reset(&mut self);
}

/// The resources of a device from DRIVER_OK to reset.
pub struct Activation {
    /// Guest memory, which contains the rings and buffers.
    pub memory: GuestMemory,
    /// Negotiated feature bits, including [`RING_FEATURES`].
    pub features: u64,
    /// The queues that the driver made ready, by ascending index.
    pub queues: Vec<ActiveQueue>,
    /// The connection to the driver.
    pub interrupt: Arc<Interrupt>,
}

impl Activation {
    /// Takes a queue out, to be served, with the event by which the driver notifies it.
    ///
    /// # Errors
    /// Fails if the driver has not set it up, or it was taken before.
    fn take(&mut self, index: usize) -> Result<(ServedQueue, EventFd), ActivateError> {
        let place = self.queues.iter().position(|queue| queue.index == index);
        let place = place.ok_or(ActivateError::QueueNotReady(index))?;
        let ActiveQueue { queue, event, .. } = self.queues.swap_remove(place);
        let served = ServedQueue::new(queue, self.memory.clone(), self.interrupt.clone());
        Ok((served.with_index(index), event))
    }
}

/// A queue that the driver has set up.
pub struct ActiveQueue {
    /// The index of the queue.
    pub index: usize,
    /// The rings, which lie in guest memory.
    pub queue: Queue,
    /// Becomes readable when the driver notifies the queue.
    pub event: EventFd,
}

/// The reason why a device could not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver set DRIVER_OK without a required queue.
    #[error("start a virtio device: the driver has not set up queue {0}")]
    QueueNotReady(usize),
    /// A worker thread or its events could not be created.
    #[error("start the worker of a virtio device: {0}")]
    Worker(#[source] io::Error),
    /// An earlier worker died and took the device's back end with it.
    #[error("start a virtio device: its back end was lost with an earlier worker; restart the VM")]
    BackendLost,
}

/// The connection from a device and its workers to the driver: the interrupt line, its cause, and
/// DEVICE_NEEDS_RESET.
///
/// Transport and workers share it.
#[derive(Debug)]
pub struct Interrupt {
    line: Line,
    status: AtomicU32,
    needs_reset: AtomicBool,
    /// Whether the host has lost a part of guest memory, which reads as zeros until the VM has ended.
    memory_lost: Arc<AtomicBool>,
}

/// How an interrupt gets to the guest.
#[derive(Debug)]
enum Line {
    /// An input of the interrupt controllers. The driver reads the cause.
    Pin(EventFd),
    /// Messages, each for some causes.
    Messages(Arc<Messages>),
}

impl Interrupt {
    pub(crate) fn new(event: EventFd) -> Self {
        Self::on(Line::Pin(event))
    }

    pub(crate) fn of_messages(messages: Arc<Messages>) -> Self {
        Self::on(Line::Messages(messages))
    }

    fn on(line: Line) -> Self {
        Self {
            line,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            memory_lost: Arc::default(),
        }
    }

    pub(crate) fn set_memory_lost_flag(&mut self, flag: Arc<AtomicBool>) {
        self.memory_lost = flag;
    }

    /// Returns whether data that was read from guest memory may be content that the guest never wrote.
    pub(crate) fn memory_lost(&self) -> bool {
        self.memory_lost.load(Ordering::SeqCst)
    }

    /// Notifies the driver of used buffers in some queue. A driver that has a message for each queue gets all.
    pub fn signal_used(&self) {
        self.status.fetch_or(VIRTIO_MMIO_INT_VRING, Ordering::AcqRel);
        match &self.line {
            Line::Pin(event) => raise(event),
            Line::Messages(messages) => messages.signal_all_queues(),
        }
    }

    /// Notifies the driver of used buffers in the queue of this index.
    pub fn signal_queue(&self, queue: usize) {
        self.status.fetch_or(VIRTIO_MMIO_INT_VRING, Ordering::AcqRel);
        match &self.line {
            Line::Pin(event) => raise(event),
            Line::Messages(messages) => messages.signal_queue(queue),
        }
    }

    /// Notifies the driver of a change of the configuration space or the device's status.
    pub fn signal_config(&self) {
        self.status.fetch_or(VIRTIO_MMIO_INT_CONFIG, Ordering::AcqRel);
        match &self.line {
            Line::Pin(event) => raise(event),
            Line::Messages(messages) => messages.signal_config(),
        }
    }

    /// Tells the driver that the device cannot continue without a reset.
    pub fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.signal_config();
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(crate) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(crate) fn acknowledge(&self, causes: u32) {
        self.status.fetch_and(!causes, Ordering::AcqRel);
    }

    /// Clears the state. To be called only while no worker runs.
    pub(crate) fn clear(&self) {
        self.status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }
}

fn raise(event: &EventFd) {
    // Writing fails only if the event counter is full. Then an interrupt is pending anyway.
    let _ = event.write(1);
}

/// Serves a read of configuration space. Bytes beyond `config` read as zeros.
pub fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(config) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) else {
        return;
    };
    let len = config.len().min(data.len());
    data[..len].copy_from_slice(&config[..len]);
}
