//! The virtio transport over PCI (virtio 1.2, section 4.1), modern interface only, with MSI-X.
//!
//! All registers lie in one range of memory ([`MEMORY_BYTES`]), and capabilities in the configuration space say
//! where. There is no interrupt line: a driver has to use messages. Fields are read and written in their own width,
//! and fields of 64 bits as two halves. Other accesses read as zeros and are ignored.
//!
//! ```text
//! 0x0000  common configuration      0x3000  notifications, four bytes for each queue
//! 0x1000  interrupt status          0x4000  table of messages
//! 0x2000  device configuration      0x6000  bits of pending messages
//! ```

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vmm_sys_util::eventfd::EventFd;

use super::messages::{ENABLE, ENTRY_BYTES, MASK_ALL, Messages};
use super::transport::{Core, TransportError, set_word, word};
use super::{Interrupt, VirtioDevice};
use crate::pci::{ConfigSpace, Identity, PciFunction};
use crate::{BusDevice, GuestMemory};

#[cfg(test)]
mod tests;

/// Length of the registers in guest-physical memory, in bytes, and their alignment.
pub const MEMORY_BYTES: u64 = 0x8000;
/// Offset of the notifications. A VMM registers the event of queue N with KVM at this offset and N times
/// [`NOTIFY_STRIDE`].
pub const NOTIFY: u64 = 0x3000;
/// Distance of two queues' notifications, in bytes.
pub const NOTIFY_STRIDE: u64 = 4;

const COMMON_BYTES: u64 = 0x3c;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x6000;
/// Length of the device's configuration space, its table and each other part.
const PART: u64 = 0x1000;
const TABLE_BYTES: u64 = PENDING - TABLE;

const VENDOR: u16 = 0x1af4;
/// The number of a modern device is its type and this.
const FIRST_DEVICE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

// Types of virtio's capabilities.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// A virtio device as a function on a PCI bus.
///
/// Dropping the transport stops the device.
pub struct PciTransport {
    core: Core,
    messages: Arc<Messages>,
    config: ConfigSpace,
    /// Place of the capability through which the configuration space reaches the memory.
    window: usize,
    msix: usize,
}

