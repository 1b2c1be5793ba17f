//! Huge pages: which stay whole, and which are split so that parts of them can be shared.
//!
//! Where huge pages are wanted ([`Ram::huge`](crate::Ram::huge)), the kernel backs guest RAM with pages of
//! 2 MiB as it can. To map a frame over a part of one frees nothing: the kernel keeps the memory until it
//! runs short. So nothing in a huge page is merged. Its pages are only counted: how many hold zeros, or
//! have their like in a frame or elsewhere in a VM. A huge page is *cold* when no write to it was noted for
//! [`COLD`] intervals (or full passes). One that is cold, and of which a quarter or more could be shared, is
//! split by the kernel into pages of 4 KiB, which are then looked at like any others. Hot ones and those with
//! few duplicates stay whole.
//!
//! What is a huge page is asked of the kernel's page map whenever pages are about to be looked at, and again
//! with every sweep: the kernel may have had no huge page to give, or have split one by itself, and there
//! pages are merged at once. It may also make one of small pages later (khugepaged), but under userfaultfd
//! only of 512 populated pages of one anonymous mapping of which none is protected: never over frames, never
//! where zeros were given back, never in a window. Such a page is counted and split like any other, though
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

use crate::engine::Engine;
use crate::members::{Flags, Mode};
use crate::ram::HUGE_PAGES;
use crate::turns::Kind;

/// Intervals without a change after which a huge page is cold.
const COLD: u8 = 8;
/// Pages of a huge page that are to be shared for it to be split: a quarter.
const ENOUGH: u16 = (HUGE_PAGES / 4) as u16;
/// Intervals without a change after which a split is tried once more, where the kernel did not do it or has
/// made a huge page of the range again.
const RETRY: u8 = 32;
/// Huge pages split in one step: about a millisecond of work.
const STEP_SPLITS: usize = 4;

/// 512 pages that a huge page can back.
#[derive(Clone, Copy, Debug)]
struct HugeRange {
    /// Pages known to have their like elsewhere, or to be zero.
    alike: u16,
    /// Intervals since the last change.
    quiet: u8,
    /// A huge page backs it.
    whole: bool,
    /// Intervals for which it is not split, since that was tried a moment ago.
    pause: u8,
}

/// What is known of one VM's huge pages. Pages behind the last full range are never part of one.
#[derive(Debug)]
pub(crate) struct HugeRanges {
    ranges: Vec<HugeRange>,
    splits: u64,
    /// The range from which on there may be some to be split.
    next: usize,
}

impl HugeRanges {
    /// RAM of this many pages, which are taken for whole from the start or only once they are known to be.
    pub(crate) fn new(pages: u32, whole: bool) -> Self {
        let range = HugeRange { alike: 0, quiet: 0, whole, pause: 0 };
        let ranges = vec![range; (pages / HUGE_PAGES) as usize];
        Self { next: ranges.len(), ranges, splits: 0 }
    }

    fn of(&mut self, page: u32) -> Option<&mut HugeRange> {
        self.ranges.get_mut((page / HUGE_PAGES) as usize)
    }

