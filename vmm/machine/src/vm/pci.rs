//! A VM's PCI bus: where its functions are, and the way of their messages to KVM.
//!
//! There is one bus. Device 0 is the host bridge, and each virtio device is function 0 of a device of its own, in
//! the order of attachment. So a guest finds the devices of a VM at the same places at each start.
//!
//! Kernels with ACPI reach the configuration space in memory, as the table MCFG says, and others by two ports.
//!
//! Interrupts are messages. KVM has a table of them for the VM, by *global system interrupt*: those below 24 are the
//! inputs of the interrupt controllers, and each message of a device has one behind these. KVM takes the table as a
//! whole, which is done when a guest unmasks a message that it has changed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use parking_lot::Mutex;
use samepage_devices::pci::{CONFIG_BYTES, HostBridge, PciFunction};
use samepage_devices::virtio::VirtioDevice;
use samepage_devices::virtio::messages::{Messages, Routes};
use samepage_devices::virtio::mmio::TransportError;
use samepage_devices::virtio::pci::{MEMORY_BYTES, NOTIFY, NOTIFY_STRIDE, PciTransport};
use samepage_devices::{BusDevice, GuestMemory};

use super::VmError;
use super::bus::Bus;
use super::devices::new_event;
use crate::x86::layout::{PCI_CONFIG, PCI_CONFIG_BYTES, PCI_MEMORY, PCI_MEMORY_BYTES, PCI_PORTS};

/// Upper limit for the virtio devices on the bus: all but the host bridge.
const MAX_DEVICES: usize = 31;
/// Inputs of the IO-APIC, and of the two legacy controllers.
const IO_APIC_INPUTS: u32 = 24;
const LEGACY_INPUTS: u32 = 16;

const _: () = assert!(MAX_DEVICES as u64 * MEMORY_BYTES <= PCI_MEMORY_BYTES);

type Function = Arc<Mutex<dyn PciFunction>>;

/// The bus while devices are attached to it.
pub(super) struct PciBus {
    functions: Vec<Function>,
    router: Arc<Router>,
}

impl PciBus {
    pub(super) fn new(kvm: &Arc<VmFd>) -> Self {
        let router = Router { kvm: Arc::clone(kvm), messages: Mutex::default() };
        Self { functions: vec![Arc::new(Mutex::new(HostBridge::default()))], router: Arc::new(router) }
    }

    /// Attaches a device as the next on the bus, and puts its registers on the bus of memory.
    pub(super) fn attach(
        &mut self,
        mmio: &mut Bus,
        (memory, lost): (&GuestMemory, Arc<AtomicBool>),
        device: Box<dyn VirtioDevice>,
        failed: impl FnOnce(TransportError) -> VmError,
    ) -> Result<(), VmError> {
        // The configuration has made sure of it.
        assert!(self.functions.len() <= MAX_DEVICES, "the PCI bus is full");
        let base = PCI_MEMORY + (self.functions.len() as u64 - 1) * MEMORY_BYTES;
        let queues = device.queue_sizes().len();
        let events = (0..=queues).map(|_| new_event()).collect::<Result<Vec<_>, _>>()?;
        let first = self.router.add(events.len());
        for (interrupt, event) in (first..).zip(&events) {
            let failed = VmError::kvm("connect a message of a PCI device");
            self.router.kvm.register_irqfd(event, interrupt).map_err(failed)?;
        }
        let routes = DeviceRoutes { router: Arc::clone(&self.router), first };
        let messages = Arc::new(Messages::new(queues, events, Box::new(routes)));
        let mut transport =
            PciTransport::new(memory.clone(), device, messages, base as u32).map_err(failed)?;
        transport.set_memory_lost_flag(lost);
        for (queue, event) in (0..).zip(transport.queue_events()) {
            // Whatever the driver writes there, it means this queue.
            let address = IoEventAddress::Mmio(base + NOTIFY + queue * NOTIFY_STRIDE);
            let failed = VmError::kvm("connect a virtio queue");
            self.router.kvm.register_ioevent(event, &address, NoDatamatch).map_err(failed)?;
        }
        let transport = Arc::new(Mutex::new(transport));
        mmio.insert(base, MEMORY_BYTES, transport.clone());
        self.functions.push(transport);
        Ok(())
    }

    /// Puts the configuration space on the buses of memory and ports.
    pub(super) fn connect(self, mmio: &mut Bus, ports: &mut Bus) {
        let functions: Arc<[Function]> = self.functions.into();
        let space = ConfigMemory(Functions(functions.clone()));
        mmio.insert(PCI_CONFIG, PCI_CONFIG_BYTES, Arc::new(Mutex::new(space)));
        let space = ConfigPorts { functions: Functions(functions), address: 0 };
        ports.insert(PCI_PORTS.into(), 8, Arc::new(Mutex::new(space)));
    }
}

/// The functions on the bus, by device.
struct Functions(Arc<[Function]>);

