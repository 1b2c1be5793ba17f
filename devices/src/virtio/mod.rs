//! Virtio devices (virtio 1.2, modern interface only).
//!
//! Three parts, kept apart:
//! - [`mmio::MmioTransport`] speaks to the driver through registers. It owns what lasts: status, negotiated
//!   features, queue addresses.
//! - A [`VirtioDevice`] is one kind of device. It starts when the driver is ready ([`VirtioDevice::activate`])
//!   and forgets the driver at [`VirtioDevice::reset`].
//! - The queues (`virtio_queue::Queue`) hold ring positions. They live from activation to reset, and belong
//!   to the device's worker alone.
//!
//! # Locking
//! A vCPU holds the transport while it accesses a register, so a worker never asks for the transport. It
//! tells the driver through [`Interrupt`], which is lock-free. That matters because a worker's write to
//! guest memory may block for a moment, while the host has the page write-protected.
//!
//! # Errors
//! A request that makes no sense is answered with an error status. A ring or chain that makes no sense
//! (there is nowhere to put a status) breaks the device: DEVICE_NEEDS_RESET is set, the driver is told by a
//! configuration interrupt, and the device rests until it is reset.
//!
//! Guest memory that the host cannot supply reads as zeros, after a flag was set
//! ([`mmio::MmioTransport::set_memory_lost_flag`]). It is looked at after guest memory was read and before
//! that has consequences: no such request goes to a disk's image from a buffer, and none is completed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;

pub mod block;
mod chain;
pub mod console;
pub mod mmio;
mod queue;
#[cfg(test)]
mod testing;
mod worker;

/// Features of every device here, as the transport and the split rings provide them.
pub const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// One kind of virtio device behind a transport.
///
/// All methods are called with the transport held, by a vCPU thread or by the VMM.
pub trait VirtioDevice: Send {
    /// Device ID (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// Feature bits that the device offers beyond [`RING_FEATURES`].
    fn features(&self) -> u64;

    /// Largest size of each queue, in descriptors. Powers of two, 32768 at most.
    fn queue_sizes(&self) -> &[u16];

    /// The device's configuration space, as far as it goes; [`read_config`] serves an access to it.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes configuration space. Most devices have nothing writable there.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Changes whenever the configuration space does (virtio 1.2, section 2.5).
    fn config_generation(&self) -> u32 {
        0
    }

    /// The driver is ready (DRIVER_OK): starts to serve the queues. The device was new or reset before.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops to serve: on return no thread touches guest memory or the queues for this device. Requests in
    /// flight have been completed or have failed. A device that is not active has nothing to do.
    fn reset(&mut self);
}

/// What a device gets to work with from DRIVER_OK to reset.
pub struct Activation {
    /// Guest memory, which the rings and buffers lie in.
    pub memory: GuestMemory,
    /// Negotiated feature bits, [`RING_FEATURES`] among them.
    pub features: u64,
    /// The queues that the driver made ready, by ascending index.
    pub queues: Vec<ActiveQueue>,
    /// How the device reaches the driver.
    pub interrupt: Arc<Interrupt>,
}

/// A queue that the driver has set up.
pub struct ActiveQueue {
    /// Its number.
    pub index: usize,
    /// The rings, found to lie in guest memory.
    pub queue: Queue,
    /// Becomes readable when the driver notifies the queue.
    pub event: EventFd,
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver said DRIVER_OK without a queue that the device needs.
    #[error("start a virtio device: the driver has not set up queue {0}")]
    QueueNotReady(usize),
    /// A worker thread or its events could not be had.
    #[error("start the worker of a virtio device: {0}")]
    Worker(#[source] io::Error),
    /// An earlier worker died and took the device's back end along.
    #[error("start a virtio device: its back end was lost with an earlier worker; restart the VM")]
    BackendLost,
}

/// How a device and its workers reach the driver: the interrupt line, its cause, and DEVICE_NEEDS_RESET.
///
/// Shared between transport and workers; free of locks.
#[derive(Debug)]
pub struct Interrupt {
    event: EventFd,
    status: AtomicU32,
    needs_reset: AtomicBool,
    /// Guest memory has lost a part, which reads as zeros until its VM has ended.
    memory_lost: Arc<AtomicBool>,
}

impl Interrupt {
    pub(crate) fn new(event: EventFd) -> Self {
        Self {
            event,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            memory_lost: Arc::default(),
        }
    }

    pub(crate) fn set_memory_lost_flag(&mut self, flag: Arc<AtomicBool>) {
        self.memory_lost = flag;
    }

    /// Whether what was read from guest memory before may be nobody's content.
    pub(crate) fn memory_lost(&self) -> bool {
        self.memory_lost.load(Ordering::SeqCst)
    }

    /// Buffers were used in some queue.
    pub fn signal_used(&self) {
        self.signal(VIRTIO_MMIO_INT_VRING);
    }

    /// The configuration space or the device's status changed.
    pub fn signal_config(&self) {
        self.signal(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The device cannot go on before the driver resets it.
    pub fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.signal_config();
    }

    fn signal(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::AcqRel);
        // The one failure of an event counter is that it is full: then an interrupt is pending as it is.
        let _ = self.event.write(1);
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

    /// Only while no worker runs.
    pub(crate) fn clear(&self) {
        self.status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }
}

/// Serves a read of configuration space: what lies beyond `config` reads as zeroes.
pub fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(config) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) else {
        return;
    };
    let len = config.len().min(data.len());
    data[..len].copy_from_slice(&config[..len]);
}
