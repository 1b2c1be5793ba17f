//! The monitor's data at the entry point: the command line and the memory map.
//!
//! Both may be anywhere in RAM, so they are copied before the arena is filled. Layout: Xen,
//! xen/include/public/arch-x86/hvm/start_info.h.

use core::ops::Range;

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const WITH_MEMORY_MAP: u32 = 1;
const RAM: u32 = 1;

#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryMapEntry {
    address: u64,
    bytes: u64,
    kind: u32,
    reserved: u32,
}

/// Length limit of the command line in bytes; the rest is cut off.
pub(crate) const LONGEST_COMMAND_LINE: usize = 4096;

/// The structure at the entry point, which has been recognised.
pub(crate) struct Handover(&'static StartInfo);

impl Handover {
    /// Returns the structure at `address`, if its magic number and version say that it has a memory map.
    ///
    /// # Safety
    /// `address`, and the data that the structure refers to, must be mapped and stay unchanged.
    pub(crate) unsafe fn at(address: usize) -> Option<Self> {
        // SAFETY: the caller guarantees the address. Any bytes are a valid structure.
        let info = unsafe { &*core::ptr::with_exposed_provenance::<StartInfo>(address) };
        (info.magic == MAGIC && info.version >= WITH_MEMORY_MAP).then_some(Self(info))
    }

    /// Copies the command line into `buffer`. The first byte outside ASCII ends it.
    pub(crate) fn command_line<'a>(&self, buffer: &'a mut [u8; LONGEST_COMMAND_LINE]) -> &'a str {
        let source = core::ptr::with_exposed_provenance::<u8>(self.0.command_line as usize);
        let mut len = 0;
        while !source.is_null() && len < buffer.len() {
            // SAFETY: the string is mapped and ends with a zero byte, as the caller of `at` guarantees.
            let byte = unsafe { source.add(len).read() };
            if byte == 0 || !byte.is_ascii() {
                break;
            }
            buffer[len] = byte;
            len += 1;
        }
        str::from_utf8(&buffer[..len]).unwrap_or_default()
    }

    /// Returns the ranges of RAM in the memory map.
    pub(crate) fn ram(&self) -> impl Iterator<Item = Range<u64>> {
        let entries = core::ptr::with_exposed_provenance::<MemoryMapEntry>(self.0.memory_map as usize);
        (0..self.0.memory_map_entries as usize)
            // SAFETY: the map has that many entries and is mapped, as the caller of `at` guarantees.
            .map(move |i| unsafe { entries.add(i).read_unaligned() })
            .filter(|entry| entry.kind == RAM)
            .map(|entry| entry.address..entry.address.saturating_add(entry.bytes))
    }
}