impl Functions {
    /// Finds the function of an address: device, function and register, as they lie in the configuration space in
    /// memory, without the bus.
    fn find(&self, address: u64) -> Option<&Function> {
        let (device, function) = (address >> 15, address >> 12 & 7);
        self.0.get(usize::try_from(device).ok()?).filter(|_| function == 0)
    }

    fn read(&self, address: u64, data: &mut [u8]) {
        let register = (address & 0xfff) as usize;
        match self.find(address) {
            None => data.fill(0xff),
            Some(function) if is_access(register, data.len()) => {
                function.lock().read_config(register, data);
            }
            // There is no extended space: its first word is zero.
            Some(_) => data.fill(0),
        }
    }

    fn write(&self, address: u64, data: &[u8]) {
        let register = (address & 0xfff) as usize;
        if let Some(function) = self.find(address).filter(|_| is_access(register, data.len())) {
            function.lock().write_config(register, data);
        }
    }
}

/// Whether a processor can access so many bytes at once, there.
fn is_access(register: usize, bytes: usize) -> bool {
    matches!(bytes, 1 | 2 | 4) && register.is_multiple_of(bytes) && register + bytes <= CONFIG_BYTES
}

/// The configuration space in memory.
struct ConfigMemory(Functions);

impl BusDevice for ConfigMemory {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

/// The configuration space behind two ports: an address, and the data there (PCI Local Bus 3.0, section 3.2.2.3.2).
struct ConfigPorts {
    functions: Functions,
    address: u32,
}

impl ConfigPorts {
    const ENABLED: u32 = 1 << 31;
    const DATA: u64 = 4;

    /// The address as it is in memory, of an access at this offset from the first port.
    fn target(&self, offset: u64) -> Option<u64> {
        let (bus, function) = (self.address >> 16 & 0xff, u64::from(self.address >> 8 & 0xff));
        // AMD's processors have the upper bits of a register in bits 24 to 27, and Linux tries them.
        let register = u64::from(self.address & 0xfc | self.address >> 16 & 0xf00);
        let register = register + offset.checked_sub(Self::DATA)?;
        (self.address & Self::ENABLED != 0 && bus == 0).then_some(function << 12 | register)
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, self.target(offset)) {
            (0, _) if data.len() == 4 => data.copy_from_slice(&self.address.to_le_bytes()),
            (_, Some(address)) => self.functions.read(address, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 {
            if let Ok(address) = data.try_into() {
                // Bits that are always zero.
                self.address = u32::from_le_bytes(address) & 0x8fff_fffc;
            }
        } else if let Some(address) = self.target(offset) {
            self.functions.write(address, data);
        }
    }
}

/// KVM's table of interrupts.
struct Router {
    kvm: Arc<VmFd>,
    /// Address and value of each message, from interrupt 24 on, if a guest has chosen them.
    messages: Mutex<Vec<Option<(u64, u32)>>>,
}

impl Router {
    /// Reserves so many interrupts in a row, and returns the first.
    fn add(&self, count: usize) -> u32 {
        let mut messages = self.messages.lock();
        let first = messages.len();
        messages.resize(first + count, None);
        IO_APIC_INPUTS + first as u32
    }

    fn set(&self, interrupt: u32, address: u64, value: u32) -> io::Result<()> {
        let mut messages = self.messages.lock();
        let place = messages.get_mut((interrupt - IO_APIC_INPUTS) as usize);
        let Some(place) = place else { return Err(io::Error::from_raw_os_error(libc::ENOENT)) };
        let before = place.replace((address, value));
        let result = KvmIrqRouting::from_entries(&table(&messages))
            .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))
            .and_then(|table| self.kvm.set_gsi_routing(&table).map_err(io::Error::from));
        if result.is_err() {
            messages[(interrupt - IO_APIC_INPUTS) as usize] = before;
        }
        result
    }
}

/// The whole table: the controllers' inputs, and messages.
fn table(messages: &[Option<(u64, u32)>]) -> Vec<kvm_irq_routing_entry> {
    let chosen = (IO_APIC_INPUTS..).zip(messages).filter_map(|(gsi, chosen)| Some((gsi, (*chosen)?)));
    let chosen = chosen.map(|(gsi, (address, value))| message(gsi, address, value));
    controller_routes().into_iter().chain(chosen).collect()
}

/// The messages of one device.
struct DeviceRoutes {
    router: Arc<Router>,
    first: u32,
}

impl Routes for DeviceRoutes {
    fn set(&self, vector: usize, address: u64, value: u32) -> io::Result<()> {
        self.router.set(self.first + vector as u32, address, value)
    }
}

fn message(interrupt: u32, address: u64, value: u32) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi: interrupt, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    let (low, high) = (address as u32, (address >> 32) as u32);
    entry.u.msi =
        kvm_irq_routing_msi { address_lo: low, address_hi: high, data: value, ..Default::default() };
    entry
}

