//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2).
//!
//! Registers are 32 bits wide and aligned. Other accesses below the configuration space, and accesses to
//! unknown registers, read as zeros and ignore writes. The configuration space accepts accesses of any width
//! at any offset.
//!
//! The device status limits what the driver may do. Features are fixed at FEATURES_OK, and queues at
//! QueueReady or DRIVER_OK. Writes out of order are ignored, so the driver reads back the valid state. A
//! queue does not become ready if its rings are not aligned or not within guest memory.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_mmio::*;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{ActivateError, Activation, ActiveQueue, Interrupt, RING_FEATURES, VirtioDevice};
use crate::{BusDevice, GuestMemory};

#[cfg(test)]
mod tests;

/// Length of the register window in guest-physical memory, in bytes.
pub const WINDOW_SIZE: u64 = 0x200;
/// Offset of QueueNotify. A VMM registers [`MmioTransport::queue_events`] at this offset with KVM. The driver
/// writes the queue's index there.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "same", little-endian. Drivers ignore the vendor.
const VENDOR: u32 = 0x656d_6173;

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
struct QueueSetup {
    max_size: u16,
    size: u32,
    descriptors: u64,
    available: u64,
    used: u64,
    ready: bool,
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

/// A virtio device behind a window of guest-physical memory.
///
/// Dropping the transport stops the device.
pub struct MmioTransport {
    memory: GuestMemory,
    device: Box<dyn VirtioDevice>,
    interrupt: Arc<Interrupt>,
    events: Vec<EventFd>,
    queues: Vec<QueueSetup>,
    /// Status bits that the driver has set. `interrupt` keeps NEEDS_RESET.
    status: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
}

impl MmioTransport {
    /// Returns a transport for `device`. Rings and buffers lie in `memory`. Writing `interrupt` raises the
    /// device's interrupt line (an irqfd, edge-triggered).
    pub fn new(
        memory: GuestMemory,
        device: Box<dyn VirtioDevice>,
        interrupt: EventFd,
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
            interrupt: Arc::new(Interrupt::new(interrupt)),
            events,
            queues,
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
        })
    }

    /// Sets the flag that stops the device. The flag is set when the host has lost a part of guest memory,
    /// which then reads as zeros. To be called before the driver starts the device.
    pub fn set_memory_lost_flag(&mut self, flag: Arc<AtomicBool>) {
        if let Some(interrupt) = Arc::get_mut(&mut self.interrupt) {
            interrupt.set_memory_lost_flag(flag);
        }
    }

    /// Returns the notification events, one for each queue. The VMM registers each as ioeventfd at
    /// [`QUEUE_NOTIFY`], with the queue's index as the matching value. Writes that reach the transport itself
    /// have the same effect.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    /// Resets the device, like a write of 0 to the status. On return, no request is in flight, and all
    /// negotiated state is gone. Waits for host I/O in progress.
    pub fn reset(&mut self) {
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

    /// Stops the device for good. Its worker threads are joined on return.
    pub fn shutdown(&mut self) {
        self.reset();
    }

    fn device_features(&self) -> u64 {
        self.device.features() | RING_FEATURES
    }

    fn has_status(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    fn selected_queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// Changes the selected queue, if the driver may do so at present.
    fn set_up_queue(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        let open = !self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) && !self.interrupt.needs_reset();
        if let Ok(index) = usize::try_from(self.queue_select)
            && let Some(queue) = self.queues.get_mut(index)
            && open
            && !queue.ready
        {
            change(queue);
        }
    }

    fn set_queue_ready(&mut self, ready: bool) {
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

    fn set_status(&mut self, value: u32) {
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

    fn read_register(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => word(self.device_features(), self.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected_queue().map_or(0, |queue| queue.max_size.into()),
            VIRTIO_MMIO_QUEUE_READY => self.selected_queue().map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS if self.interrupt.needs_reset() => self.status | VIRTIO_CONFIG_S_NEEDS_RESET,
            VIRTIO_MMIO_STATUS => self.status,
            // The device has no shared memory regions: length and base of a missing region are -1.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.device.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if !self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) => {
                set_word(&mut self.driver_features, self.driver_features_select, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM => self.set_up_queue(|queue| queue.size = value),
            VIRTIO_MMIO_QUEUE_READY => self.set_queue_ready(value & 1 != 0),
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Some(event) = usize::try_from(value).ok().and_then(|index| self.events.get(index)) {
                    // A full event counter means that the worker is about to check the queue.
                    let _ = event.write(1);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => {
                self.set_up_queue(|queue| set_word(&mut queue.descriptors, 0, value))
            }
            VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                self.set_up_queue(|queue| set_word(&mut queue.descriptors, 1, value));
            }
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                self.set_up_queue(|queue| set_word(&mut queue.available, 0, value))
            }
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                self.set_up_queue(|queue| set_word(&mut queue.available, 1, value))
            }
            VIRTIO_MMIO_QUEUE_USED_LOW => self.set_up_queue(|queue| set_word(&mut queue.used, 0, value)),
            VIRTIO_MMIO_QUEUE_USED_HIGH => self.set_up_queue(|queue| set_word(&mut queue.used, 1, value)),
            _ => {}
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.device.read_config(offset, data);
        } else if let Some(register) = aligned_register(offset)
            && let Ok(data) = <&mut [u8; 4]>::try_from(data)
        {
            *data = self.read_register(register).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.device.write_config(offset, data);
        } else if let Some(register) = aligned_register(offset)
            && let Ok(data) = <[u8; 4]>::try_from(data)
        {
            self.write_register(register, u32::from_le_bytes(data));
        }
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn aligned_register(offset: u64) -> Option<u32> {
    u32::try_from(offset).ok().filter(|register| register % 4 == 0)
}

/// Returns the 32-bit word `select` of `value`, counted from the least significant, or 0 beyond the second
/// word.
fn word(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_word(value: &mut u64, select: u32, word: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(word),
        1 => *value = *value & 0xffff_ffff | u64::from(word) << 32,
        _ => {}
    }
}
