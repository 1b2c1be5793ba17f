//! The origin of guest pages: turns reads of disks into hints for the sharing engine.

use std::hash::{DefaultHasher, Hash, Hasher};

use samepage_devices::disk::cache::ImageId;
use samepage_devices::virtio::block::ReadObserver;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::hints::Hint;
use samepage_sharing::service::HintSender;
use vm_memory::GuestAddress;

use super::memory::MemorySlot;

const PAGE: u64 = PAGE_SIZE as u64;

/// Turns the reads of one disk into hints.
pub(super) struct DiskHints {
    hints: HintSender,
    slots: Vec<MemorySlot>,
}

impl DiskHints {
    /// Returns an object that reports reads into the guest memory of `slots`.
    pub(super) fn new(hints: HintSender, slots: Vec<MemorySlot>) -> Self {
        Self { hints, slots }
    }
}

impl ReadObserver for DiskHints {
    fn filled(&self, image: ImageId, address: GuestAddress, bytes: usize, offset: u64) {
        let whole = whole_pages(address.0, bytes as u64, offset);
        if let Some((address, pages, block)) = whole
            && let Some(first) = page_of(&self.slots, address, pages)
        {
            self.hints.give(Hint { pages: first..first + pages, image: image_number(image), block });
        }
    }
}

/// Returns a number for an image. If two images have the same number, an attempt at sharing fails, and there
/// is no other effect.
fn image_number(image: ImageId) -> u32 {
    let mut hasher = DefaultHasher::new();
    image.hash(&mut hasher);
    hasher.finish() as u32
}

/// Returns the whole pages within a range of guest memory that hold whole blocks: address, number of pages
/// and number of the first block.
fn whole_pages(address: u64, bytes: u64, offset: u64) -> Option<(u64, u32, u64)> {
    let skipped = address.next_multiple_of(PAGE) - address;
    let pages = bytes.checked_sub(skipped)? / PAGE;
    let offset = offset.checked_add(skipped)?;
    let aligned = offset.is_multiple_of(PAGE) && pages > 0;
    aligned.then_some((address + skipped, u32::try_from(pages).ok()?, offset / PAGE))
}

/// Returns the number of the page at a guest physical address, if at least `pages` pages of RAM begin there.
pub(super) fn page_of(slots: &[MemorySlot], address: u64, pages: u32) -> Option<u32> {
    let range = slots
        .iter()
        .map(|slot| slot.range)
        .find(|range| address >= range.gpa && address + u64::from(pages) * PAGE <= range.gpa + range.bytes)?;
    u32::try_from((address - range.gpa + range.ram_offset) / PAGE).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::layout::ram_ranges;

    #[test]
    fn whole_pages_with_whole_blocks_count() {
        assert_eq!(whole_pages(0x5000, 0x3000, 0x9000), Some((0x5000, 3, 9)));
        assert_eq!(whole_pages(0x5000, 0x3fff, 0x9000), Some((0x5000, 3, 9)));
        assert_eq!(whole_pages(0x4e00, 0x1200, 0x8e00), Some((0x5000, 1, 9)));
        assert_eq!(whole_pages(0x5000, 0x1000, 0x9200), None, "half of one block and half of another");
        assert_eq!(whole_pages(0x5000, 0xfff, 0x9000), None);
        assert_eq!(whole_pages(0x5001, 0x10, 0x9000), None);
    }

    #[test]
    fn pages_are_numbered_across_the_gap_below_4_gib() {
        let ranges: Vec<_> = ram_ranges(6 << 30).into_iter().collect();
        let slots: Vec<_> = (0..).zip(&ranges).map(|(slot, &range)| MemorySlot { slot, range }).collect();
        assert_eq!(page_of(&slots, 0x5000, 3), Some(5));
        let (low, high) = (ranges[0], ranges[1]);
        assert_eq!(page_of(&slots, high.gpa, 1), Some((low.bytes / PAGE) as u32));
        assert_eq!(page_of(&slots, low.bytes - PAGE, 2), None, "it leaves the RAM");
        assert_eq!(page_of(&slots, low.bytes, 1), None);
    }
}