/// What KVM's routing is at first: each input of the IO-APIC, and of the legacy controllers.
fn controller_routes() -> Vec<kvm_irq_routing_entry> {
    let route = |gsi: u32, irqchip: u32, pin: u32| {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    (0..IO_APIC_INPUTS)
        .flat_map(|gsi| {
            let controller = if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
            let legacy = (gsi < LEGACY_INPUTS).then(|| route(gsi, controller, gsi % 8));
            [Some(route(gsi, KVM_IRQCHIP_IOAPIC, gsi)), legacy]
        })
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use samepage_devices::pci::{ConfigSpace, Identity};

    use super::*;

    /// A function with a register that can be written (0x3c), and one that says which it is.
    struct Stub(ConfigSpace);

    impl PciFunction for Stub {
        fn read_config(&mut self, register: usize, data: &mut [u8]) {
            assert!(is_access(register, data.len()));
            self.0.read(register, data);
        }

        fn write_config(&mut self, register: usize, data: &[u8]) {
            assert!(is_access(register, data.len()));
            self.0.write(register, data);
        }
    }

    fn functions() -> Arc<[Function]> {
        let function = |device| {
            let identity = Identity { vendor: 0x1af4, device, subsystem: 0, class: 0xff_0000, revision: 0 };
            Arc::new(Mutex::new(Stub(ConfigSpace::new(identity)))) as Function
        };
        [function(0), function(1), function(2)].into()
    }

    fn read<const N: usize>(device: &mut dyn BusDevice, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        device.read(offset, &mut bytes);
        bytes
    }

    #[test]
    fn memory_and_ports_reach_the_same_functions() {
        let functions = functions();
        let mut memory = ConfigMemory(Functions(functions.clone()));
        let mut ports = ConfigPorts { functions: Functions(functions), address: 0 };
        for device in 0..3_u32 {
            let id = [0xf4, 0x1a, device as u8, 0];
            assert_eq!(read(&mut memory, u64::from(device) << 15), id);
            ports.write(0, &(1 << 31 | device << 11).to_le_bytes());
            assert_eq!(read(&mut ports, 4), id);
            assert_eq!(read(&mut ports, 6), [device as u8, 0]);
            ports.write(0, &(1 << 31 | device << 11 | 0x3c).to_le_bytes());
            ports.write(4, &[device as u8 + 1]);
            assert_eq!(read(&mut memory, u64::from(device) << 15 | 0x3c), [device as u8 + 1]);
        }
        // No function 1, no device 3, no bus 1, and nothing unless the address is enabled.
        assert_eq!(read(&mut memory, 1 << 15 | 1 << 12), [0xff; 4]);
        assert_eq!(read(&mut memory, 3 << 15), [0xff; 4]);
        for address in [1 << 31 | 1 << 16, 1 << 31 | 1 << 8, 0] {
            ports.write(0, &u32::to_le_bytes(address));
            assert_eq!(read(&mut ports, 4), [0xff; 4]);
        }
        assert_eq!(read(&mut memory, 0x100), [0; 4]);
    }

    #[test]
    fn the_table_keeps_the_controllers_inputs() {
        let routes = table(&[None, Some((0xfee0_0000, 0x41)), None, Some((0xfee0_1000, 0x42))]);
        let controllers = (IO_APIC_INPUTS + LEGACY_INPUTS) as usize;
        assert!(routes[..controllers].iter().all(|route| route.type_ == KVM_IRQ_ROUTING_IRQCHIP));
        let messages: Vec<_> = routes[controllers..].iter().map(|route| (route.gsi, route.type_)).collect();
        assert_eq!(messages, [(25, KVM_IRQ_ROUTING_MSI), (27, KVM_IRQ_ROUTING_MSI)]);
    }

    proptest! {
        #[test]
        fn accesses_of_any_width_at_any_place_are_answered_or_ignored(
            accesses in prop::collection::vec(
                (any::<bool>(), any::<bool>(), prop_oneof![0_u64..0x10, 0_u64..1 << 20], 0_usize..9, any::<u32>()),
                0..100,
            ),
        ) {
            let functions = functions();
            let mut memory = ConfigMemory(Functions(functions.clone()));
            let mut ports = ConfigPorts { functions: Functions(functions), address: 0 };
            for (is_memory, is_write, offset, bytes, value) in accesses {
                let (device, offset): (&mut dyn BusDevice, _) =
                    if is_memory { (&mut memory, offset) } else { (&mut ports, offset % 8) };
                let mut data = [value.to_le_bytes(), value.to_le_bytes()].concat();
                if is_write {
                    device.write(offset, &data[..bytes]);
                } else {
                    device.read(offset, &mut data[..bytes]);
                }
                prop_assert_eq!(read(&mut memory, 1 << 15), [0xf4, 0x1a, 1, 0]);
            }
        }
    }
}