    /// Whether the page belongs to a huge page.
    pub(crate) fn whole(&self, page: u32) -> bool {
        self.ranges.get((page / HUGE_PAGES) as usize).is_some_and(|range| range.whole)
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
    fn around(&self, pages: Range<u32>) -> Range<u32> {
        let end = pages.end.next_multiple_of(HUGE_PAGES).min(self.ranges.len() as u32 * HUGE_PAGES);
        (pages.start / HUGE_PAGES * HUGE_PAGES).min(end)..end
    }

    /// An interval has passed.
    fn grow_older(&mut self) {
        for range in &mut self.ranges {
            range.quiet = range.quiet.saturating_add(1);
            range.pause = range.pause.saturating_sub(1);
        }
        self.next = 0;
    }

    /// The first page of the next range to be split, as far as is known here.
    fn next_cold(&mut self) -> Option<u32> {
        let cold = |range: &HugeRange| {
            range.whole && range.pause == 0 && range.quiet >= COLD && range.alike >= ENOUGH
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

impl Engine {
    /// Looks at a page of a huge page, which is in the scratch page: whether it could be shared.
    pub(crate) fn take_census(&mut self, slot: usize, page: u32) {
        let digest = self.digester.digest(&self.scratch);
        self.counters.digests += 1;
        let member = self.members.at_mut(slot);
        let flags = member.flags[page as usize];
        let known = member.known_digest(page);
        let same = known == Some(digest);
        if same && (flags.contains(Flags::UNIQUE) || flags.contains(Flags::ALIKE)) {
            member.set_volatile(page, false);
            return;
        }
        self.forget_page(slot, page);
        let changed = known.is_some() && !same;
        self.counters.changes += u64::from(changed);
        let member = self.members.at_mut(slot);
        if changed {
            member.changed_in_range(page);
        }
        // With a log, a page that is looked at is at rest.
        member.set_volatile(page, changed && member.follower.is_none());
        member.space.set_note(page, digest);
        member.flags[page as usize].insert(Flags::DIGESTED);
        if self.scratch.iter().all(|&byte| byte == 0) {
            member.set_alike(page);
            return;
        }
        if member.mode == Mode::Zero {
            return;
        }
        if member.follower.is_none() && self.settle && !same {
            // As for any page: new to us is as good as changed.
            self.counters.changes += u64::from(!changed);
            return;
        }
        let shared = self.frame_like_scratch(digest).is_some();
        if shared
            || self.page_like_scratch(slot, page, digest).is_some()
            || self.whole_twin(slot, page, digest)
        {
            self.members.at_mut(slot).set_alike(page);
        }
        self.enter_whole(slot, page);
    }

    /// Whether a page of a huge page is like the one in the scratch page. It is noted as alike.
    pub(crate) fn whole_twin(&mut self, slot: usize, page: u32, digest: u32) -> bool {
        let wanted = crate::index::Wanted { page: &self.scratch, digest };
        let itself = self.members.at(slot).place(page);
        let found = self
            .any_huge
            .then(|| self.whole.find(wanted, itself, &self.members, &mut self.counters.effort))
            .flatten();
        if let Some(place) = found {
            let (other, twin) = self.members.locate(place);
            self.members.at_mut(other).set_alike(twin);
        }
        found.is_some()
    }

    /// Enters a page of a huge page into their index. Of equal pages some represent all.
    fn enter_whole(&mut self, slot: usize, page: u32) {
        if self.whole.insert(self.members.at(slot).place(page), &self.members) {
            self.members.at_mut(slot).set_unique(page);
        }
    }

    /// Asks the kernel which huge pages back some pages and those around them.
    pub(crate) fn learn_huge(&mut self, slot: usize, pages: Range<u32>) {
        let member = self.members.at(slot);
        let Some(huge) = member.huge.as_ref().filter(|_| self.pagemap.tells_huge()) else { return };
        let pages = huge.around(pages);
        if pages.is_empty() || member.space.lost() {
            return;
        }
        let mut runs = Vec::new();
        let ram = member.space.ram().range(pages.start, pages.end - pages.start);
        if self.pagemap.huge(ram, &mut runs).is_err() {
            // What was known before holds.
            self.counters.refusals += 1;
            return;
        }
        let mut runs = runs.into_iter().peekable();
        for first in pages.step_by(HUGE_PAGES as usize) {
            while runs.next_if(|run| run.end <= first).is_some() {}
            let whole = runs.peek().is_some_and(|run| run.contains(&first));
            if whole != self.members.at(slot).whole(first) {
                self.set_whole(slot, first, whole);
            }
        }
    }

    /// The range from page `first` on has become whole, or is whole no longer.
    fn set_whole(&mut self, slot: usize, first: u32, whole: bool) {
        let range = first..first + HUGE_PAGES;
        // The index that a page is in follows from whether its range is whole.
        let known: Vec<_> = range
            .clone()
            .filter(|&page| self.members.at(slot).flags[page as usize].contains(Flags::UNIQUE))
            .collect();
        known.iter().for_each(|&page| self.forget_page(slot, page));
        let member = self.members.at_mut(slot);
        if let Some(range) = member.huge.as_mut().and_then(|huge| huge.of(first)) {
            range.whole = whole;
            range.quiet = 0;
        }
        if whole {
            // Whether they have their like is to be counted.
            if let Some(follower) = &mut member.follower {
                known.into_iter().for_each(|page| follower.look_again(page));
            }
            return;
        }
        let mut known = known.into_iter().peekable();
        for page in range {
            let entered = known.next_if_eq(&page).is_some();
            let member = self.members.at_mut(slot);
            if member.clear_alike(page) {
                if let Some(follower) = &mut member.follower {
                    follower.look_again(page);
                }
            } else if entered {
                self.enter_unique(slot, page);
            }
        }
    }

    /// An interval of a VM, or a full pass over it, has ended.
    pub(crate) fn end_interval_of_huge(&mut self, slot: usize) {
        if let Some(huge) = &mut self.members.at_mut(slot).huge {
            huge.grow_older();
        }
    }

    /// Splits the next huge pages that are cold and have enough to share: about a millisecond of work.
    /// Returns whether there were any.
    pub fn split_step(&mut self) -> bool {
        let mut splits = 0;
        let slots: Vec<_> = self.members.slots_after(self.turns.slot(Kind::Splits)).collect();
        for slot in slots {
            while splits < STEP_SPLITS {
                let Some(member) = self.members.get_mut(slot).filter(|member| member.active()) else { break };
                let Some(first) = member.huge.as_mut().and_then(HugeRanges::next_cold) else { break };
                let range = first as usize..(first + HUGE_PAGES) as usize;
                // A page that is written all the time is not asked about in every interval.
                if member.flags[range].iter().any(|flags| flags.contains(Flags::VOLATILE)) {
                    continue;
                }
                splits += 1;
                self.turns.set_slot(Kind::Splits, slot);
                self.split(slot, first);
            }
        }
        splits > 0
    }

    fn split(&mut self, slot: usize, first: u32) {
        let Self { members, calls, pagemap, counters, .. } = self;
        let member = members.at_mut(slot);
        let Some(huge) = &mut member.huge else { return };
        if let Some(range) = huge.of(first) {
            range.pause = RETRY;
        }
        let pages = member.space.ram().range(first, HUGE_PAGES);
        if calls.split(pages).is_err() {
            counters.refusals += 1;
            return;
        }
        let mut left = Vec::new();
        if pagemap.tells_huge() && (pagemap.huge(pages, &mut left).is_err() || !left.is_empty()) {
            // Somebody in the kernel holds on to it; that passes.
            return;
        }
        huge.splits += 1;
        counters.split += 1;
        self.set_whole(slot, first, false);
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
        assert!(huge.whole(1023) && !huge.whole(1024));
        huge.add_alike(1100);
        huge.changed(1100);
        assert_eq!((huge.around(0..1), huge.around(500..1100)), (0..512, 0..1024));
        assert!(huge.around(1030..1100).is_empty());
        assert_eq!(HugeRanges::new(100, true).around(0..100), 0..0);
    }
}
