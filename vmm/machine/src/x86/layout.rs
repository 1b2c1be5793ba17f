//! The guest's physical address space. All addresses and sizes are in bytes.
//!
//! ```text
//! 0x0000_0000  boot structures (GDT, boot parameters, page tables, command line)
//! 0x0009_fc00  legacy area, no RAM for the guest: EBDA with the multiprocessor table, VGA, option ROMs,
//!              ACPI tables from 0xf_f000, or from 0xf_e000 with many processors, VM generation ID, reset vector
//! 0x0010_0000  kernel, then free RAM; initrd at the top of low RAM
//! 0xc000_0000  gap: the memory hole and its doorbell, virtio-mmio from 0xd000_0000, or PCI's devices from
//!              0xd100_0000 and configuration space from 0xe000_0000; IO-APIC, LAPIC, KVM's own pages
//! 0x1_0000_0000  the rest of RAM
//! at a multiple of 1 GiB behind it, in a VM with so much RAM that the gap cannot hold it: the memory hole
//! ```

use samepage_devices::doorbell::DOORBELL_BYTES;
use samepage_hole::{FrameRange, bytes_for};
use samepage_sharing::PAGE_SIZE;

/// End of the RAM below 4 GiB. The gap for devices begins here.
pub const LOW_RAM_MAX: u64 = 0xc000_0000;
/// Start of the RAM above the gap.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// The smallest RAM of a VM: the boot structures and 1 MiB for a kernel.
pub const MIN_RAM: u64 = 2 << 20;
/// The largest RAM of a VM: fewer pages than 32 bits can number.
pub const MAX_RAM: u64 = (1 << 43) - HIGH_RAM_START;

/// Start of "high memory", where kernels are loaded.
pub const HIMEM_START: u64 = 0x10_0000;
/// End of the RAM below 1 MiB that guests may use.
pub const EBDA_START: u64 = 0x9_fc00;

/// The pointer to the multiprocessor table, in the last KiB below 640 KiB. Kernels search there before the BIOS area.
pub(crate) const MP_POINTER: u64 = EBDA_START;
/// Room for the pointer, and for the table where it is short.
pub(crate) const MP_BYTES: u64 = 1024;
/// A longer multiprocessor table: the start of the BIOS area.
pub(crate) const MP_LONG_TABLE: u64 = 0xf_0000;

/// ACPI's root pointer, in the area in which kernels look for it that are not told its address. The tables follow. They
/// share a page with the generation ID and the reset vector, so that a VM has one page more for all three.
pub(crate) const ACPI_START: u64 = 0xf_f000;
/// Upper limit for the pointer and the tables.
pub(crate) const ACPI_BYTES: u64 = GENERATION_ID - ACPI_START;
/// ACPI's table of processors where it is long: the page before the other tables.
pub(crate) const ACPI_LONG_MADT: u64 = ACPI_START - PAGE_SIZE as u64;
/// The VM generation ID, on a multiple of 8.
pub(crate) const GENERATION_ID: u64 = RESET_VECTOR - GENERATION_ID_BYTES as u64;
pub(crate) const GENERATION_ID_BYTES: usize = 16;
/// Where a processor in real mode starts after a reset: F000:FFF0.
pub(crate) const RESET_VECTOR: u64 = 0xf_fff0;

pub(crate) const GDT_START: u64 = 0x500;
pub(crate) const PVH_START_INFO: u64 = 0x6000;
pub(crate) const PVH_MODULES: u64 = 0x6040;
pub(crate) const PVH_MEMORY_MAP: u64 = 0x6080;
pub(crate) const ZERO_PAGE: u64 = 0x7000;
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
pub(crate) const PML4: u64 = 0x9000;
pub(crate) const PDPT: u64 = 0xa000;
/// Four page directories that map the first 4 GiB.
pub(crate) const PAGE_DIRECTORIES: u64 = 0xb000;
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line, including its terminating NUL: Linux' COMMAND_LINE_SIZE on x86.
pub const COMMAND_LINE_MAX: usize = 2048;

