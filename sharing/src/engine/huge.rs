//! Huge pages that are counted, and split where enough of their pages could be shared.

use std::ops::Range;

use crate::engine::Engine;
use crate::engine::members::{Flags, Mode};
use crate::engine::turns::Kind;
use crate::memory::content::Page;
use crate::memory::guest::Seen;
use crate::memory::ram::HUGE_PAGES;
use crate::numbers::{Digest, Slot};
use crate::policy::huge::{HugeRanges, RETRY};

/// Huge pages split in one step: about a millisecond of work.
const STEP_SPLITS: usize = 4;

impl Engine {
    /// Notes of a page of a huge page, which was read a moment ago, whether it could be shared.
    pub(crate) fn take_census(&mut self, slot: Slot, page: u32, seen: Seen, content: &Page) {
        self.counters.digests += 1;
        let digest = match seen {
            Seen::Digest(digest) => digest,
            Seen::Zero => self.zero_digest,
            Seen::Content => return,
        };
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
        // With a log, a page that is scanned is idle.
        member.set_volatile(page, changed && member.follower.is_none());
        member.space.set_note(page, digest.number());
        member.flags[page as usize].insert(Flags::DIGESTED);
        if seen == Seen::Zero {
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
        let shared = self.frame_like(content, digest).is_some();
        if shared
            || self.page_like(slot, page, content, digest).is_some()
            || self.huge_twin(slot, page, content, digest)
        {
            self.members.at_mut(slot).set_alike(page);
        }
        self.enter_huge(slot, page);
    }

    /// Whether another page of a huge page has this content, which has this digest. It is noted as identical.
    pub(crate) fn huge_twin(&mut self, slot: Slot, page: u32, content: &Page, digest: Digest) -> bool {
        let wanted = crate::index::Wanted { page: content, digest };
        let itself = self.members.at(slot).global_page(page);
        let found = self
            .any_huge
            .then(|| self.huge_pages.find(wanted, itself, &self.members, &mut self.counters.effort))
            .flatten();
        if let Some(global) = found {
            let (other, twin) = self.members.locate(global);
            self.members.at_mut(other).set_alike(twin);
        }
        found.is_some()
    }

    /// Enters a page of a huge page into their index. Of equal pages some represent all.
    fn enter_huge(&mut self, slot: Slot, page: u32) {
        if self.huge_pages.insert(self.members.at(slot).global_page(page), &self.members) {
            self.members.at_mut(slot).set_unique(page);
        }
    }

    /// Asks the kernel which huge pages back some pages and those around them.
    pub(crate) fn learn_huge(&mut self, slot: Slot, pages: Range<u32>) {
        let member = self.members.at(slot);
        let memory = member.space.memory();
        let Some(huge) = member.huge.as_ref().filter(|_| memory.tells_huge()) else { return };
        let pages = huge.around(pages);
        if pages.is_empty() || member.space.lost() {
            return;
        }
        let mut runs = Vec::new();
        if memory.huge(pages.clone(), &mut runs).is_err() {
            // What was known before holds.
            self.counters.refusals += 1;
            return;
        }
        let mut runs = runs.into_iter().peekable();
        for first in pages.step_by(HUGE_PAGES as usize) {
            while runs.next_if(|run| run.end <= first).is_some() {}
            let is_huge = runs.peek().is_some_and(|run| run.contains(&first));
            if is_huge != self.members.at(slot).is_huge(first) {
                self.set_huge(slot, first, is_huge);
            }
        }
    }

    /// The range from page `first` on has become whole, or is whole no longer.
    fn set_huge(&mut self, slot: Slot, first: u32, is_huge: bool) {
        let range = first..first + HUGE_PAGES;
        // The index that a page is in follows from whether its range is whole.
        let known: Vec<_> = range
            .clone()
            .filter(|&page| self.members.at(slot).flags[page as usize].contains(Flags::UNIQUE))
            .collect();
        known.iter().for_each(|&page| self.forget_page(slot, page));
        let member = self.members.at_mut(slot);
        if let Some(range) = member.huge.as_mut().and_then(|huge| huge.of(first)) {
            range.is_huge = is_huge;
            range.quiet = 0;
        }
        if is_huge {
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
    pub(crate) fn end_interval_of_huge(&mut self, slot: Slot) {
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

    /// Has the kernel break up the huge page that begins with a page.
    pub(crate) fn split(&mut self, slot: Slot, first: u32) {
        let member = self.members.at_mut(slot);
        let Some(huge) = &mut member.huge else { return };
        if let Some(range) = huge.of(first) {
            range.pause = RETRY;
        }
        match member.space.memory().split(first) {
            Ok(true) => {}
            // It is tried again.
            Ok(false) => return,
            Err(_) => {
                self.counters.refusals += 1;
                return;
            }
        }
        huge.splits += 1;
        self.counters.split += 1;
        self.set_huge(slot, first, false);
    }
}
