//! The multiprocessor table, which describes the processors and the interrupt controllers to a kernel without
//! ACPI.
//!
//! Kernels search for its floating pointer in several places, first in the last KiB of conventional memory.
//! Without a pointer, they search all places and then do not use the IO-APIC. KVM's default routing connects
//! interrupt line N to pin N of the IO-APIC. The table says the same. APIC ids have 8 bits there, which is enough for
//! all vCPUs that a VM can have.
//!
//! Source: Intel MultiProcessor Specification 1.4, chapter 4. All fields are little-endian.

use samepage_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{ACPI_LONG_MADT, HIMEM_START, IO_APIC, LOCAL_APIC, MP_BYTES, MP_LONG_TABLE, MP_POINTER};

const SPECIFICATION_1_4: u8 = 4;
const POINTER_BYTES: usize = 16;
const POINTER_CHECKSUM: usize = 10;
const HEADER_BYTES: usize = 44;
const HEADER_CHECKSUM: usize = 7;
/// Two OEM fields of 8 and 12 bytes, padded with blanks.
const MAKER_AND_PRODUCT: &[u8; 20] = b"SAMEPAGEMICROVM     ";

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC_ENTRY: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
/// Family 6, and the two features that matter here: a floating-point unit and a local APIC. Kernels use CPUID
/// for the other features.
const SIGNATURE: u32 = 0x600;
const FEATURES: u32 = 1 << 9 | 1;
/// The versions in the registers of KVM's controllers.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;

/// The first processor's APIC.
const BOOT_APIC_ID: u8 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;
const ISA_BUS: u8 = 0;
/// The line between the two 8259 controllers, which has no device.
const CASCADE: u8 = 2;

/// The delivery of an interrupt.
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;

/// Writes the floating pointer and the table of a machine with so many processors. A processor's number is its APIC
/// id.
pub(crate) fn write(memory: &GuestMemory, vcpus: u8) -> Result<(), GuestMemoryError> {
    let Tables { pointer, table, address } = Tables::new(vcpus);
    memory.write_slice(&pointer, GuestAddress(MP_POINTER))?;
    memory.write_slice(&table, GuestAddress(address))
}

/// The pointer at [`MP_POINTER`], and the table at its address.
struct Tables {
    pointer: Vec<u8>,
    table: Vec<u8>,
    address: u64,
}

impl Tables {
    fn new(vcpus: u8) -> Self {
        let table = table(vcpus);
        let is_short = POINTER_BYTES + table.len() <= MP_BYTES as usize;
        let address = if is_short { MP_POINTER + POINTER_BYTES as u64 } else { MP_LONG_TABLE };
        let mut pointer = Vec::from(b"_MP_");
        pointer.extend((address as u32).to_le_bytes());
        pointer.extend([(POINTER_BYTES / 16) as u8, SPECIFICATION_1_4, 0]);
        pointer.extend([0; 5]); // a table and no default configuration; interrupts by virtual wire at first
        pointer[POINTER_CHECKSUM] = checksum(&pointer);
        Self { pointer, table, address }
    }
}

fn table(vcpus: u8) -> Vec<u8> {
    let entries = entries(vcpus);
    let table_bytes = HEADER_BYTES + entries.iter().map(Vec::len).sum::<usize>();
    let mut table = Vec::with_capacity(table_bytes);
    table.extend(b"PCMP");
    table.extend((table_bytes as u16).to_le_bytes());
    table.extend([SPECIFICATION_1_4, 0]);
    table.extend(MAKER_AND_PRODUCT);
    table.extend([0; 6]); // no OEM table: its address and its size
    table.extend((entries.len() as u16).to_le_bytes());
    table.extend((LOCAL_APIC as u32).to_le_bytes());
    table.extend([0; 4]); // no extended table
    table.extend(entries.concat());
    table[HEADER_CHECKSUM] = checksum(&table);
    table
}

/// Returns the entries by ascending type, as the specification requires.
fn entries(vcpus: u8) -> Vec<Vec<u8>> {
    let processors = (0..vcpus).map(|number| {
        let boots = if number == BOOT_APIC_ID { BOOT_PROCESSOR } else { 0 };
        let mut processor = vec![PROCESSOR, number, LOCAL_APIC_VERSION, ENABLED | boots];
        processor.extend(SIGNATURE.to_le_bytes());
        processor.extend(FEATURES.to_le_bytes());
        processor.extend([0; 8]);
        processor
    });
    // The first number that is no processor's.
    let io_apic_id = vcpus;
    let mut bus = vec![BUS, ISA_BUS];
    bus.extend(b"ISA   ");
    let mut io_apic = vec![IO_APIC_ENTRY, io_apic_id, IO_APIC_VERSION, ENABLED];
    io_apic.extend((IO_APIC as u32).to_le_bytes());
    let lines = (0..16).filter(|&line| line != CASCADE);
    // Zero flags: polarity and trigger of the bus, which for ISA is a rising edge.
    let interrupts = lines.map(|line| vec![IO_INTERRUPT, VECTORED, 0, 0, ISA_BUS, line, io_apic_id, line]);
    let local = [
        vec![LOCAL_INTERRUPT, EXTERNAL, 0, 0, ISA_BUS, 0, BOOT_APIC_ID, 0],
        vec![LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1],
    ];
    processors.chain([bus, io_apic]).chain(interrupts).chain(local).collect()
}

