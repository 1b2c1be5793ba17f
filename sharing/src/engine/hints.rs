//! Pages that devices gave hints about, before all others: a page that was filled from a disk block is
//! compared with the page that last held this block.

use std::ops::Range;

use crate::engine::Engine;
use crate::engine::members::{Member, Mode};
use crate::engine::neighbours::Twins;
use crate::engine::turns::Kind;
use crate::numbers::{GlobalPage, Slot};
use crate::policy::hints::Hint;

/// Hints that one step takes up.
const STEP_HINTS: usize = 16;
/// Pages said to hold blocks that one step compares.
const STEP_PAGES: u32 = 512;
/// Of these, the ones between two looks at the time.
const PART_PAGES: u32 = 64;

impl Engine {
    /// Takes the next hints up, of each VM in turn. Returns whether there were any.
    pub(crate) fn take_hints(&mut self) -> bool {
        let (mut hints, mut pages) = (0, 0);
        while hints < STEP_HINTS && pages < STEP_PAGES && (hints == 0 || !self.spent()) {
            let Some(slot) = self.next_with_work(Kind::Hints, |member| member.hints.waiting() > 0) else {
                break;
            };
            let Some(hint) = self.members.at(slot).hints.take() else { break };
            hints += 1;
            pages += self.take_hint(slot, hint, PART_PAGES);
        }
        if hints > 0 {
            self.store.reclaim(&*self.host.calls);
        }
        hints > 0
    }

    /// Takes up what a hint says of so many pages at most. Returns how many they were.
    fn take_hint(&mut self, slot: Slot, hint: Hint, most: u32) -> u32 {
        let pages = hint.pages.clone();
        let member = self.members.at(slot);
        // Page numbers come from a device, which has them from a guest.
        let there = pages.start < pages.end && pages.end <= member.space.pages();
        if member.space.lost() || member.mode != Mode::Full || !there {
            self.counters.hints += 1;
            return 0;
        }
        let (first, rest) = hint.split(most);
        self.counters.hints += u64::from(rest.is_none());
        if let Some(rest) = rest {
            member.hints.put_back(rest);
        }
        let count = first.pages.end - first.pages.start;
        self.try_blocks(slot, first.pages, first.image, first.block);
        count
    }

    fn try_blocks(&mut self, slot: Slot, pages: Range<u32>, image: u32, block: u64) {
        if !self.own(slot, pages.clone()) {
            return;
        }
        let total = self.members.iter().map(|member| u64::from(member.space.pages())).sum();
        self.blocks.fit(total);
        let mut next = pages.start;
        for page in pages.clone() {
            let global = self.members.at(slot).global_page(page);
            let Some(before) =
                self.blocks.replace(image, block.wrapping_add(u64::from(page - pages.start)), global)
            else {
                continue;
            };
            if page >= next && self.members.at(slot).mergeable(page) {
                next = page + self.merge_with(slot, page, pages.end, before);
            }
        }
    }

    /// Brings the metadata of pages up to date. Returns whether that was possible.
    fn own(&mut self, slot: Slot, pages: Range<u32>) -> bool {
        self.learn_huge(slot, pages.clone());
        let mut runs = std::mem::take(&mut self.runs);
        runs.clear();
        let known = self.members.at(slot).space.memory().private(pages, &mut runs);
        for run in &runs {
            self.release(slot, run.clone());
            run.clone().for_each(|page| self.members.at_mut(slot).became_private(page));
        }
        self.runs = runs;
        self.counters.refusals += u64::from(known.is_err());
        known.is_ok()
    }

    /// Merges a page with the one at `place`, if they are alike, and their neighbours. Returns how
    /// many pages from it on are dealt with.
    fn merge_with(&mut self, slot: Slot, page: u32, end: u32, global: GlobalPage) -> u32 {
        let (twin_slot, twin) = self.members.locate(global);
        let shares = |other: &&Member| other.mode == Mode::Full && !other.space.lost();
        let Some(other) = self.members.get(twin_slot).filter(shares) else { return 1 };
        let pair = Twins { member: self.members.at(slot), page, other, twin };
        if !pair.are_identical(&mut self.counters.effort) {
            return 1;
        }
        let before = self.counters.merges;
        let frame = other.space.refers(twin).filter(|_| other.space.attached(twin));
        let done = match frame {
            Some(frame) => self.merge_stable(slot, page, end, frame),
            None if !self.own(twin_slot, twin..twin + 1) => 1,
            None if self.members.at(twin_slot).mergeable(twin) => {
                self.merge_unstable(slot, page, end, (twin_slot, twin))
            }
            None => 1,
        };
        self.counters.merges_hinted += (self.counters.merges - before).min(1);
        done.max(1)
    }
}