impl PciTransport {
    /// Returns a transport for `device`, with its registers at guest address `base`. Rings and buffers lie in
    /// `memory`. There is a message for each queue and one more.
    pub fn new(
        memory: GuestMemory,
        device: Box<dyn VirtioDevice>,
        messages: Arc<Messages>,
        base: u32,
    ) -> Result<Self, TransportError> {
        let number = device.device_type() as u16;
        let identity = Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE + number,
            subsystem: number,
            class: class(device.device_type()),
            revision: 1,
        };
        let queues = device.queue_sizes().len() as u64;
        let mut config = ConfigSpace::new(identity).with_memory(base, MEMORY_BYTES as u32);
        for (kind, offset, bytes) in
            [(COMMON_CFG, 0, COMMON_BYTES), (ISR_CFG, ISR, 1), (DEVICE_CFG, DEVICE, PART)]
        {
            config.add_capability(CAPABILITY_VENDOR, &virtio_capability(kind, offset, bytes, 16), &[]);
        }
        let mut notify = virtio_capability(NOTIFY_CFG, NOTIFY, queues * NOTIFY_STRIDE, 20);
        notify.extend((NOTIFY_STRIDE as u32).to_le_bytes());
        config.add_capability(CAPABILITY_VENDOR, &notify, &[]);
        let mut window = virtio_capability(PCI_CFG, 0, 0, 20);
        window.extend([0; 4]);
        // Range, offset, length and data.
        let writable = [&[0; 2][..], &[0xff], &[0; 3], &[0xff; 12]].concat();
        let window = config.add_capability(CAPABILITY_VENDOR, &window, &writable);
        let mut msix = (messages.count() as u16 - 1).to_le_bytes().to_vec();
        msix.extend((TABLE as u32).to_le_bytes());
        msix.extend((PENDING as u32).to_le_bytes());
        let writable = (ENABLE | MASK_ALL).to_le_bytes();
        let msix = config.add_capability(CAPABILITY_MSIX, &msix, &writable);
        let core = Core::new(memory, device, Interrupt::of_messages(messages.clone()))?;
        Ok(Self { core, messages, config, window, msix })
    }

    /// Sets the flag that stops the device. The flag is set when the host has lost a part of guest memory,
    /// which then reads as zeros. To be called before the driver starts the device.
    pub fn set_memory_lost_flag(&mut self, flag: Arc<AtomicBool>) {
        self.core.set_memory_lost_flag(flag);
    }

    /// Returns the notification events, one for each queue; see [`NOTIFY`].
    pub fn queue_events(&self) -> &[EventFd] {
        self.core.queue_events()
    }

    fn read_memory(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset / PART * PART {
            0 => {
                if let Some(value) = self.read_common(offset, data.len()) {
                    data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
                }
            }
            ISR if offset == ISR && !data.is_empty() => {
                let status = self.core.interrupt.status();
                self.core.interrupt.acknowledge(status);
                data[0] = status as u8;
            }
            DEVICE => {
                // An access may reach beyond the end of the part.
                let bytes = data.len().min((DEVICE + PART - offset) as usize);
                self.core.device().read_config(offset - DEVICE, &mut data[..bytes]);
            }
            at if (TABLE..PENDING).contains(&at) => self.messages.read_table(offset - TABLE, data),
            PENDING => self.messages.read_pending(offset - PENDING, data),
            _ => {}
        }
    }

    fn write_memory(&mut self, offset: u64, data: &[u8]) {
        match offset / PART * PART {
            0 => {
                if let Some(value) = number(data) {
                    self.write_common(offset, data.len(), value);
                }
            }
            DEVICE => {
                let bytes = data.len().min((DEVICE + PART - offset) as usize);
                self.core.write_config(offset - DEVICE, &data[..bytes]);
            }
            // The value is the queue's number, but the place says the same.
            NOTIFY if offset.is_multiple_of(NOTIFY_STRIDE) => {
                self.core.notify(((offset - NOTIFY) / NOTIFY_STRIDE) as u32);
            }
            at if (TABLE..PENDING).contains(&at) => self.messages.write_table(offset - TABLE, data),
            _ => {}
        }
    }

    /// Reads a field of the common configuration, if there is one at this place, of this width in bytes.
    fn read_common(&self, offset: u64, width: usize) -> Option<u32> {
        let core = &self.core;
        let queue = core.selected_queue();
        let address = |at: u64, address: u64| word(address, (at / 4) as u32);
        Some(match (offset, width) {
            (0x00, 4) => core.device_features_select,
            (0x04, 4) => word(core.device_features(), core.device_features_select),
            (0x08, 4) => core.driver_features_select,
            (0x0c, 4) => word(core.driver_features, core.driver_features_select),
            (0x10, 2) => self.messages.config_vector().into(),
            (0x12, 2) => core.queue_events().len() as u32,
            (0x14, 1) => core.status(),
            (0x15, 1) => core.device().config_generation() & 0xff,
            (0x16, 2) => core.queue_select,
            (0x18, 2) => queue.map_or(0, |queue| queue.size),
            (0x1a, 2) => self.messages.queue_vector(core.queue_select as usize).into(),
            (0x1c, 2) => queue.map_or(0, |queue| queue.ready.into()),
            (0x1e, 2) => queue.map_or(0, |_| core.queue_select),
            (0x20 | 0x24, 4) => address(offset - 0x20, queue?.descriptors),
            (0x28 | 0x2c, 4) => address(offset - 0x28, queue?.available),
            (0x30 | 0x34, 4) => address(offset - 0x30, queue?.used),
            _ => return None,
        })
    }

    fn write_common(&mut self, offset: u64, width: usize, value: u32) {
        let core = &mut self.core;
        let half = |at: u64| (at / 4) as u32;
        match (offset, width) {
            (0x00, 4) => core.device_features_select = value,
            (0x08, 4) => core.driver_features_select = value,
            (0x0c, 4) => core.set_driver_features(value),
            (0x10, 2) => self.messages.set_config_vector(value as u16),
            (0x14, 1) => self.set_status(value),
            (0x16, 2) => core.queue_select = value,
            (0x18, 2) => core.set_up_queue(|queue| queue.size = value),
            (0x1a, 2) => self.messages.set_queue_vector(core.queue_select as usize, value as u16),
            // A driver cannot take a queue back but by a reset.
            (0x1c, 2) if value == 1 => core.set_queue_ready(true),
            (0x20 | 0x24, 4) => {
                core.set_up_queue(|queue| set_word(&mut queue.descriptors, half(offset - 0x20), value));
            }
            (0x28 | 0x2c, 4) => {
                core.set_up_queue(|queue| set_word(&mut queue.available, half(offset - 0x28), value));
            }
            (0x30 | 0x34, 4) => {
                core.set_up_queue(|queue| set_word(&mut queue.used, half(offset - 0x30), value))
            }
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            // No worker is left that could send a message afterwards.
            self.core.set_status(0);
            self.messages.reset_vectors();
        } else {
            self.core.set_status(value);
        }
    }

    /// Returns what an access to the data of the window means: an offset, and a width in bytes.
    fn windowed(&self) -> Option<(u64, usize)> {
        let [bar] = self.config.bytes(self.window + 4);
        let offset = u32::from_le_bytes(self.config.bytes(self.window + 8));
        let bytes = u32::from_le_bytes(self.config.bytes(self.window + 12));
        let is_inside = u64::from(offset) + u64::from(bytes) <= MEMORY_BYTES;
        (bar == 0 && matches!(bytes, 1 | 2 | 4) && offset.is_multiple_of(bytes) && is_inside)
            .then_some((offset.into(), bytes as usize))
    }

    /// Whether an access to the configuration space meets the data of the window.
    fn meets_window(&self, register: usize, bytes: usize) -> bool {
        let data = self.window + 16;
        register < data + 4 && data < register + bytes
    }
}

