//! The kernel's parameters at its start: PVH's start info, or Linux' boot parameters ("zero page").
//!
//! Sources: Xen's public/arch-x86/hvm/start_info.h; Linux' Documentation/arch/x86/zero-page.rst.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use samepage_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::x86::layout::{
    ACPI_START, COMMAND_LINE, MapEntry, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO, ZERO_PAGE,
};

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_WITHOUT_NUMBER: u8 = 0xff;
/// The alignment of kernels without a setup header.
const KERNEL_ALIGNMENT: u32 = 16 << 20;

/// The range of the initrd, in guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Initrd {
    pub(crate) start: u64,
    pub(crate) size: u64,
}

impl Initrd {
    /// Whether 32 bits cannot hold its addresses.
    pub(crate) fn is_above_4g(self) -> bool {
        self.start + self.size > 1 << 32
    }
}

/// Writes PVH's start info, its list of modules and its memory map.
pub(crate) fn write_start_info(
    memory: &GuestMemory,
    map: &[MapEntry],
    initrd: Option<Initrd>,
) -> Result<(), GuestMemoryError> {
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: initrd.map_or(0, |_| PVH_MODULES),
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: ACPI_START,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory.write_obj(info, GuestAddress(PVH_START_INFO))?;
    if let Some(Initrd { start, size }) = initrd {
        let module = hvm_modlist_entry { paddr: start, size, ..Default::default() };
        memory.write_obj(module, GuestAddress(PVH_MODULES))?;
    }
    for (index, entry) in (0..).zip(map) {
        let line = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.bytes,
            type_: entry.kind.number(),
            reserved: 0,
        };
        memory.write_obj(line, GuestAddress(PVH_MEMORY_MAP + index * size_of_val(&line) as u64))?;
    }
    Ok(())
}

/// Writes Linux' boot parameters. `header` comes from a bzImage; an ELF file of its own has none.
pub(crate) fn write_zero_page(
    memory: &GuestMemory,
    map: &[MapEntry],
    header: Option<setup_header>,
    initrd: Option<Initrd>,
    command_line_bytes: u32,
) -> Result<(), GuestMemoryError> {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: KERNEL_ALIGNMENT,
            cmdline_size: command_line_bytes,
            ..Default::default()
        }),
        acpi_rsdp_addr: ACPI_START,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_WITHOUT_NUMBER;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    if let Some(Initrd { start, size }) = initrd {
        params.hdr.ramdisk_image = start as u32;
        params.hdr.ramdisk_size = size as u32;
        params.ext_ramdisk_image = (start >> 32) as u32;
        params.ext_ramdisk_size = (size >> 32) as u32;
    }
    params.e820_entries = map.len() as u8;
    for (line, entry) in params.e820_table.iter_mut().zip(map) {
        *line = boot_e820_entry { addr: entry.start, size: entry.bytes, r#type: entry.kind.number() };
    }
    memory.write_obj(params, GuestAddress(ZERO_PAGE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::memory::VmMemory;
    use crate::x86::layout::{HoleRange, memory_map};

    const RAM: u64 = 64 << 20;
    const INITRD: Initrd = Initrd { start: 0x300_0000, size: 12345 };

    #[test]
    fn start_info_points_to_command_line_initrd_and_memory_map() {
        let memory = VmMemory::reserve(RAM, true, crate::HugePages::Off).unwrap();
        write_start_info(memory.view(), &memory_map(RAM, None), Some(INITRD)).unwrap();
        let info: hvm_start_info = memory.view().read_obj(GuestAddress(PVH_START_INFO)).unwrap();
        assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
        assert_eq!((info.cmdline_paddr, info.rsdp_paddr), (COMMAND_LINE, ACPI_START));
        let module: hvm_modlist_entry = memory.view().read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (INITRD.start, INITRD.size));
        let third = GuestAddress(info.memmap_paddr + 2 * 24);
        let line: hvm_memmap_table_entry = memory.view().read_obj(third).unwrap();
        assert_eq!((line.addr, line.size, line.type_), (1 << 20, RAM - (1 << 20), 1));
    }

    #[test]
    fn an_initrd_above_4_gib_has_the_upper_halves_of_its_numbers_too() {
        let memory = VmMemory::reserve(RAM, true, crate::HugePages::Off).unwrap();
        let initrd = Initrd { start: 0x1_8000_0000, size: 0x1_0000_2000 };
        assert!(initrd.is_above_4g() && !INITRD.is_above_4g());
        write_zero_page(memory.view(), &memory_map(RAM, None), None, Some(initrd), 10).unwrap();
        let params: boot_params = memory.view().read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((image, size), (0x8000_0000, 0x2000));
        assert_eq!(({ params.ext_ramdisk_image }, { params.ext_ramdisk_size }), (1, 1));
    }

    #[test]
    fn the_zero_page_keeps_the_image_s_header() {
        let memory = VmMemory::reserve(RAM, true, crate::HugePages::Off).unwrap();
        let header = setup_header { version: 0x20f, init_size: 77, ..Default::default() };
        let map = memory_map(RAM, Some(HoleRange::of(RAM)));
        write_zero_page(memory.view(), &map, Some(header), Some(INITRD), 10).unwrap();
        let params: boot_params = memory.view().read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        let (version, init_size) = (params.hdr.version, params.hdr.init_size);
        let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((version, init_size, image, size), (0x20f, 77, 0x300_0000, 12345));
        assert_eq!((params.hdr.type_of_loader, params.e820_entries), (0xff, 6));
        assert_eq!({ params.acpi_rsdp_addr }, ACPI_START);
    }
}
