//! Device models: what a guest finds behind its ports and memory-mapped registers.
//!
//! A device is plain state plus a [`BusDevice`] implementation; it knows nothing of KVM. It is handed
//! `EventFd`s for what it raises (interrupts, reset) and, for virtio, the [`GuestMemory`] it may touch.
//! Who owns a device's address, its interrupt line and its place on the bus is the VMM's business.
//!
//! Everything a guest writes (registers, rings, descriptors, requests) is hostile input. It is answered
//! with zeroes, an I/O error or DEVICE_NEEDS_RESET of that one device; it never panics, and it costs
//! bounded memory and time. Device models have no `unsafe`: they reach guest memory by `vm-memory`'s volatile
//! copies alone, which also mark the dirty bitmap. What the host's kernel reads and writes for a disk is in
//! [`disk`], the one place with `unsafe`.

pub mod disk;
pub mod doorbell;
pub mod i8042;
pub mod serial;
pub mod virtio;

/// Guest RAM with a dirty bitmap that records what the VMM itself writes.
pub type GuestMemory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;

/// A device on the port or memory bus of one VM.
///
/// One call is one access of the guest: `data` is as long as the access is wide. `offset` is relative to
/// the device's base; it may lie anywhere, so devices must bound it. Accesses cannot fail: what a device
/// does not implement reads as zeroes and ignores writes.
///
/// Calls come from vCPU threads, one at a time, so an implementation does not wait for other vCPUs.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset`. Every byte of `data` is filled in.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Runs a byte-wide read on each byte of an access, as the ISA bus splits wide accesses to 8-bit devices.
fn read_bytewise(offset: u64, data: &mut [u8], mut read: impl FnMut(u8) -> u8) {
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = byte_port(offset, i).map_or(0, &mut read);
    }
}

/// The counterpart of [`read_bytewise`] for writes.
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
