//! Where a VM's virtio devices are: the registers and the interrupt line of each.
//!
//! Devices are attached one after the other, always in the same order of kinds. So a guest finds the devices of
//! a VM at the same places at each start, and a further device moves only those behind it.
//!
//! A VM has its devices on a PCI bus, or each behind registers of its own (virtio-mmio).
//!
//! With virtio-mmio there are fewer interrupt lines than devices. From the ninth device on, devices share the lines of earlier
//! ones. Interrupts are edges, and a driver looks at its device's cause, so no interrupt is lost.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kvm_ioctls::{IoEventAddress, VmFd};
use parking_lot::Mutex;
use samepage_devices::GuestMemory;
use samepage_devices::virtio::VirtioDevice;
use samepage_devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY, TransportError};

use super::VmError;
use super::bus::Bus;
use super::devices::{new_event, wire_interrupt};
use super::pci::PciBus;
use crate::config::VirtioBus;
use crate::x86::acpi::VirtioMmio;
use crate::x86::layout::{MMIO_IRQS, MMIO_START, MMIO_STRIDE};

/// Upper limit for the virtio devices of a VM: two for each interrupt line.
pub const MAX_VIRTIO: usize = 2 * MMIO_IRQS.len();

/// Attaches devices to a VM at one place after the other.
pub(super) struct Places<'a> {
    kvm: &'a Arc<VmFd>,
    memory: &'a GuestMemory,
    /// Says that a part of the memory was lost, which stops the devices.
    lost: Arc<AtomicBool>,
    bus: Bus,
    free: Box<dyn Iterator<Item = (u64, u32)>>,
    /// The PCI bus, of a VM that has one. Then all devices are there.
    pci: Option<PciBus>,
}

impl<'a> Places<'a> {
    pub(super) fn new(
        kvm: &'a Arc<VmFd>,
        memory: &'a GuestMemory,
        lost: Arc<AtomicBool>,
        bus: Bus,
        kind: VirtioBus,
    ) -> Self {
        let pci = (kind == VirtioBus::Pci).then(|| PciBus::new(kvm));
        Self { kvm, memory, lost, bus, free: Box::new(mmio_slots()), pci }
    }

    /// Attaches a device, and connects it to KVM's interrupt lines and write notifications.
    ///
    /// # Panics
    /// Panics if there is no place left. The configuration has made sure that there is one.
    pub(super) fn attach(
        &mut self,
        device: impl VirtioDevice + 'static,
        failed: impl FnOnce(TransportError) -> VmError,
    ) -> Result<(), VmError> {
        if let Some(pci) = &mut self.pci {
            return pci.attach(
                &mut self.bus,
                (self.memory, Arc::clone(&self.lost)),
                Box::new(device),
                failed,
            );
        }
        let (base, irq) = self.free.next().expect("a validated VM has no more devices than places");
        let interrupt = new_event()?;
        wire_interrupt(self.kvm, &interrupt, irq)?;
        let mut transport =
            MmioTransport::new(self.memory.clone(), Box::new(device), interrupt).map_err(failed)?;
        transport.set_memory_lost_flag(Arc::clone(&self.lost));
        let address = IoEventAddress::Mmio(base + QUEUE_NOTIFY);
        for (queue, event) in (0_u32..).zip(transport.queue_events()) {
            let failed = VmError::kvm("connect a virtio queue");
            self.kvm.register_ioevent(event, &address, queue).map_err(failed)?;
        }
        self.bus.insert(base, MMIO_STRIDE, Arc::new(Mutex::new(transport)));
        Ok(())
    }

    /// Returns the bus with all devices. Those on PCI can be found through ports as well.
    pub(super) fn into_bus(mut self, ports: &mut Bus) -> Bus {
        if let Some(pci) = self.pci.take() {
            pci.connect(&mut self.bus, ports);
        }
        self.bus
    }
}

/// Returns the base address and the interrupt line of each virtio-mmio device, in order.
fn mmio_slots() -> impl Iterator<Item = (u64, u32)> {
    let bases = (0..MAX_VIRTIO as u64).map(|slot| MMIO_START + slot * MMIO_STRIDE);
    bases.zip(MMIO_IRQS.into_iter().cycle())
}

/// Returns `count` virtio-mmio devices as ACPI describes them.
pub(crate) fn mmio_devices(count: usize) -> impl Iterator<Item = VirtioMmio> {
    mmio_slots().take(count).map(|(base, irq)| VirtioMmio { base, irq })
}

/// Returns the kernel parameters for `count` virtio-mmio devices, each after a space.
pub(crate) fn mmio_parameters(count: usize) -> String {
    let parameter = |(base, irq)| format!(" virtio_mmio.device={}K@{base:#x}:{irq}", MMIO_STRIDE >> 10);
    mmio_slots().take(count).map(parameter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_is_told_of_each_device() {
        assert_eq!(mmio_parameters(0), "");
        assert_eq!(
            mmio_parameters(2),
            " virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"
        );
        let all = mmio_parameters(MAX_VIRTIO);
        assert_eq!(all.matches("virtio_mmio").count(), 16);
        assert!(all.ends_with(" virtio_mmio.device=4K@0xd000f000:15"), "{all}");
    }
}