/// Address of the first virtio-mmio device. The others follow at steps of 4 KiB.
pub const MMIO_START: u64 = 0xd000_0000;
pub(crate) const MMIO_STRIDE: u64 = 0x1000;
/// Registers of the first device on the PCI bus. Those of the others follow.
pub(crate) const PCI_MEMORY: u64 = 0xd100_0000;
/// Length of the range for registers of devices on the PCI bus.
pub(crate) const PCI_MEMORY_BYTES: u64 = 16 << 20;
/// Configuration space of the one PCI bus: a page for each function.
pub(crate) const PCI_CONFIG: u64 = 0xe000_0000;
/// Length of the configuration space: 32 devices with 8 functions each.
pub(crate) const PCI_CONFIG_BYTES: u64 = 1 << 20;
/// Ports through which kernels without ACPI reach the configuration space.
pub(crate) const PCI_PORTS: u16 = 0xcf8;
/// Lines of the legacy interrupt controllers that no legacy device uses (0 timer, 1 keyboard, 2 cascade, 3
/// and 4 serial, 8 clock, 12 mouse, 13 coprocessor).
pub(crate) const MMIO_IRQS: [u32; 8] = [5, 6, 7, 9, 10, 11, 14, 15];
pub(crate) const KEYBOARD_IRQ: u32 = 1;
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
pub(crate) const SERIAL_IRQ: u32 = 4;
/// Power management, where no legacy device has ports.
pub(crate) const POWER_PORT: u16 = 0x600;
/// The first input of the IO-APIC behind those of the legacy interrupt controllers. Kernels without ACPI do not know it.
pub(crate) const POWER_IRQ: u32 = 16;

/// Registers of KVM's interrupt controllers, at the usual addresses of a PC.
pub(crate) const IO_APIC: u64 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u64 = 0xfee0_0000;

/// A page for real mode on Intel hardware without unrestricted guests, outside RAM.
pub(crate) const IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages for the same purpose, directly after it.
pub(crate) const TSS: u64 = IDENTITY_MAP + PAGE_SIZE as u64;
const KVM_PAGES: u64 = 4 * PAGE_SIZE as u64;

/// Boot structures do not overlap.
const _: () = {
    let page = PAGE_SIZE as u64;
    assert!(PVH_MEMORY_MAP + 24 * 8 <= ZERO_PAGE);
    assert!(ZERO_PAGE + page <= BOOT_STACK);
    assert!(PAGE_DIRECTORIES + 4 * page <= COMMAND_LINE);
    assert!(COMMAND_LINE + COMMAND_LINE_MAX as u64 <= EBDA_START);
    assert!(ACPI_START.is_multiple_of(16) && ACPI_START + ACPI_BYTES <= HIMEM_START);
    assert!(GENERATION_ID.is_multiple_of(8));
};

/// A run of guest RAM that is contiguous for the guest and in the host's reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Offset of the first byte in the VM's reservation.
    pub ram_offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Splits RAM of this length around the gap, into one or two ranges.
pub fn ram_ranges(bytes: u64) -> Vec<RamRange> {
    let low = RamRange { gpa: 0, ram_offset: 0, bytes: bytes.min(LOW_RAM_MAX) };
    let high = RamRange { gpa: HIGH_RAM_START, ram_offset: LOW_RAM_MAX, bytes: bytes - low.bytes };
    if high.bytes == 0 { vec![low] } else { vec![low, high] }
}

/// Returns RAM of this length as ranges of page frames, in the order of the RAM's pages.
pub(crate) fn frame_ranges(bytes: u64) -> Vec<FrameRange> {
    // RAM ends below 2^43 bytes, so 31 bits number its page frames.
    let frame = |bytes: u64| (bytes / PAGE_SIZE as u64) as u32;
    let ranges = ram_ranges(bytes).into_iter();
    ranges.map(|range| FrameRange { first: frame(range.gpa), count: frame(range.bytes) }).collect()
}

/// The address range of a VM's memory hole. The page after it is the doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HoleRange {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

impl HoleRange {
    /// Returns the range for a guest with RAM of this length: in the gap below 4 GiB if it fits before the
    /// devices, otherwise above all RAM.
    pub(crate) fn of(ram_bytes: u64) -> Self {
        /// The page size with which kernels map high memory.
        const ALIGNMENT: u64 = 1 << 30;
        let ram_end = ram_ranges(ram_bytes).last().map_or(0, |range| range.gpa + range.bytes);
        let frames = frame_ranges(ram_bytes).last().map_or(0, |range| range.first + range.count);
        let bytes = bytes_for(frames);
        let low = Self { start: LOW_RAM_MAX, bytes };
        if low.end() <= MMIO_START { low } else { Self { start: ram_end.next_multiple_of(ALIGNMENT), bytes } }
    }

    /// Returns the address of the doorbell.
    pub(crate) fn doorbell(self) -> u64 {
        self.start + self.bytes
    }

    /// Returns the first address after hole and doorbell.
    pub(crate) fn end(self) -> u64 {
        self.doorbell() + DOORBELL_BYTES
    }
}

/// The type of a range in the guest's memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MapKind {
    Ram,
    Reserved,
}

