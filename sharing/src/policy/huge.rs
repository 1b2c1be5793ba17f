//! Huge pages: which stay whole, and which are split so that parts of them can be shared.
//!
//! Where huge pages are wanted ([`Ram::huge`](crate::Ram::huge)), the kernel backs guest RAM with pages of
//! 2 MiB as it can. To map a frame over a part of one frees nothing: the kernel keeps the memory until it
//! runs short. So nothing in a huge page is merged. Its pages are only counted: how many hold zeros, or
//! have their like in a frame or elsewhere in a VM. A huge page is *cold* when no write to it was noted for
//! [`COLD`] intervals (or full passes). One that is cold, and of which a quarter or more could be shared, is
//! split by the kernel into pages of 4 KiB, which are then scanned like any others. Hot ones and those with
//! few duplicates stay whole.
//!
//! What is a huge page is asked of the kernel's page map whenever pages are about to be scanned, and again
//! with every sweep: the kernel may have had no huge page to give, or have split one by itself, and there
//! pages are merged at once. It may also make one of small pages later (khugepaged), but under userfaultfd
//! only of 512 populated pages of one anonymous mapping of which none is protected: never over frames, never
//! where zeros were freed, never in a window. Such a page is counted and split like any other, though
//! not before some time has passed. On kernels without `PAGEMAP_SCAN` (before 6.7) every range counts as
//! whole until it is split here. All of this steers effort. A wrong answer costs memory that becomes free
//! later, never content: windows protect, compare and remap whatever the kernel backs pages with.
//!
//! KVM maps memory whose writes it logs by 4 KiB in the tables of the second level, so for a VM with a change
//! log huge pages shorten neither these tables nor the walks of guests through them. What remains is on the
//! host's side: one fault for 512 pages when memory is first touched, page tables of the process that are
//! smaller by 4 KiB for each huge page, and faster access of the VMM and its engine. Without a log KVM maps
//! huge pages whole.

use std::ops::Range;

use crate::memory::ram::HUGE_PAGES;

/// Intervals without a change after which a huge page is cold.
const COLD: u8 = 8;

/// Pages of a huge page that are to be shared for it to be split: a quarter.
const ENOUGH: u16 = (HUGE_PAGES / 4) as u16;

/// Intervals without a change after which a split is tried once more, where the kernel did not do it or has
/// made a huge page of the range again.
pub(crate) const RETRY: u8 = 32;

/// 512 pages that a huge page can back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HugeRange {
    /// Pages known to have their like elsewhere, or to be zero.
    pub(crate) alike: u16,
    /// Intervals since the last change.
    pub(crate) quiet: u8,
    /// A huge page backs it.
    pub(crate) is_huge: bool,
    /// Intervals for which it is not split, since that was tried a moment ago.
    pub(crate) pause: u8,
}

/// What is known of one VM's huge pages. Pages behind the last full range are never part of one.
#[derive(Debug)]
pub(crate) struct HugeRanges {
    pub(crate) ranges: Vec<HugeRange>,
    pub(crate) splits: u64,
    /// The range from which on there may be some to be split.
    pub(crate) next: usize,
}

impl HugeRanges {
    /// RAM of this many pages, which are taken for whole from the start or only once they are known to be.
    pub(crate) fn new(pages: u32, is_huge: bool) -> Self {
        let range = HugeRange { alike: 0, quiet: 0, is_huge, pause: 0 };
        let ranges = vec![range; (pages / HUGE_PAGES) as usize];
        Self { next: ranges.len(), ranges, splits: 0 }
    }

    pub(crate) fn of(&mut self, page: u32) -> Option<&mut HugeRange> {
        self.ranges.get_mut((page / HUGE_PAGES) as usize)
    }

    /// Whether the page belongs to a huge page.
    pub(crate) fn is_huge(&self, page: u32) -> bool {
        self.ranges.get((page / HUGE_PAGES) as usize).is_some_and(|range| range.is_huge)
    }

    pub(crate) fn changed(&mut self, page: u32) {
        if let Some(range) = self.of(page) {
            range.quiet = 0;
            range.pause = 0;
        }
    }

    pub(crate) fn add_alike(&mut self, page: u32) {
        if let Some(range) = self.of(page) {
            range.alike += 1;
        }
    }

    pub(crate) fn remove_alike(&mut self, page: u32) {
        if let Some(range) = self.of(page) {
            range.alike -= 1;
        }
    }

    /// The pages of the full ranges that some pages lie in.
    pub(crate) fn around(&self, pages: Range<u32>) -> Range<u32> {
        let end = pages.end.next_multiple_of(HUGE_PAGES).min(self.ranges.len() as u32 * HUGE_PAGES);
        (pages.start / HUGE_PAGES * HUGE_PAGES).min(end)..end
    }

    /// An interval has passed.
    pub(crate) fn grow_older(&mut self) {
        for range in &mut self.ranges {
            range.quiet = range.quiet.saturating_add(1);
            range.pause = range.pause.saturating_sub(1);
        }
        self.next = 0;
    }

    /// The first page of the next range to be split, as far as is known here.
    pub(crate) fn next_cold(&mut self) -> Option<u32> {
        let cold = |range: &HugeRange| {
            range.is_huge && range.pause == 0 && range.quiet >= COLD && range.alike >= ENOUGH
        };
        let found = self.ranges[self.next..].iter().position(cold).map(|after| self.next + after);
        self.next = found.map_or(self.ranges.len(), |index| index + 1);
        found.map(|index| index as u32 * HUGE_PAGES)
    }

    /// Huge pages split since the start.
    pub(crate) fn splits(&self) -> u64 {
        self.splits
    }

    pub(crate) fn metadata_bytes(&self) -> usize {
        self.ranges.capacity() * size_of::<HugeRange>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cold_ranges_with_enough_to_share_are_named() {
        let mut huge = HugeRanges::new(3 * HUGE_PAGES + 100, true);
        (0..COLD).for_each(|_| huge.grow_older());
        assert_eq!(huge.next_cold(), None);
        (600..600 + u32::from(ENOUGH)).for_each(|page| huge.add_alike(page));
        (1024..1200).for_each(|page| huge.add_alike(page));
        huge.changed(1100);
        huge.grow_older();
        assert_eq!((huge.next_cold(), huge.next_cold()), (Some(512), None));
        huge.remove_alike(600);
        (0..COLD).for_each(|_| huge.grow_older());
        assert_eq!((huge.next_cold(), huge.next_cold()), (Some(1024), None));
    }

    #[test]
    fn pages_behind_the_last_full_range_belong_to_none() {
        let mut huge = HugeRanges::new(2 * HUGE_PAGES + 100, true);
        assert!(huge.is_huge(1023) && !huge.is_huge(1024));
        huge.add_alike(1100);
        huge.changed(1100);
        assert_eq!((huge.around(0..1), huge.around(500..1100)), (0..512, 0..1024));
        assert!(huge.around(1030..1100).is_empty());
        assert_eq!(HugeRanges::new(100, true).around(0..100), 0..0);
    }
}
