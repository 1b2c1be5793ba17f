//! The state that all virtio transports have: status, features and queues (virtio 1.2, sections 2 and 3.1).
//!
//! The device status limits what the driver may do. Features are fixed at FEATURES_OK, and queues when they become
//! ready or at DRIVER_OK. Writes out of order are ignored, so the driver reads back the valid state. A queue does
//! not become ready if its rings are not aligned or not within guest memory.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{ActivateError, Activation, ActiveQueue, Interrupt, RING_FEATURES, VirtioDevice};
use crate::GuestMemory;

/// The reason why a transport could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The process could not open a notification event.
    #[error("open the notification event of virtio queue {queue}: {source}; raise the limit of open files")]
    Event {
        /// The index of the queue.
        queue: usize,
        /// The error of the system call.
        source: io::Error,
    },
    /// The device requests a queue size that virtio does not allow.
    #[error("set up virtio queue {queue}: its size {size} is not a power of two up to 32768")]
    QueueSize {
        /// The index of the queue.
        queue: usize,
        /// The size in descriptors.
        size: u16,
    },
}

/// The driver's settings of one queue. Ring positions belong to the worker.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueueSetup {
    pub(super) max_size: u16,
    pub(super) size: u32,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    pub(super) ready: bool,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self { max_size, size: u32::from(max_size), descriptors: 0, available: 0, used: 0, ready: false }
    }

    /// Returns the queue, if the rings are well-formed and within `memory`.
    fn build(&self, memory: &GuestMemory, event_idx: bool) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(u16::try_from(self.size).ok()?).ok()?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(self.available)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.used)).ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }
}

/// What a driver and a device have agreed on: the registers that all transports have.
///
/// Dropping it stops the device.
pub(super) struct Core {
    memory: GuestMemory,
    device: Box<dyn VirtioDevice>,
    pub(super) interrupt: Arc<Interrupt>,
    events: Vec<EventFd>,
    queues: Vec<QueueSetup>,
    /// Status bits that the driver has set. `interrupt` keeps NEEDS_RESET.
    status: u32,
    pub(super) driver_features: u64,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) queue_select: u32,
}

impl Core {
    pub(super) fn new(
        memory: GuestMemory,
        device: Box<dyn VirtioDevice>,
        interrupt: Interrupt,
    ) -> Result<Self, TransportError> {
        let mut events = Vec::new();
        let mut queues = Vec::new();
        for (queue, &size) in device.queue_sizes().iter().enumerate() {
            Queue::new(size).map_err(|_| TransportError::QueueSize { queue, size })?;
            queues.push(QueueSetup::new(size));
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(|source| TransportError::Event { queue, source })?;
            events.push(event);
        }
        Ok(Self {
            memory,
            device,
            interrupt: Arc::new(interrupt),
            events,
            queues,
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
        })
    }

    pub(super) fn set_memory_lost_flag(&mut self, flag: Arc<AtomicBool>) {
        if let Some(interrupt) = Arc::get_mut(&mut self.interrupt) {
            interrupt.set_memory_lost_flag(flag);
        }
    }

    pub(super) fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    /// Writes to the device's configuration space.
    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// Returns the notification events, one for each queue.
    pub(super) fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    /// Wakes the worker of a queue, if there is such a queue.
    pub(super) fn notify(&self, queue: u32) {
        if let Some(event) = usize::try_from(queue).ok().and_then(|index| self.events.get(index)) {
            // A full event counter means that the worker is about to check the queue.
            let _ = event.write(1);
        }
    }

    /// Resets the device, like a write of 0 to the status. On return, no request is in flight, and all
    /// negotiated state is gone. Waits for host I/O in progress.
    pub(super) fn reset(&mut self) {
        self.device.reset();
        self.interrupt.clear();
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
    }

    pub(super) fn device_features(&self) -> u64 {
        self.device.features() | RING_FEATURES
    }

    fn has_status(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    pub(super) fn selected_queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// Changes the selected queue, if the driver may do so at present.
    pub(super) fn set_up_queue(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        let open = !self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) && !self.interrupt.needs_reset();
        if let Ok(index) = usize::try_from(self.queue_select)
            && let Some(queue) = self.queues.get_mut(index)
            && open
            && !queue.ready
        {
            change(queue);
        }
    }

    pub(super) fn set_queue_ready(&mut self, ready: bool) {
        if ready {
            let memory = self.memory.clone();
            self.set_up_queue(|queue| queue.ready = queue.build(&memory, false).is_some());
        } else if self.selected_queue().is_some_and(|queue| queue.ready) {
            // The driver takes a queue back. A device serves all its queues or none, so the device stops. If
            // other queues are then unserved, the driver is told to reset the device.
            if self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) {
                self.device.reset();
            }
            self.queues[self.queue_select as usize].ready = false;
            if self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) && self.queues.iter().any(|queue| queue.ready) {
                self.interrupt.set_needs_reset();
            }
        }
    }

    pub(super) fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // A driver sets bits one after the other. Only a reset clears them.
        if self.status & !value != 0 {
            return;
        }
        for (bit, requires) in [
            (VIRTIO_CONFIG_S_ACKNOWLEDGE, 0),
            (VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_ACKNOWLEDGE),
            (VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER),
            (VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK),
            (VIRTIO_CONFIG_S_FAILED, 0),
        ] {
            let wanted = value & bit != 0 && !self.has_status(bit);
            if !wanted || self.status & requires != requires {
                continue;
            }
            match bit {
                VIRTIO_CONFIG_S_FEATURES_OK if !self.features_acceptable() => {}
                VIRTIO_CONFIG_S_DRIVER_OK => {
                    self.status |= bit;
                    if self.activate().is_err() {
                        self.interrupt.set_needs_reset();
                    }
                }
                _ => self.status |= bit,
            }
        }
    }

    fn features_acceptable(&self) -> bool {
        let version_1 = 1 << VIRTIO_F_VERSION_1;
        self.driver_features & version_1 != 0 && self.driver_features & !self.device_features() == 0
    }

    fn activate(&mut self) -> Result<(), ActivateError> {
        if self.interrupt.needs_reset() {
            return Ok(());
        }
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::new();
        for (index, setup) in self.queues.iter().enumerate().filter(|(_, setup)| setup.ready) {
            let queue = setup.build(&self.memory, event_idx).ok_or(ActivateError::QueueNotReady(index))?;
            let event = self.events[index].try_clone().map_err(ActivateError::Worker)?;
            queues.push(ActiveQueue { index, queue, event });
        }
        self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues,
            interrupt: self.interrupt.clone(),
        })
    }

    /// Returns the status, including NEEDS_RESET.
    pub(super) fn status(&self) -> u32 {
        if self.interrupt.needs_reset() { self.status | VIRTIO_CONFIG_S_NEEDS_RESET } else { self.status }
    }

    /// Sets the selected word of the driver's features, before they are fixed.
    pub(super) fn set_driver_features(&mut self, value: u32) {
        if !self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            set_word(&mut self.driver_features, self.driver_features_select, value);
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.reset();
    }
}

/// Returns the 32-bit word `select` of `value`, counted from the least significant, or 0 beyond the second
/// word.
pub(super) fn word(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

pub(super) fn set_word(value: &mut u64, select: u32, word: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(word),
        1 => *value = *value & 0xffff_ffff | u64::from(word) << 32,
        _ => {}
    }
}