impl BusDevice for PciTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if self.config.is_memory_on() {
            self.read_memory(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if self.config.is_memory_on() {
            self.write_memory(offset, data);
        }
    }
}

impl PciFunction for PciTransport {
    fn read_config(&mut self, register: usize, data: &mut [u8]) {
        if self.meets_window(register, data.len())
            && let Some((offset, bytes)) = self.windowed()
        {
            let mut value = [0; 4];
            self.read_memory(offset, &mut value[..bytes]);
            self.config.set_bytes(self.window + 16, &value);
        }
        self.config.read(register, data);
    }

    fn write_config(&mut self, register: usize, data: &[u8]) {
        self.config.write(register, data);
        if register < self.msix + 4 && self.msix + 2 < register + data.len() {
            self.messages.set_control(u16::from_le_bytes(self.config.bytes(self.msix + 2)));
        }
        if self.meets_window(register, data.len())
            && let Some((offset, bytes)) = self.windowed()
        {
            let value: [u8; 4] = self.config.bytes(self.window + 16);
            self.write_memory(offset, &value[..bytes]);
        }
    }
}

/// A capability that says where a part of the registers is, from its length on. `length` is that of the capability.
fn virtio_capability(kind: u8, offset: u64, bytes: u64, length: u8) -> Vec<u8> {
    let mut content = vec![length, kind, 0, 0, 0, 0];
    content.extend((offset as u32).to_le_bytes());
    content.extend((bytes as u32).to_le_bytes());
    content
}

/// The class, subclass and interface of a device.
fn class(device_type: u32) -> u32 {
    match device_type {
        1 => 0x02_0000,
        2 => 0x01_8000,
        3 => 0x07_8000,
        _ => 0xff_0000,
    }
}

/// The value of an access of up to four bytes.
fn number(data: &[u8]) -> Option<u32> {
    let mut bytes = [0; 4];
    bytes.get_mut(..data.len())?.copy_from_slice(data);
    Some(u32::from_le_bytes(bytes))
}

/// The table has room for the messages of every device.
const _: () = assert!(TABLE_BYTES / ENTRY_BYTES >= 256);