impl MapKind {
    /// Returns the type's number, the same in e820 and in PVH's memory map.
    pub(crate) fn number(self) -> u32 {
        match self {
            MapKind::Ram => 1,
            MapKind::Reserved => 2,
        }
    }
}

/// An entry of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MapEntry {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    pub(crate) kind: MapKind,
}

/// Returns the memory map of a guest with RAM of this length, with or without a memory hole, by ascending
/// address.
pub(crate) fn memory_map(bytes: u64, hole: Option<HoleRange>) -> Vec<MapEntry> {
    let low_end = bytes.min(LOW_RAM_MAX);
    let mut map = vec![
        MapEntry { start: 0, bytes: EBDA_START, kind: MapKind::Ram },
        MapEntry { start: EBDA_START, bytes: HIMEM_START - EBDA_START, kind: MapKind::Reserved },
        MapEntry { start: HIMEM_START, bytes: low_end - HIMEM_START, kind: MapKind::Ram },
        // Kernels use no configuration space that could be RAM or a place for devices.
        MapEntry { start: PCI_CONFIG, bytes: PCI_CONFIG_BYTES, kind: MapKind::Reserved },
        MapEntry { start: IDENTITY_MAP, bytes: KVM_PAGES, kind: MapKind::Reserved },
    ];
    if bytes > LOW_RAM_MAX {
        map.push(MapEntry { start: HIGH_RAM_START, bytes: bytes - LOW_RAM_MAX, kind: MapKind::Ram });
    }
    map.extend(hole.map(|hole| MapEntry {
        start: hole.start,
        bytes: hole.end() - hole.start,
        kind: MapKind::Reserved,
    }));
    map.sort_by_key(|entry| entry.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_is_split_around_the_gap() {
        assert_eq!(ram_ranges(GIB), [RamRange { gpa: 0, ram_offset: 0, bytes: GIB }]);
        assert_eq!(ram_ranges(3 * GIB), [RamRange { gpa: 0, ram_offset: 0, bytes: 3 * GIB }]);
        assert_eq!(
            ram_ranges(5 * GIB),
            [
                RamRange { gpa: 0, ram_offset: 0, bytes: 3 * GIB },
                RamRange { gpa: 4 * GIB, ram_offset: 3 * GIB, bytes: 2 * GIB },
            ]
        );
    }

    #[test]
    fn the_memory_map_is_sorted_disjoint_and_holds_all_ram_but_the_legacy_area() {
        for bytes in [MIN_RAM, GIB, 3 * GIB, 3 * GIB + 4096, 6 * GIB, 300 * GIB, MAX_RAM] {
            for hole in [None, Some(HoleRange::of(bytes))] {
                let map = memory_map(bytes, hole);
                let ends = map.iter().map(|entry| entry.start + entry.bytes);
                assert!(ends.zip(&map[1..]).all(|(end, next)| end <= next.start), "{map:x?}");
                let ram: u64 = map.iter().filter(|e| e.kind == MapKind::Ram).map(|e| e.bytes).sum();
                assert_eq!(ram, bytes - (HIMEM_START - EBDA_START));
                let reserved = |address| {
                    let entry = map.iter().find(|e| (e.start..e.start + e.bytes).contains(&address));
                    entry.is_some_and(|entry| entry.kind == MapKind::Reserved)
                };
                assert!(hole.is_none_or(|hole| reserved(hole.start) && reserved(hole.end() - 1)));
            }
        }
    }

    #[test]
    fn the_hole_lies_in_the_gap_or_above_all_ram() {
        for bytes in [MIN_RAM, GIB, 3 * GIB, 200 * GIB] {
            let hole = HoleRange::of(bytes);
            assert_eq!(hole.start, LOW_RAM_MAX);
            assert!(hole.end() <= MMIO_START);
        }
        assert_eq!(HoleRange::of(GIB).bytes, GIB / 1024 + 3 * 4096);
        let hole = HoleRange::of(300 * GIB + 4096);
        assert_eq!(hole.start, 302 * GIB);
        assert_eq!(hole.bytes, bytes_for((301 << 18) + 1));
        let hole = HoleRange::of(MAX_RAM);
        assert_eq!(hole.start, (8 << 40) - 3 * GIB);
        assert!(hole.bytes > 8 * GIB && hole.bytes < 9 * GIB);
    }

    #[test]
    fn page_frames_are_counted_on_both_sides_of_the_gap() {
        assert_eq!(frame_ranges(GIB), [FrameRange { first: 0, count: 1 << 18 }]);
        assert_eq!(
            frame_ranges(5 * GIB),
            [FrameRange { first: 0, count: 3 << 18 }, FrameRange { first: 4 << 18, count: 2 << 18 }]
        );
    }
}
