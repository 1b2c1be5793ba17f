//! The tables, read as a kernel reads them, and by `iasl`.

use std::path::Path;
use std::process::Command;

use samepage_devices::BusDevice;
use samepage_devices::i8042::I8042;
use samepage_devices::power::Power;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::vm::virtio::{MAX_VIRTIO, mmio_devices};
use crate::x86::layout::{
    GENERATION_ID, GENERATION_ID_BYTES, MIN_RAM, MapKind, PCI_CONFIG_BYTES, POWER_IRQ, memory_map,
};

/// As many devices as there can be.
fn virtio() -> Vec<VirtioMmio> {
    mmio_devices(MAX_VIRTIO).collect()
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn qword(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at a guest address: its signature is that one, its checksum is right.
fn table<'a>(tables: &'a Tables, address: u64, signature: &[u8; 4]) -> &'a [u8] {
    assert!(address.is_multiple_of(16));
    let rest = match address.checked_sub(ACPI_START) {
        Some(offset) => &tables.bytes[offset as usize..],
        None => &tables.long_madt[(address - ACPI_LONG_MADT) as usize..],
    };
    assert_eq!(&rest[..4], signature);
    let table = &rest[..dword(rest, 4) as usize];
    assert_eq!(sum(table), 0, "the checksum of {}", String::from_utf8_lossy(signature));
    table
}

/// FADT, MADT and DSDT, found from the root pointer on.
fn find(tables: &Tables) -> [&[u8]; 3] {
    let pointer = &tables.bytes[..36];
    assert_eq!(&pointer[..8], b"RSD PTR ");
    assert_eq!((sum(&pointer[..20]), sum(pointer)), (0, 0));
    assert_eq!((pointer[15], dword(pointer, 20)), (2, 36));
    let xsdt = table(tables, qword(pointer, 24), b"XSDT");
    assert!(matches!(xsdt.len() - 36, 16 | 24));
    let fadt = table(tables, qword(xsdt, 36), b"FACP");
    let madt = table(tables, qword(xsdt, 44), b"APIC");
    [fadt, madt, table(tables, qword(fadt, 140), b"DSDT")]
}

/// The port of a register of one byte.
fn port(table: &[u8], at: usize) -> u16 {
    assert_eq!(table[at..at + 4], [1, 8, 0, 1]);
    qword(table, at + 4).try_into().unwrap()
}

#[test]
fn all_tables_are_found_and_lie_in_reserved_memory() {
    let map = memory_map(MIN_RAM, None);
    let is_reserved = |start, end| {
        let entry = map.iter().find(|entry| (entry.start..entry.start + entry.bytes).contains(&start));
        let entry = entry.expect("the memory map has the area");
        entry.kind == MapKind::Reserved && end <= entry.start + entry.bytes
    };
    for (vcpus, virtio) in [(1, vec![]), (1, virtio()), (FEW_VCPUS, virtio()), (254, virtio())] {
        let tables = Tables::new(vcpus, &virtio, false);
        assert_eq!(tables.long_madt.is_empty(), vcpus <= FEW_VCPUS);
        let [fadt, _, dsdt] = find(&tables).map(|table| table.as_ptr_range().end);
        assert!([fadt, dsdt].iter().all(|end| *end <= tables.bytes.as_ptr_range().end));
        let end = ACPI_START + tables.bytes.len() as u64;
        assert!(end <= GENERATION_ID && is_reserved(ACPI_LONG_MADT, end));
        assert!(tables.long_madt.len() as u64 <= ACPI_START - ACPI_LONG_MADT);
    }
    assert!(is_reserved(GENERATION_ID, GENERATION_ID + GENERATION_ID_BYTES as u64));
}

#[test]
fn the_registers_of_the_fixed_description_reset_the_machine_and_turn_it_off() {
    let tables = Tables::new(1, &[], false);
    let [fadt, ..] = find(&tables);
    let flags = dword(fadt, 112);
    assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5));
    assert_eq!(flags & (1 << 20 | 1 << 10 | 1 << 4), 1 << 20 | 1 << 10 | 1 << 4);

    let mut keyboard = I8042::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let offset = port(fadt, 116) - i8042::BASE_PORT;
    keyboard.write(offset.into(), &[fadt[128]]);
    assert!(keyboard.wants_reset());

    let mut power = Power::default();
    let control = port(fadt, 244) - POWER_PORT;
    assert!(port(fadt, 256) - POWER_PORT < power::PORTS);
    power.write(control.into(), &[power::SOFT_OFF << 2 | 1 << 5]);
    assert!(power.is_off());
}

