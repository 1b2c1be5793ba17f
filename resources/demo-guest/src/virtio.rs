//! A virtio-mmio device with one split virtqueue, driven by polling (virtio 1.2, sections 2.7 and 4.2).
//!
//! The queue is in the guest's image. The device is told not to interrupt.

use core::sync::atomic::{Ordering, fence};

const MAGIC: (usize, u32) = (0x000, 0x7472_6976);
const VERSION: (usize, u32) = (0x004, 2);
const DEVICE_ID: usize = 0x008;
const DEVICE_FEATURES: usize = 0x010;
const DEVICE_FEATURES_SELECT: usize = 0x014;
const DRIVER_FEATURES: usize = 0x020;
const DRIVER_FEATURES_SELECT: usize = 0x024;
const QUEUE_SELECT: usize = 0x030;
const QUEUE_SIZE_MAX: usize = 0x034;
pub(crate) const QUEUE_SIZE: usize = 0x038;
pub(crate) const QUEUE_READY: usize = 0x044;
const QUEUE_NOTIFY: usize = 0x050;
const STATUS: usize = 0x070;
/// Low halves of the addresses of the queue's three parts; the high halves follow.
pub(crate) const QUEUE_DESCRIPTORS: usize = 0x080;
const QUEUE_AVAILABLE: usize = 0x090;
const QUEUE_USED: usize = 0x0a0;
const CONFIG: usize = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const F_VERSION_1: u64 = 1 << 32;
const NO_INTERRUPT: u16 = 1;

/// Descriptor flags.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Limit for the descriptors in the queue; the device may allow fewer.
pub(crate) const LARGEST_QUEUE: usize = 256;
/// Number of readings of the status register while waiting for a reset.
const RESET_TRIES: usize = 1_000_000;

/// A buffer of a request.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

#[repr(C)]
struct Available {
    flags: u16,
    index: u16,
    ring: [u16; LARGEST_QUEUE],
    used_event: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UsedElement {
    id: u32,
    len: u32,
}

#[repr(C)]
struct Used {
    flags: u16,
    index: u16,
    ring: [UsedElement; LARGEST_QUEUE],
    available_event: u16,
}

#[repr(C, align(4096))]
struct Rings {
    descriptors: [Descriptor; LARGEST_QUEUE],
    available: Available,
    used: Used,
}

static mut RINGS: Rings = EMPTY;
/// The rings of all queues but the first, which stay empty.
static mut IDLE: Rings = EMPTY;

const EMPTY: Rings = Rings {
    descriptors: [Descriptor { address: 0, len: 0, flags: 0, next: 0 }; LARGEST_QUEUE],
    available: Available { flags: 0, index: 0, ring: [0; LARGEST_QUEUE], used_event: 0 },
    used: Used {
        flags: 0,
        index: 0,
        ring: [UsedElement { id: 0, len: 0 }; LARGEST_QUEUE],
        available_event: 0,
    },
};

/// The reason why a device cannot be used.
#[derive(Clone, Copy)]
pub(crate) enum SetupError {
    /// The registers are not those of a virtio 1 device of the requested type.
    OtherDevice,
    /// The device does not complete a reset.
    NoReset,
    /// The device rejects the features or has no queue.
    Rejected,
}

/// A device and its queue. There is one at a time, because the memory of the queue is shared.
pub(crate) struct Device {
    base: usize,
    kind: u32,
    wanted_features: u64,
    queues: u32,
    /// Descriptors in the queue.
    pub(crate) queue_size: u16,
    /// Features that the device offers.
    pub(crate) offered: u64,
    available_index: u16,
    used_index: u16,
}

impl Device {
    /// Sets up the device of type `kind` at `base`, with those `wanted_features` that it offers.
    ///
    /// # Safety
    /// Nothing else may use the queue's memory. `base` may be any address except that of used memory.
    pub(crate) unsafe fn open(base: u64, kind: u32, wanted_features: u64) -> Result<Self, SetupError> {
        // SAFETY: guaranteed by the caller.
        unsafe { Self::open_with(base, kind, wanted_features, 1) }
    }

    /// Does the same for a device that needs more queues. Only the first one is used.
    ///
    /// # Safety
    /// As for [`open`](Self::open).
    pub(crate) unsafe fn open_with(
        base: u64,
        kind: u32,
        wanted_features: u64,
        queues: u32,
    ) -> Result<Self, SetupError> {
        let mut device = Self {
            base: base as usize,
            kind,
            wanted_features,
            queues,
            queue_size: 0,
            offered: 0,
            available_index: 0,
            used_index: 0,
        };
        device.start()?;
        Ok(device)
    }

