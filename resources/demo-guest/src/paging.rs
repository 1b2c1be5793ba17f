//! Identity mapping of all memory in pages of 2 MiB that ring 3 may access.
//!
//! The boot code's page directory is replaced as a whole. A KVM that shadows page tables intercepts each
//! write to a used one, which would be 500 interceptions. All other entries only change from absent to
//! present, so no translation needs flushing. Ring 3 writes all of them.

use crate::boot;
use crate::demo::layout::{Arena, DIRECTORY_SPAN, MAPPED_BY_IMAGE};

const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: usize = 512;
/// Present, writable, user, accessed, dirty.
const TABLE: u64 = 0x67;
/// The same for a page of 2 MiB.
const LARGE: u64 = 0xe7;
/// Without caching. Devices are in the last of the first 4 GiB.
const UNCACHED: u64 = 0x18;
const DEVICES: u64 = 3 << 30;

unsafe extern "C" {
    static mut page_directory_pointers: [u64; ENTRIES];
    static mut low_directories: [u64; ENTRIES * 4];
}

/// Maps the first 4 GiB.
///
/// # Safety
/// Only the first 4 MiB may be mapped so far, by the boot code, and the gates must have been installed.
pub(crate) unsafe fn map_low() {
    let entries = &raw mut low_directories;
    for i in 0..ENTRIES * 4 {
        let address = i as u64 * LARGE_PAGE;
        let caching = if address >= DEVICES { UNCACHED } else { 0 };
        // SAFETY: `i` is in bounds, and the tables belong to this module after the boot code has finished.
        unsafe { (&raw mut (*entries)[i]).write_volatile(address | LARGE | caching) };
    }
    let pointers = &raw mut page_directory_pointers;
    for gib in 0..4 {
        // SAFETY: as above. The directories that the entries point to have been filled.
        unsafe {
            let directory = (&raw mut (*entries)[gib * ENTRIES]).addr() as u64;
            (&raw mut (*pointers)[gib]).write_volatile(directory | TABLE);
        }
    }
    // SAFETY: mapped memory stays mapped at the same addresses; for the gates see above.
    unsafe { boot::flush_translations() };
}

/// Maps the arena's memory above 4 GiB.
///
/// # Safety
/// The arena's directories must be in mapped memory that nothing else uses. To be called once.
pub(crate) unsafe fn map_high(arena: &Arena) {
    let end = arena.ram().ranges().map(|(start, pages)| start + pages * 4096).max().unwrap_or(0);
    let mut directory = arena.directories;
    let mut address = MAPPED_BY_IMAGE;
    while address < end {
        let entries = core::ptr::with_exposed_provenance_mut::<u64>(directory as usize);
        for i in 0..ENTRIES {
            // SAFETY: the layout has reserved a page for each directory, as the caller guarantees.
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