#[test]
fn every_processor_has_an_apic_and_no_two_apics_one_number() {
    for vcpus in [1, 2, 254] {
        let tables = Tables::new(vcpus, &[], false);
        let [_, madt, _] = find(&tables);
        assert_eq!(u64::from(dword(madt, 36)), LOCAL_APIC);
        // Neither 8259 controllers, nor overrides.
        assert_eq!(dword(madt, 40), 0);
        let (processors, rest) = madt[44..].split_at(usize::from(vcpus) * 8);
        let expected = |number: u8| [0, 8, number, number, 1, 0, 0, 0];
        assert!(processors.chunks(8).zip(0..).all(|(entry, number)| entry == expected(number)));
        assert_eq!((rest.len(), &rest[..4]), (12, &[1, 12, vcpus, 0][..]));
        assert_eq!((u64::from(dword(rest, 4)), dword(rest, 8)), (IO_APIC, 0));
    }
}

#[test]
fn the_pci_bus_is_described_where_there_is_one() {
    let tables = Tables::new(254, &[], true);
    assert!(tables.bytes.len() as u64 <= ACPI_BYTES);
    let xsdt = table(&tables, qword(&tables.bytes, 24), b"XSDT");
    assert_eq!(xsdt.len(), 36 + 3 * 8);
    let mcfg = table(&tables, qword(xsdt, 52), b"MCFG");
    assert_eq!((mcfg.len(), qword(mcfg, 44), &mcfg[52..56]), (60, PCI_CONFIG, &[0; 4][..]));
    let fadt = table(&tables, qword(xsdt, 36), b"FACP");
    // Messages are allowed.
    assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]) & NO_MSI, 0);
    let map = memory_map(MIN_RAM, None);
    let entry = map.iter().find(|entry| entry.start == PCI_CONFIG).expect("the memory map has the space");
    assert_eq!((entry.bytes, entry.kind), (PCI_CONFIG_BYTES, MapKind::Reserved));
}

#[test]
fn only_virtio_devices_share_interrupts() {
    let mut lines: Vec<_> = virtio().iter().map(|device| device.irq).collect();
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), MAX_VIRTIO / 2);
    // KVM's IO-APIC has 24 inputs.
    assert!(lines.iter().all(|line| *line < 24 && ![1, 4, POWER_IRQ].contains(line)));
}

/// Runs ACPI's compiler in a folder, and returns what it prints.
fn iasl(dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new("iasl").args(arguments).current_dir(dir).output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "iasl {arguments:?}: {said}");
    said
}

#[test]
fn acpi_s_own_compiler_takes_the_tables_apart_and_puts_the_devices_together_again() {
    if let Err(error) = Command::new("iasl").arg("-v").output() {
        eprintln!("SKIPPED: iasl cannot be run: {error}; `cargo xtask setup` installs it");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tables = Tables::new(2, &virtio(), true);
    let [fadt, madt, dsdt] = find(&tables);
    for (name, table) in [("fadt", fadt), ("madt", madt), ("dsdt", dsdt)] {
        std::fs::write(dir.path().join(name).with_extension("dat"), table).unwrap();
        let said = iasl(dir.path(), &["-d", &format!("{name}.dat")]);
        assert!(!said.contains("Error") && !said.contains("Warning"), "{name}: {said}");
    }
    let source = std::fs::read_to_string(dir.path().join("dsdt.dsl")).unwrap();
    assert_eq!(source.matches("LNRO0005").count(), MAX_VIRTIO, "{source}");
    let devices = ["PNP0A08", "PNP0501", "PNP0303", "PNP0C0C", "ACPI0013", "_S5"];
    let generation = ["\"VM_Gen_Counter\"", "\"VMGENCTR\"", "0x000FFFE0"];
    let notified = ["Notify (\\_SB.PWRB, 0x80)", "Notify (\\_SB.VGEN, 0x80)"];
    for part in devices.into_iter().chain(generation).chain(notified) {
        assert!(source.contains(part), "no {part} in {source}");
    }
    let said = iasl(dir.path(), &["-oa", "-p", "again", "dsdt.dsl"]);
    assert!(said.contains("0 Errors, 0 Warnings"), "{said}");
    let again = std::fs::read(dir.path().join("again.aml")).unwrap();
    // Behind the header, which names the compiler.
    assert_eq!(again[36..], dsdt[36..]);
}