    /// Resets the device and starts it with an empty queue.
    pub(crate) fn start(&mut self) -> Result<(), SetupError> {
        let is = |(offset, value)| self.read(offset) == value;
        if !(is(MAGIC) && is(VERSION) && is((DEVICE_ID, self.kind))) {
            return Err(SetupError::OtherDevice);
        }
        self.write(STATUS, 0);
        if (0..RESET_TRIES).all(|_| self.status() != 0) {
            return Err(SetupError::NoReset);
        }
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        self.offered = (0..2).fold(0, |features, half| {
            self.write(DEVICE_FEATURES_SELECT, half);
            features | u64::from(self.read(DEVICE_FEATURES)) << (32 * half)
        });
        let features = self.offered & (self.wanted_features | F_VERSION_1);
        for half in 0..2 {
            self.write(DRIVER_FEATURES_SELECT, half);
            self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.status() & FEATURES_OK == 0 {
            return Err(SetupError::Rejected);
        }

        for queue in (1..self.queues).rev() {
            self.set_up(queue, &raw mut IDLE)?;
        }
        self.queue_size = self.set_up(0, &raw mut RINGS)?;
        self.available_index = 0;
        self.used_index = 0;
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        Ok(())
    }

    /// Sets a queue up with empty rings. Returns its size.
    fn set_up(&self, queue: u32, rings: *mut Rings) -> Result<u16, SetupError> {
        self.write(QUEUE_SELECT, queue);
        let size = self.read(QUEUE_SIZE_MAX).min(LARGEST_QUEUE as u32);
        if size == 0 {
            return Err(SetupError::Rejected);
        }
        // SAFETY: the device is reset and nothing else uses the rings, as the caller of `open` guarantees.
        unsafe {
            rings.write_bytes(0, 1);
            (&raw mut (*rings).available.flags).write_volatile(NO_INTERRUPT);
        }
        self.write(QUEUE_SIZE, size);
        // SAFETY: only addresses are taken.
        let (descriptors, available, used) = unsafe {
            (
                (&raw const (*rings).descriptors).addr(),
                (&raw const (*rings).available).addr(),
                (&raw const (*rings).used).addr(),
            )
        };
        self.write64(QUEUE_DESCRIPTORS, descriptors as u64);
        self.write64(QUEUE_AVAILABLE, available as u64);
        self.write64(QUEUE_USED, used as u64);
        self.write(QUEUE_READY, 1);
        Ok(size as u16)
    }

    fn register(&self, offset: usize) -> *mut u32 {
        core::ptr::with_exposed_provenance_mut(self.base.wrapping_add(offset))
    }

    fn read(&self, offset: usize) -> u32 {
        // SAFETY: the caller of `open` guarantees the base address.
        unsafe { self.register(offset).read_volatile() }
    }

    /// Writes a register.
    pub(crate) fn write(&self, offset: usize, value: u32) {
        // SAFETY: as for reads.
        unsafe { self.register(offset).write_volatile(value) }
    }

    /// Writes the two halves of an address.
    pub(crate) fn write64(&self, offset: usize, value: u64) {
        self.write(offset, value as u32);
        self.write(offset + 4, (value >> 32) as u32);
    }

    /// Returns the device status register.
    pub(crate) fn status(&self) -> u32 {
        self.read(STATUS)
    }

    /// Returns a 64-bit field at the start of the device's configuration.
    pub(crate) fn config64(&self) -> u64 {
        u64::from(self.read(CONFIG)) | u64::from(self.read(CONFIG + 4)) << 32
    }

    /// Sets a descriptor.
    pub(crate) fn describe(&mut self, index: usize, descriptor: Descriptor) {
        let rings = &raw mut RINGS;
        // SAFETY: indexing checks the place against the table's length. The guest owns the memory, as the
        // caller of `open` guarantees.
        unsafe { (&raw mut (*rings).descriptors[index]).write_volatile(descriptor) }
    }

    /// Puts a chain of descriptors on the ring. The device may not see it before [`publish`](Self::publish).
    pub(crate) fn offer(&mut self, head: u16) {
        let rings = &raw mut RINGS;
        let place = usize::from(self.available_index % self.queue_size);
        // SAFETY: as for `describe`.
        unsafe { (&raw mut (*rings).available.ring[place]).write_volatile(head) };
        self.available_index = self.available_index.wrapping_add(1);
    }

    /// Advances the ring's index by more than was offered.
    pub(crate) fn overrun(&mut self, entries: u16) {
        self.available_index = self.available_index.wrapping_add(entries);
    }

    /// Shows the offered chains to the device, and notifies it.
    pub(crate) fn publish(&mut self) {
        let rings = &raw mut RINGS;
        fence(Ordering::SeqCst);
        // SAFETY: as for `describe`.
        unsafe { (&raw mut (*rings).available.index).write_volatile(self.available_index) };
        fence(Ordering::SeqCst);
        self.notify(0);
    }

    /// Notifies the device of a queue.
    pub(crate) fn notify(&self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
    }

    /// Returns the head of a completed chain.
    pub(crate) fn take_used(&mut self) -> Option<u32> {
        let rings = &raw mut RINGS;
        // SAFETY: the queue's memory is mapped. The read is volatile, because the device writes it.
        let index = unsafe { (&raw const (*rings).used.index).read_volatile() };
        if index == self.used_index {
            return None;
        }
        fence(Ordering::Acquire);
        let place = usize::from(self.used_index % self.queue_size);
        // SAFETY: as above.
        let element = unsafe { (&raw const (*rings).used.ring[place]).read_volatile() };
        self.used_index = self.used_index.wrapping_add(1);
        Some(element.id)
    }
}
