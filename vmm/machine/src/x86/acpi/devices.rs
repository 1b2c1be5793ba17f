//! The devices of the machine in AML, ACPI's byte code.
//!
//! The power button is a device without registers. When it is pressed, the generic event device has its interrupt;
//! the kernel then runs `_EVT`, which reads the register of events and notifies the button's driver. The driver of the
//! VM generation ID learns of a new ID in the same way.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, ONE,
    OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use samepage_devices::{i8042, power, serial};

use super::VirtioMmio;
use crate::x86::layout::{
    GENERATION_ID, KEYBOARD_IRQ, MMIO_STRIDE, PCI_CONFIG, PCI_CONFIG_BYTES, PCI_MEMORY, PCI_MEMORY_BYTES,
    PCI_PORTS, POWER_IRQ, POWER_PORT, SERIAL_IRQ, SERIAL_PORT,
};

/// What a driver is notified of when its button was pressed.
const BUTTON_PRESSED: u8 = 0x80;
/// What the driver of the VM generation ID is notified of when the ID is another one.
const GENERATION_CHANGED: u8 = 0x80;

/// Returns the code of all devices and of the one sleeping state.
pub(super) fn aml(virtio: &[VirtioMmio], has_pci: bool) -> Vec<u8> {
    let mut devices = Vec::new();
    serial_port(&mut devices);
    keyboard(&mut devices);
    power_button(&mut devices);
    generation_id(&mut devices);
    event_device(&mut devices);
    for (number, device) in (0..).zip(virtio) {
        virtio_mmio(number, device, &mut devices);
    }
    if has_pci {
        pci_bus(&mut devices);
    }
    let mut code = Scope::raw(Path::new("\\_SB_"), devices);
    let off = Package::new(vec![&power::SOFT_OFF, &ZERO, &ZERO, &ZERO]);
    Name::new(Path::new("_S5_"), &off).to_aml_bytes(&mut code);
    code
}

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

/// What a device uses.
fn resources(resources: Vec<&dyn Aml>) -> Name {
    name("_CRS", &ResourceTemplate::new(resources))
}

/// An interrupt as all devices here have it: a rising edge, for one device alone.
fn edge(irq: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, irq)
}

/// A number of ports from one on.
fn ports(first: u16, count: u16) -> IO {
    IO::new(first, first, 1, count as u8)
}

fn serial_port(code: &mut Vec<u8>) {
    let (registers, interrupt) = (ports(SERIAL_PORT, serial::PORTS), edge(SERIAL_IRQ));
    Device::new(
        Path::new("COM1"),
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &ZERO),
            &resources(vec![&registers, &interrupt]),
        ],
    )
    .to_aml_bytes(code);
}

fn keyboard(code: &mut Vec<u8>) {
    let data = ports(i8042::BASE_PORT, 1);
    let commands = ports(i8042::BASE_PORT + i8042::PORTS - 1, 1);
    Device::new(
        Path::new("PS2K"),
        vec![
            &name("_HID", &EISAName::new("PNP0303")),
            &resources(vec![&data, &commands, &edge(KEYBOARD_IRQ)]),
        ],
    )
    .to_aml_bytes(code);
}

fn power_button(code: &mut Vec<u8>) {
    let hid = name("_HID", &EISAName::new("PNP0C0C"));
    Device::new(Path::new("PWRB"), vec![&hid, &name("_UID", &ZERO)]).to_aml_bytes(code);
}

/// The VM generation ID. The first compatible ID is the one of the specification, which is longer than ACPI allows;
/// the second is what Hyper-V has beside it, and what Linux looks for.
///
/// Source: Microsoft, Virtual Machine Generation ID (2012), which asks for the names, the package ADDR with the lower
/// and the upper half of the address, and the notification.
fn generation_id(code: &mut Vec<u8>) {
    // It lies below 1 MiB.
    let address = GENERATION_ID as u32;
    Device::new(
        Path::new("VGEN"),
        vec![
            &name("_HID", &"SMPG0001"),
            &name("_CID", &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"])),
            &name("_DDN", &"VM_Gen_Counter"),
            &name("_UID", &ZERO),
            &name("ADDR", &Package::new(vec![&address, &ZERO])),
        ],
    )
    .to_aml_bytes(code);
}

fn event_device(code: &mut Vec<u8>) {
    let register = POWER_PORT + power::EVENTS;
    let happened = FieldEntry::Named(*b"EVTS", 8);
    let (button, generation) = (Path::new("\\_SB_.PWRB"), Path::new("\\_SB_.VGEN"));
    Device::new(
        Path::new("GED_"),
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &ZERO),
            &resources(vec![&edge(POWER_IRQ)]),
            &OpRegion::new(Path::new("EVTR"), OpRegionSpace::SystemIO, &register, &ONE),
            &Field::new(
                Path::new("EVTR"),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![happened],
            ),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![
                    // One read alone: it clears the register.
                    &Store::new(&Local(0), &Path::new("EVTS")),
                    &And::new(&Local(1), &Local(0), &power::BUTTON_PRESSED),
                    &If::new(&Local(1), vec![&Notify::new(&button, &BUTTON_PRESSED)]),
                    &And::new(&Local(1), &Local(0), &power::GENERATION_CHANGED),
                    &If::new(&Local(1), vec![&Notify::new(&generation, &GENERATION_CHANGED)]),
                ],
            ),
        ],
    )
    .to_aml_bytes(code);
}

/// The host bridge, with all that devices behind it can use, and what its configuration space takes. No device there
/// has an interrupt line.
fn pci_bus(code: &mut Vec<u8>) {
    let bus = AddressSpace::new_bus_number(0_u16, 0_u16);
    // Both lie below 4 GiB.
    let (first, last) = (PCI_MEMORY as u32, (PCI_MEMORY + PCI_MEMORY_BYTES - 1) as u32);
    let memory = AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None);
    Device::new(
        Path::new("PCI0"),
        vec![
            &name("_HID", &EISAName::new("PNP0A08")),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_SEG", &ZERO),
            &name("_BBN", &ZERO),
            &name("_UID", &ZERO),
            &name("_CCA", &ONE),
            &resources(vec![&bus, &ports(PCI_PORTS, 8), &memory]),
        ],
    )
    .to_aml_bytes(code);
    let space = Memory32Fixed::new(true, PCI_CONFIG as u32, PCI_CONFIG_BYTES as u32);
    Device::new(
        Path::new("PCIC"),
        vec![&name("_HID", &EISAName::new("PNP0C02")), &name("_UID", &ZERO), &resources(vec![&space])],
    )
    .to_aml_bytes(code);
}

fn virtio_mmio(number: u32, device: &VirtioMmio, code: &mut Vec<u8>) {
    // The gap for devices lies below 4 GiB.
    let registers = Memory32Fixed::new(true, device.base as u32, MMIO_STRIDE as u32);
    // There are more devices than lines.
    let shared = Interrupt::new(true, true, false, true, device.irq);
    Device::new(
        Path::new(&format!("V{number:03}")),
        vec![
            &name("_HID", &"LNRO0005"),
            &name("_UID", &number),
            // Its accesses to memory are seen by the processors' caches.
            &name("_CCA", &ONE),
            &resources(vec![&registers, &shared]),
        ],
    )
    .to_aml_bytes(code);
}
