//! A queue in service: takes requests from the available ring and completes them into the used ring.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::{io, mem, thread};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::Interrupt;
use super::chain::{Buffers, ChainError};
use crate::GuestMemory;
use crate::disk::channel::ChannelLost;

/// Flags and index at the start of a ring, in bytes.
const RING_HEADER_BYTES: u64 = 4;
/// Length of an element of the used ring.
const USED_BYTES: usize = 8;

/// The reason why a queue cannot be served any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    /// The rings are invalid.
    #[error("serve a virtio queue: {0}; the driver must reset the device")]
    Ring(#[from] virtio_queue::Error),
    /// A request is so invalid that it cannot be answered.
    #[error("serve a virtio queue: {0}; the driver must reset the device")]
    Chain(#[from] ChainError),
    /// A request has no status byte that the device can write.
    #[error(
        "serve a virtio queue: a request has no status byte in guest memory; the driver must reset the device"
    )]
    NoStatus,
    /// The driver's buffers have no room for a frame, or lie outside guest memory.
    #[error(
        "serve a virtio queue: the buffers for a frame have no room in guest memory; the driver must reset the \
         device"
    )]
    NoRoom,
    /// The host has lost a part of guest memory.
    #[error("serve a virtio queue: the host has lost a part of guest memory; the VM must end")]
    MemoryLost,
    /// The host could not do its part.
    #[error("serve a virtio queue: {what}: {source}; the driver must reset the device")]
    Host {
        /// The step that failed.
        what: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
    /// The device's back end is gone.
    #[error(transparent)]
    Channel(#[from] ChannelLost),
}

/// A request that was taken from the available ring and not yet put into the used ring.
///
/// It ends in [`ServedQueue::complete`], or in [`Taken::break_queue`] together with the whole queue.
#[must_use = "a request must be completed"]
#[derive(Debug)]
pub(crate) struct Taken {
    head: u16,
    is_finished: bool,
}

impl Taken {
    /// Drops the request, because the queue cannot be served any more.
    pub(crate) fn break_queue(mut self, reason: QueueError) -> QueueError {
        self.is_finished = true;
        reason
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        debug_assert!(
            self.is_finished || thread::panicking(),
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
    /// The index of the queue, if the driver can have a message for it alone.
    index: Option<usize>,
    /// Whether requests were completed since the last notification of the driver.
    unannounced: bool,
    /// The index of the used ring at that time.
    announced: u16,
}

impl ServedQueue {
    pub(crate) fn new(queue: Queue, memory: GuestMemory, interrupt: Arc<Interrupt>) -> Self {
        let announced = queue.next_used();
        Self { queue, memory, interrupt, index: None, unannounced: false, announced }
    }

    /// Says which queue it is, so that its completions interrupt the driver for no other queue.
    pub(crate) fn with_index(self, index: usize) -> Self {
        Self { index: Some(index), ..self }
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Fails if data that was read from guest memory may be content that the guest never wrote.
    pub(crate) fn check_memory(&self) -> Result<(), QueueError> {
        if self.interrupt.memory_lost() { Err(QueueError::MemoryLost) } else { Ok(()) }
    }

    /// Reads the next bytes of a request. If they are not in guest memory, or may be none that the guest wrote, the
    /// request is dropped, and the queue cannot be served any more.
    pub(crate) fn read(
        &self,
        buffers: &mut Buffers,
        taken: Taken,
        to: &mut [u8],
    ) -> Result<Taken, QueueError> {
        let read = buffers.readable.read(&self.memory, to);
        let read = read.map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)));
        match read.and_then(|()| self.check_memory()) {
            Ok(()) => Ok(taken),
            Err(error) => Err(taken.break_queue(error)),
        }
    }

    /// Takes the next request and loads its buffers. Returns `None` if the available ring is empty.
    pub(crate) fn take(&mut self, buffers: &mut Buffers) -> Result<Option<Taken>, QueueError> {
        let Some(chain) = self.queue.iter(&self.memory)?.next() else {
            return Ok(None);
        };
        let head = chain.head_index();
        buffers.load(&self.memory, chain)?;
        self.check_memory()?;
        Ok(Some(Taken { head, is_finished: false }))
    }

    /// Returns a request to the driver, with the number of bytes that the device wrote into its buffers.
    pub(crate) fn complete(&mut self, mut taken: Taken, written: u32) -> Result<(), QueueError> {
        if let Err(lost) = self.check_memory() {
            return Err(taken.break_queue(lost));
        }
        taken.is_finished = true;
        self.unannounced = true;
        Ok(self.queue.add_used(&self.memory, taken.head, written)?)
    }

    /// Returns requests to the driver all at once, each with the number of bytes that the device wrote. So the
    /// driver never sees some of them without the others.
    pub(crate) fn complete_together(&mut self, mut done: Vec<(Taken, u32)>) -> Result<(), QueueError> {
        let lost = self.check_memory();
        // They end here, in either way.
        done.iter_mut().for_each(|(taken, _)| taken.is_finished = true);
        lost?;
        let Some((last, others)) = done.split_last() else { return Ok(()) };
        // The driver looks at no element before the index behind the last one is written.
        let first = self.queue.next_used();
        let size = self.queue.size();
        for (place, (taken, written)) in (0_u16..).zip(others) {
            let slot = u64::from(first.wrapping_add(place) % size);
            let offset = RING_HEADER_BYTES + slot * USED_BYTES as u64;
            let address = self.queue.used_ring().checked_add(offset).map(GuestAddress);
            let address = address.ok_or(virtio_queue::Error::AddressOverflow)?;
            let mut element = [0; USED_BYTES];
            element[..4].copy_from_slice(&u32::from(taken.head).to_le_bytes());
            element[4..].copy_from_slice(&written.to_le_bytes());
            self.memory.write_slice(&element, address).map_err(virtio_queue::Error::GuestMemory)?;
        }
        self.queue.set_next_used(first.wrapping_add(others.len() as u16));
        self.unannounced = true;
        Ok(self.queue.add_used(&self.memory, last.0.head, last.1)?)
    }

    /// Returns the number of descriptors.
    pub(crate) fn size(&self) -> usize {
        usize::from(self.queue.size())
    }

    /// Raises the interrupt, if the driver wants to know of the completed requests.
    pub(crate) fn notify_driver(&mut self) -> Result<(), QueueError> {
        if mem::take(&mut self.unannounced) && self.wants_interrupt()? {
            match self.index {
                Some(index) => self.interrupt.signal_queue(index),
                None => self.interrupt.signal_used(),
            }
        }
        Ok(())
    }

    /// Returns whether the driver wants an interrupt for what was completed since this was asked last
    /// (virtio 1.2, section 2.7.10): with EVENT_IDX, if the request that it names is among it; otherwise, if it
    /// has not set the flag against interrupts.
    fn wants_interrupt(&mut self) -> Result<bool, QueueError> {
        let next = self.queue.next_used();
        let announced = mem::replace(&mut self.announced, next);
        // The driver writes what it wants, and then looks at the index once more.
        fence(Ordering::SeqCst);
        let offset = match self.queue.event_idx_enabled() {
            true => RING_HEADER_BYTES + u64::from(self.queue.size()) * size_of::<u16>() as u64,
            false => 0,
        };
        let address = self.queue.avail_ring().checked_add(offset).map(GuestAddress);
        let address = address.ok_or(virtio_queue::Error::AddressOverflow)?;
        let word: u16 =
            self.memory.load(address, Ordering::Relaxed).map_err(virtio_queue::Error::GuestMemory)?;
        let word = u16::from_le(word);
        Ok(if self.queue.event_idx_enabled() {
            next.wrapping_sub(word).wrapping_sub(1) < next.wrapping_sub(announced)
        } else {
            word & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        })
    }

    /// Asks the driver not to notify while the worker checks the queue anyway.
    pub(crate) fn silence_driver(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(&self.memory)?)
    }

    /// Asks the driver to notify again. Returns true if requests have come in meanwhile.
    pub(crate) fn listen_to_driver(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(&self.memory)?)
    }
}
