//! Counts shared pages in the kernel's page map. It is the same for both sides, and exact even if counters
//! lag behind.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use samepage_sharing::PAGE_SIZE;

use super::memory::Memory;

/// Bits 0 to 54 of an entry are the frame's number, which is 0 for unprivileged users. Bit 63 says that the
/// page is in memory.
const NUMBER: u64 = (1 << 55) - 1;
const PRESENT: u64 = 1 << 63;

/// Returns the number of pages that were written once and share a frame, without one page for each frame.
/// Returns `None` if the kernel does not reveal the frames of pages.
///
/// # Errors
/// Fails if the page map cannot be read.
pub(super) fn saved(memory: &[Memory]) -> Result<Option<u64>> {
    let pagemap = File::open("/proc/self/pagemap").context("open the page map")?;
    let mut frames = HashSet::new();
    let mut saved = 0;
    for vm in memory {
        let mut entries = vec![0; vm.pages() as usize * 8];
        // A remapped page is in no page table before it is read.
        vm.touched().for_each(|page| _ = vm.read(page));
        let place = (vm.ram().base().addr().get() / PAGE_SIZE * 8) as u64;
        pagemap.read_exact_at(&mut entries, place).context("read the page map")?;
        let entries = entries.as_chunks::<8>().0;
        for page in vm.touched() {
            let entry = u64::from_ne_bytes(entries[page as usize]);
            let number = entry & NUMBER;
            if entry & PRESENT == 0 {
                continue;
            }
            if number == 0 {
                return Ok(None);
            }
            saved += u64::from(!frames.insert(number));
        }
    }
    Ok(Some(saved))
}

/// Returns the number of pages that were written once and could share a frame.
pub(super) fn could_be_saved(memory: &[Memory]) -> u64 {
    let mut contents = HashSet::new();
    memory
        .iter()
        .flat_map(|vm| vm.touched().map(|page| vm.digest(page)))
        .map(|digest| u64::from(!contents.insert(digest)))
        .sum()
}
