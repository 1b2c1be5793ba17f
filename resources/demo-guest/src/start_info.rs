//! What the monitor hands over at the entry point: the command line and the memory map.
//!
//! Both may lie anywhere in RAM, so they are copied out before the arena is filled. Layout: Xen,
//! xen/include/public/arch-x86/hvm/start_info.h.

use core::ops::Range;

const MAGIC: u32 = 0x336e_c578;
/// From this version on there is a memory map.
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

/// Bytes of a command line that are read; the rest is cut off.
pub(crate) const LONGEST_COMMAND_LINE: usize = 4096;

/// The structure at the entry point, known to be one.
pub(crate) struct Handover(&'static StartInfo);

impl Handover {
    /// The structure at `address`, if its magic number and version say that it is one with a memory map.
    ///
    /// # Safety
    /// `address`, and what the structure there points to, must be mapped and stay unchanged.
    pub(crate) unsafe fn at(address: usize) -> Option<Self> {
        // SAFETY: the caller vouches for the address; any bytes are a valid structure.
        let info = unsafe { &*core::ptr::with_exposed_provenance::<StartInfo>(address) };
        (info.magic == MAGIC && info.version >= WITH_MEMORY_MAP).then_some(Self(info))
    }

    /// Copy the command line into `buffer`. What is not ASCII ends it.
    pub(crate) fn command_line<'a>(&self, buffer: &'a mut [u8; LONGEST_COMMAND_LINE]) -> &'a str {
        let source = core::ptr::with_exposed_provenance::<u8>(self.0.command_line as usize);
        let mut len = 0;
        while !source.is_null() && len < buffer.len() {
            // SAFETY: the string is mapped and ends with a zero byte, as `at`'s caller confirmed.
            let byte = unsafe { source.add(len).read() };
            if byte == 0 || !byte.is_ascii() {
                break;
            }
            buffer[len] = byte;
            len += 1;
        }
        str::from_utf8(&buffer[..len]).unwrap_or_default()
    }

    /// The ranges of the memory map that are RAM.
    pub(crate) fn ram(&self) -> impl Iterator<Item = Range<u64>> {
        let entries = core::ptr::with_exposed_provenance::<MemoryMapEntry>(self.0.memory_map as usize);
        (0..self.0.memory_map_entries as usize)
            // SAFETY: the map has that many entries and is mapped, as `at`'s caller confirmed.
            .map(move |i| unsafe { entries.add(i).read_unaligned() })
            .filter(|entry| entry.kind == RAM)
            .map(|entry| entry.address..entry.address.saturating_add(entry.bytes))
    }
}
