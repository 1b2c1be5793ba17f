//! The tables that tell a kernel with ACPI of its processors, interrupt controllers and devices.
//!
//! The machine is a *hardware-reduced* one: it has none of ACPI's fixed registers but those for sleep and reset, and no
//! system control interrupt. Kernels then ignore the 8259 interrupt controllers and the PIT. Input N of the IO-APIC is
//! global system interrupt N, as in KVM's default routing, so there are no overrides.
//!
//! Kernels that have both ACPI and virtio devices on the command line hear of each device twice. The tables come first,
//! and who comes second finds the registers taken (EBUSY), so that each device has one driver. Such a kernel logs the
//! second attempt. The command line stays as it is: whether a kernel has ACPI cannot be told from its image.
//!
//! ```text
//! RSDP ── XSDT ─┬─ FADT ── DSDT     fixed features; devices, in AML
//!               ├─ MADT             processors and interrupt controllers
//!               └─ MCFG             the PCI bus's configuration space, if there is a bus
//! ```
//!
//! Source: Advanced Configuration and Power Interface Specification 6.5, chapter 5. Fields are little-endian.

mod devices;
#[cfg(test)]
mod tests;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use samepage_devices::{GuestMemory, i8042, power};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{ACPI_BYTES, ACPI_LONG_MADT, ACPI_START, IO_APIC, LOCAL_APIC, PCI_CONFIG, POWER_PORT};

const MAKER: [u8; 6] = *b"SAMEPG";
const PRODUCT: [u8; 8] = *b"MICROVM ";
const REVISION: u32 = 1;
const DSDT_REVISION: u8 = 6;
/// Length of the header that all tables but the root pointer begin with.
const HEADER_BYTES: u32 = 36;
/// Tables begin on a boundary of so many bytes, as the root pointer has to.
const ALIGNMENT: usize = 16;
/// With more processors, their table is in a page of its own.
const FEW_VCPUS: u8 = 128;

/// Boot architecture: legacy devices on ports, an 8042; no VGA, no MSI, no PCIe power management, no clock in CMOS.
const BOOT_ARCHITECTURE: u16 = 0b11_1111;
/// The bit for no MSI.
const NO_MSI: u16 = 1 << 3;
/// What resets the machine: the keyboard controller's command register and its command that pulses the reset line.
const RESET_PORT: u16 = i8042::BASE_PORT + i8042::PORTS - 1;
const RESET_COMMAND: u8 = 0xfe;

/// A virtio device with MMIO registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VirtioMmio {
    /// Address of the registers.
    pub(crate) base: u64,
    /// Input of the IO-APIC.
    pub(crate) irq: u32,
}

/// Writes the tables of a machine with `vcpus` processors and these devices, in the order in which kernels are to find
/// them.
pub(crate) fn write(
    memory: &GuestMemory,
    vcpus: u8,
    virtio: &[VirtioMmio],
    has_pci: bool,
) -> Result<(), GuestMemoryError> {
    let Tables { bytes, long_madt } = Tables::new(vcpus, virtio, has_pci);
    memory.write_slice(&bytes, GuestAddress(ACPI_START))?;
    memory.write_slice(&long_madt, GuestAddress(ACPI_LONG_MADT))
}

struct Tables {
    /// Root pointer and tables, as they lie at [`ACPI_START`].
    bytes: Vec<u8>,
    /// The table of many processors, as it lies at [`ACPI_LONG_MADT`]; empty where the processors are few.
    long_madt: Vec<u8>,
}

impl Tables {
    fn new(vcpus: u8, virtio: &[VirtioMmio], has_pci: bool) -> Self {
        // The root pointer is written when the address behind it is known.
        let mut tables = Self { bytes: vec![0; Rsdp::len()], long_madt: Vec::new() };
        let dsdt = tables.add(&dsdt(virtio, has_pci));
        let fadt = tables.add(&fadt(dsdt, has_pci));
        let madt = if vcpus <= FEW_VCPUS {
            tables.add(&madt(vcpus))
        } else {
            madt(vcpus).to_aml_bytes(&mut tables.long_madt);
            ACPI_LONG_MADT
        };
        let mut xsdt = XSDT::new(MAKER, PRODUCT, REVISION);
        [fadt, madt].into_iter().for_each(|table| xsdt.add_entry(table));
        if has_pci {
            xsdt.add_entry(tables.add(&mcfg()));
        }
        let xsdt = tables.add(&xsdt);
        let mut pointer = Vec::with_capacity(Rsdp::len());
        Rsdp::new(MAKER, xsdt).to_aml_bytes(&mut pointer);
        tables.bytes[..pointer.len()].copy_from_slice(&pointer);
        // Interrupt lines bound the number of devices, and the type that of processors. A test has most of both.
        let is_short = tables.long_madt.len() as u64 <= ACPI_START - ACPI_LONG_MADT;
        assert!(tables.bytes.len() as u64 <= ACPI_BYTES && is_short, "the ACPI tables are too long");
        tables
    }

    /// Adds a table, and returns its guest address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = ACPI_START + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// The differentiated system description: the devices.
fn dsdt(virtio: &[VirtioMmio], has_pci: bool) -> Sdt {
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, MAKER, PRODUCT, REVISION);
    table.append_slice(&devices::aml(virtio, has_pci));
    table
}

/// The fixed description: what the machine lacks, and how it is reset and put to sleep.
fn fadt(dsdt: u64, has_pci: bool) -> FADT {
    let flags = [
        Flags::HwReducedAcpi,
        Flags::ResetRegSup,
        Flags::Wbinvd,
        // No buttons with fixed registers: the power button is a device.
        Flags::PwrButton,
        Flags::SlpButton,
    ];
    let mut table = flags.into_iter().fold(FADTBuilder::new(MAKER, PRODUCT, REVISION), FADTBuilder::flag);
    table = table.dsdt_64(dsdt);
    let boot_architecture = if has_pci { BOOT_ARCHITECTURE & !NO_MSI } else { BOOT_ARCHITECTURE };
    table.iapc_boot_arch = boot_architecture.into();
    table.reset_reg = byte_port(RESET_PORT);
    table.reset_value = RESET_COMMAND;
    table.sleep_control_reg = byte_port(POWER_PORT + power::SLEEP_CONTROL);
    table.sleep_status_reg = byte_port(POWER_PORT + power::SLEEP_STATUS);
    table.hypervisor_vendor_identity = u64::from_le_bytes(*b"SAMEPAGE").into();
    table.finalize()
}

/// Where the configuration space of the PCI bus is.
fn mcfg() -> MCFG {
    let mut table = MCFG::new(MAKER, PRODUCT, REVISION);
    table.add_ecam(PCI_CONFIG, 0, 0, 0);
    table
}

fn byte_port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

/// The interrupt controllers: a local APIC for each processor, whose number is its APIC's, and the IO-APIC.
fn madt(vcpus: u8) -> MADT {
    // The addresses lie below 4 GiB, where every PC has these controllers.
    let mut table = MADT::new(MAKER, PRODUCT, REVISION, LocalInterruptController::Address(LOCAL_APIC as u32));
    for number in 0..vcpus {
        table.add_structure(ProcessorLocalApic::new(number, number, EnabledStatus::Enabled));
    }
    // The first number that is no processor's.
    table.add_structure(IoApic::new(vcpus, IO_APIC as u32, 0));
    table
}
