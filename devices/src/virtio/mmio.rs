//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2).
//!
//! Registers are 32 bits wide and aligned. Other accesses below the configuration space, and accesses to
//! unknown registers, read as zeros and ignore writes. The configuration space accepts accesses of any width
//! at any offset.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use virtio_bindings::bindings::virtio_mmio::*;
use vmm_sys_util::eventfd::EventFd;

pub use super::transport::TransportError;
use super::transport::{Core, set_word, word};
use super::{Interrupt, VirtioDevice};
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

/// A virtio device behind a window of guest-physical memory.
///
/// Dropping the transport stops the device.
pub struct MmioTransport {
    core: Core,
}

impl MmioTransport {
    /// Returns a transport for `device`. Rings and buffers lie in `memory`. Writing `interrupt` raises the
    /// device's interrupt line (an irqfd, edge-triggered).
    pub fn new(
        memory: GuestMemory,
        device: Box<dyn VirtioDevice>,
        interrupt: EventFd,
    ) -> Result<Self, TransportError> {
        Ok(Self { core: Core::new(memory, device, Interrupt::new(interrupt))? })
    }

    /// Sets the flag that stops the device. The flag is set when the host has lost a part of guest memory,
    /// which then reads as zeros. To be called before the driver starts the device.
    pub fn set_memory_lost_flag(&mut self, flag: Arc<AtomicBool>) {
        self.core.set_memory_lost_flag(flag);
    }

    /// Returns the notification events, one for each queue. The VMM registers each as ioeventfd at
    /// [`QUEUE_NOTIFY`], with the queue's index as the matching value. Writes that reach the transport itself
    /// have the same effect.
    pub fn queue_events(&self) -> &[EventFd] {
        self.core.queue_events()
    }

    /// Resets the device, like a write of 0 to the status. On return, no request is in flight, and all
    /// negotiated state is gone. Waits for host I/O in progress.
    pub fn reset(&mut self) {
        self.core.reset();
    }

    /// Stops the device for good. Its worker threads are joined on return.
    pub fn shutdown(&mut self) {
        self.reset();
    }

    fn read_register(&self, register: u32) -> u32 {
        let core = &self.core;
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => core.device().device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => word(core.device_features(), core.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => core.selected_queue().map_or(0, |queue| queue.max_size.into()),
            VIRTIO_MMIO_QUEUE_READY => core.selected_queue().map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => core.interrupt.status(),
            VIRTIO_MMIO_STATUS => core.status(),
            // The device has no shared memory regions: length and base of a missing region are -1.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => core.device().config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        let core = &mut self.core;
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => core.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => core.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => core.set_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => core.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM => core.set_up_queue(|queue| queue.size = value),
            VIRTIO_MMIO_QUEUE_READY => core.set_queue_ready(value & 1 != 0),
            VIRTIO_MMIO_QUEUE_NOTIFY => core.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => core.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => core.set_status(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => {
                core.set_up_queue(|queue| set_word(&mut queue.descriptors, 0, value))
            }
            VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                core.set_up_queue(|queue| set_word(&mut queue.descriptors, 1, value));
            }
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                core.set_up_queue(|queue| set_word(&mut queue.available, 0, value))
            }
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                core.set_up_queue(|queue| set_word(&mut queue.available, 1, value))
            }
            VIRTIO_MMIO_QUEUE_USED_LOW => core.set_up_queue(|queue| set_word(&mut queue.used, 0, value)),
            VIRTIO_MMIO_QUEUE_USED_HIGH => core.set_up_queue(|queue| set_word(&mut queue.used, 1, value)),
            _ => {}
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.core.device().read_config(offset, data);
        } else if let Some(register) = aligned_register(offset)
            && let Ok(data) = <&mut [u8; 4]>::try_from(data)
        {
            *data = self.read_register(register).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.core.write_config(offset, data);
        } else if let Some(register) = aligned_register(offset)
            && let Ok(data) = <[u8; 4]>::try_from(data)
        {
            self.write_register(register, u32::from_le_bytes(data));
        }
    }
}

fn aligned_register(offset: u64) -> Option<u32> {
    u32::try_from(offset).ok().filter(|register| register % 4 == 0)
}
