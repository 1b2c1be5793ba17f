//! Device models: the devices behind a guest's ports and memory-mapped registers.
//!
//! A device is plain state plus a [`BusDevice`] implementation. It knows nothing of KVM. The VMM gives each
//! device `EventFd`s for its interrupts and resets, and virtio devices the [`GuestMemory`] that they access.
//! The VMM also owns a device's address, interrupt line and place on the bus.
//!
//! Everything that a guest writes (registers, rings, descriptors, requests) is hostile input. A device
//! answers bad input with zeros, an I/O error or DEVICE_NEEDS_RESET for that device alone. It never panics,
//! and its use of memory and time is bounded. Device models have no `unsafe`: they access guest memory only
//! through the volatile copies of `vm-memory`, which also mark the dirty bitmap. Only [`disk`] and [`net`] contain
//! `unsafe`, for the memory that the host's kernel reads and writes.

pub mod disk;
pub mod doorbell;
pub mod i8042;
pub mod net;
pub mod pci;
pub mod power;
pub mod serial;
pub mod virtio;

/// Guest RAM with a dirty bitmap that records what the VMM itself writes.
pub type GuestMemory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;

/// A device on the port or memory bus of one VM.
///
/// One call is one access by the guest: `data` is as long as the access is wide. `offset` is relative to the
/// device's base. A guest can choose any offset, so devices must check it. Accesses cannot fail: registers
/// that a device does not implement read as zeros and ignore writes.
///
/// vCPU threads call one at a time, so an implementation must not wait for other vCPUs.
pub trait BusDevice: Send {
    /// Handles a read of `data.len()` bytes at `offset`, and fills in every byte of `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Handles a write of `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Runs a byte-wide read on each byte of an access, as the ISA bus splits wide accesses to 8-bit devices.
fn read_bytewise(offset: u64, data: &mut [u8], mut read: impl FnMut(u8) -> u8) {
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = byte_port(offset, i).map_or(0, &mut read);
    }
}

/// Runs a byte-wide write on each byte of an access, as [`read_bytewise`] does for reads.
fn write_bytewise(offset: u64, data: &[u8], mut write: impl FnMut(u8, u8)) {
    for (i, &byte) in data.iter().enumerate() {
        if let Some(port) = byte_port(offset, i) {
            write(port, byte);
        }
    }
}

fn byte_port(offset: u64, index: usize) -> Option<u8> {
    offset.checked_add(index as u64).and_then(|port| u8::try_from(port).ok())
}

/// Adapts an `EventFd` to the trigger of vm-superio's devices.
struct EventTrigger(vmm_sys_util::eventfd::EventFd);

impl vm_superio::Trigger for EventTrigger {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}
