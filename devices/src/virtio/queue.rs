//! A queue in service: requests are taken from its available ring and completed into its used ring.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::{mem, thread};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::Interrupt;
use super::chain::{Buffers, ChainError};
use crate::GuestMemory;
use crate::disk::channel::ChannelLost;

/// Why a queue cannot be served any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    /// The rings make no sense.
    #[error("serve a virtio queue: {0}; the driver must reset the device")]
    Ring(#[from] virtio_queue::Error),
    /// A request makes so little sense that it cannot be answered.
    #[error("serve a virtio queue: {0}; the driver must reset the device")]
    Chain(#[from] ChainError),
    /// A request has no status byte that the device could write.
    #[error(
        "serve a virtio queue: a request has no status byte in guest memory; the driver must reset the device"
    )]
    NoStatus,
    /// Guest memory has lost a part.
    #[error("serve a virtio queue: the host has lost a part of guest memory; the VM must end")]
    MemoryLost,
    /// What lies behind the device is gone.
    #[error(transparent)]
    Channel(#[from] ChannelLost),
}

/// A request that was taken from the available ring and is owed to the used ring.
///
/// It ends in [`ServedQueue::complete`], or in [`Taken::break_queue`] when the whole queue ends with it.
#[must_use = "a request must be completed"]
#[derive(Debug)]
pub(crate) struct Taken {
    head: u16,
    settled: bool,
}

impl Taken {
    /// Gives the request up because the queue cannot be served any more.
    pub(crate) fn break_queue(mut self, reason: QueueError) -> QueueError {
        self.settled = true;
        reason
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        debug_assert!(
            self.settled || thread::panicking(),
            "request {} was dropped without completion",
            self.head
        );
    }
}

/// One queue, owned by the worker that serves it.
pub(crate) struct ServedQueue {
    queue: Queue,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    /// Requests were completed that the driver has not been told of.
    unannounced: bool,
}

impl ServedQueue {
    pub(crate) fn new(queue: Queue, memory: GuestMemory, interrupt: Arc<Interrupt>) -> Self {
        Self { queue, memory, interrupt, unannounced: false }
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Checks that what was read from guest memory so far is the guest's.
    pub(crate) fn check_memory(&self) -> Result<(), QueueError> {
        if self.interrupt.memory_lost() { Err(QueueError::MemoryLost) } else { Ok(()) }
    }

    /// Takes the next request and loads its buffers; none when the available ring is empty.
    pub(crate) fn take(&mut self, buffers: &mut Buffers) -> Result<Option<Taken>, QueueError> {
        let Some(chain) = self.queue.iter(&self.memory)?.next() else {
            return Ok(None);
        };
        let head = chain.head_index();
        buffers.load(&self.memory, chain)?;
        self.check_memory()?;
        Ok(Some(Taken { head, settled: false }))
    }

    /// Returns a request to the driver; the device wrote `written` bytes into its buffers.
    pub(crate) fn complete(&mut self, mut taken: Taken, written: u32) -> Result<(), QueueError> {
        if let Err(lost) = self.check_memory() {
            return Err(taken.break_queue(lost));
        }
        taken.settled = true;
        self.unannounced = true;
        Ok(self.queue.add_used(&self.memory, taken.head, written)?)
    }

    /// Raises the interrupt, if requests were completed that the driver wants to know of.
    pub(crate) fn notify_driver(&mut self) -> Result<(), QueueError> {
        if mem::take(&mut self.unannounced)
            && self.queue.needs_notification(&self.memory)?
            && !self.interrupts_are_off()?
        {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// Without EVENT_IDX a driver asks for silence by a flag in the available ring.
    fn interrupts_are_off(&self) -> Result<bool, QueueError> {
        if self.queue.event_idx_enabled() {
            return Ok(false);
        }
        let flags: u16 = self
            .memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 != 0)
    }

    /// Asks the driver not to notify while the queue is looked at anyway.
    pub(crate) fn silence_driver(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(&self.memory)?)
    }

    /// Asks the driver to notify again. True if requests have come in meanwhile.
    pub(crate) fn listen_to_driver(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(&self.memory)?)
    }
}
