//! Identity mapping of all memory in pages of 2 MiB that ring 3 may access.
//!
//! The boot code's page directory is replaced as a whole: a KVM that shadows page tables intercepts each
//! write to one that is in use, and that would be 500 interceptions. All other entries only ever go from
//! absent to present, so that no translation needs flushing; ring 3 writes them all.

use crate::boot;
use crate::demo::layout::{Arena, DIRECTORY_SPAN, MAPPED_BY_IMAGE};

const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: usize = 512;
/// Present, writable, user, accessed, dirty.
const TABLE: u64 = 0x67;
/// The same for a 2 MiB page.
const LARGE: u64 = 0xe7;
/// No caching; devices lie in the last of the first 4 GiB.
const UNCACHED: u64 = 0x18;
const DEVICES: u64 = 3 << 30;

unsafe extern "C" {
    static mut page_directory_pointers: [u64; ENTRIES];
    static mut low_directories: [u64; ENTRIES * 4];
}

/// Map the first 4 GiB.
///
/// # Safety
/// Only the first 4 MiB may be mapped so far, by the boot code, and the gates must have been installed.
pub(crate) unsafe fn map_low() {
    let entries = &raw mut low_directories;
    for i in 0..ENTRIES * 4 {
        let address = i as u64 * LARGE_PAGE;
        let caching = if address >= DEVICES { UNCACHED } else { 0 };
        // SAFETY: `i` is in bounds, and the tables belong to this module once the boot code is through.
        unsafe { (&raw mut (*entries)[i]).write_volatile(address | LARGE | caching) };
    }
    let pointers = &raw mut page_directory_pointers;
    for gib in 0..4 {
        // SAFETY: as above; the directories that the entries point to have been filled.
        unsafe {
            let directory = (&raw mut (*entries)[gib * ENTRIES]).addr() as u64;
            (&raw mut (*pointers)[gib]).write_volatile(directory | TABLE);
        }
    }
    // SAFETY: what was mapped still is, at the same addresses; for the gates see above.
    unsafe { boot::flush_translations() };
}

/// Map the arena's memory above 4 GiB.
///
/// # Safety
/// The arena's directories must lie in mapped memory that nothing else uses; call this once.
pub(crate) unsafe fn map_high(arena: &Arena) {
    let end = arena.ram().ranges().map(|(start, pages)| start + pages * 4096).max().unwrap_or(0);
    let mut directory = arena.directories;
    let mut address = MAPPED_BY_IMAGE;
    while address < end {
        let entries = core::ptr::with_exposed_provenance_mut::<u64>(directory as usize);
        for i in 0..ENTRIES {
            // SAFETY: the layout has set aside a page for each directory, as the caller confirms.
            unsafe { entries.add(i).write_volatile((address + i as u64 * LARGE_PAGE) | LARGE) };
        }
        // SAFETY: usable memory ends at 512 GiB, so the index is below 512.
        unsafe {
            (&raw mut page_directory_pointers[(address / DIRECTORY_SPAN) as usize])
                .write_volatile(directory | TABLE);
        }
        directory += 4096;
        address += DIRECTORY_SPAN;
    }
}