/// Returns the byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// The pointer is where kernels search for it, on a boundary of 16 bytes. All lies outside their RAM.
const _: () = {
    const LONGEST: u64 = 8192;
    assert!(MP_POINTER.is_multiple_of(16) && MP_POINTER + MP_BYTES <= MP_LONG_TABLE);
    assert!(MP_LONG_TABLE + LONGEST <= ACPI_LONG_MADT && ACPI_LONG_MADT < HIMEM_START);
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::layout::{EBDA_START, MIN_RAM, MMIO_IRQS, MapKind, SERIAL_IRQ, memory_map};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// The entries of a table, read as a kernel reads them.
    fn read_entries(table: &[u8]) -> Vec<&[u8]> {
        let mut rest = &table[HEADER_BYTES..];
        let mut entries = Vec::new();
        while let Some(kind) = rest.first() {
            let (entry, behind) = rest.split_at(if *kind == PROCESSOR { 20 } else { 8 });
            entries.push(entry);
            rest = behind;
        }
        entries
    }

    #[test]
    fn pointer_and_table_are_found_whole() {
        for vcpus in [1, 4, 40, 41, 254] {
            let Tables { pointer, table, address } = Tables::new(vcpus);
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(u64::from(word(&pointer, 4)), address);
            assert_eq!((pointer.len(), pointer[8], sum(&pointer)), (POINTER_BYTES, 1, 0));
            assert_eq!(&table[..4], b"PCMP");
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(sum(&table), 0);
            assert_eq!(word(&table, 36), 0xfee0_0000);
            assert_eq!(usize::from(u16::from_le_bytes([table[34], table[35]])), read_entries(&table).len());
            let room = match address {
                MP_LONG_TABLE => MP_LONG_TABLE..ACPI_LONG_MADT,
                _ => EBDA_START..EBDA_START + MP_BYTES,
            };
            assert!(room.contains(&address) && address + table.len() as u64 <= room.end, "{vcpus}");
            let map = memory_map(MIN_RAM, None);
            let entry = map.iter().find(|entry| (entry.start..entry.start + entry.bytes).contains(&address));
            assert_eq!(entry.map(|entry| entry.kind), Some(MapKind::Reserved));
        }
    }

    #[test]
    fn the_entries_are_sorted_and_name_all_processors_one_bus_and_one_io_apic() {
        for vcpus in [1, 2, 254] {
            let table = table(vcpus);
            let entries = read_entries(&table);
            assert!(entries.is_sorted_by_key(|entry| entry[0]));
            let (processors, others) = entries.split_at(vcpus.into());
            assert_eq!(processors[0][..4], [0, 0, 0x14, 3]);
            let expected = |number: u8| [0, number, 0x14, 1];
            assert!((1..).zip(&processors[1..]).all(|(number, entry)| entry[..4] == expected(number)));
            assert_eq!(others[0], b"\x01\x00ISA   ");
            assert_eq!(others[1][..4], [2, vcpus, 0x11, 1]);
            assert_eq!(word(others[1], 4), 0xfec0_0000);
            assert_eq!(others[2][0], IO_INTERRUPT);
        }
    }

    #[test]
    fn every_device_has_a_pin_and_the_cascade_has_none() {
        let table = table(3);
        let entries = read_entries(&table);
        let pin = |line: u32| {
            let of_line = |entry: &&&[u8]| entry[0] == IO_INTERRUPT && u32::from(entry[5]) == line;
            entries.iter().find(of_line).map(|entry| (entry[1], entry[6], u32::from(entry[7])))
        };
        for line in MMIO_IRQS.into_iter().chain([0, SERIAL_IRQ]) {
            assert_eq!(pin(line), Some((VECTORED, 3, line)));
        }
        assert_eq!(pin(CASCADE.into()), None);
    }

    #[test]
    fn the_local_inputs_are_wired_as_the_registers_are_set() {
        let table = table(2);
        let entries = read_entries(&table);
        let local: Vec<_> = entries.iter().filter(|entry| entry[0] == LOCAL_INTERRUPT).collect();
        assert_eq!(local.iter().map(|entry| (entry[1], entry[7])).collect::<Vec<_>>(), [(3, 0), (1, 1)]);
    }
}
