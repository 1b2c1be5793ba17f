//! Merging pages of VMs that other processes hold.
//!
//! To ask another process takes as long as to compare some ten pages, so nothing is asked that the order to merge finds
//! out itself: it compares under protection, and says how far the pages are identical. A page that has a match takes as
//! many neighbours along as the VM's last runs were long, and frames that turn out to have no sharers are given up.

#![expect(unsafe_code, reason = "reads frames by address")]

use crate::engine::Engine;
use crate::engine::members::Member;
use crate::frames::space::WINDOW_PAGES;
use crate::frames::store::Frame;
use crate::memory::content;
use crate::memory::guest::Source;
use crate::numbers::Slot;

/// Neighbours that are taken along at first, and at least as soon as runs are longer than a page.
const LEAST: u32 = 4;

/// How long a VM's runs are expected to be, in pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reach(u32);

impl Default for Reach {
    fn default() -> Self {
        Self(4 * LEAST)
    }
}

impl Reach {
    /// So many of the pages that were tried were merged.
    fn learn(&mut self, merged: u32, tried: u32) {
        let next = if merged == tried { self.0.max(2 * tried) } else { 2 * merged };
        self.0 = next.clamp(LEAST, WINDOW_PAGES);
    }
}

impl Engine {
    /// Whether runs are merged without looking ahead first: a VM is in another process, and mappings are ample, so
    /// that a run of any length is worth them.
    pub(crate) fn is_far(&self, slots: [Slot; 2]) -> bool {
        let is_far = |&slot: &Slot| self.members.at(slot).space.memory().is_far();
        let is_ample = |&slot: &Slot| self.members.at(slot).budget().shortest_run() == 1;
        slots.iter().any(is_far) && slots.iter().all(is_ample)
    }

    /// How many neighbours a run may have, the page itself included.
    fn reach(&self, slot: Slot) -> u32 {
        if self.lookahead { self.members.at(slot).reach.0 } else { 1 }
    }

    /// Maps a frame over a page, and the frames behind it over the pages behind it. Returns how many pages from it on
    /// are dealt with.
    pub(crate) fn merge_far_stable(&mut self, slot: Slot, page: u32, end: u32, frame: Frame) -> u32 {
        let most = self.reach(slot).min(end - page).min(u32::MAX - frame.number());
        let (member, store) = (self.members.at(slot), &self.store);
        let is_possible = |&next: &u32| member.mergeable(page + next) && store.is_filled(frame + next);
        let count = (0..most).take_while(is_possible).count() as u32;
        if count == 0 || !self.affordable(slot, page, count, Source::Frames(frame), 0) {
            return count.max(1);
        }
        let merged = self.merge_until(slot, page, frame, count, 1);
        self.members.at_mut(slot).reach.learn(merged, count);
        self.counters.merges_stable += u64::from(merged.min(1));
        self.counters.merges_lookahead += u64::from(merged.saturating_sub(1));
        merged.max(1)
    }

    /// Makes frames of a page's twin and the pages behind it, which are not shared yet, and maps them over both runs.
    /// Returns how many pages from the page on are dealt with.
    pub(crate) fn merge_far_unstable(&mut self, slot: Slot, page: u32, end: u32, twin: (Slot, u32)) -> u32 {
        let (twin_slot, twin_page) = twin;
        let (member, other) = (self.members.at(slot), self.members.at(twin_slot));
        // Within one VM the two runs must not overlap.
        let apart = if slot == twin_slot { page.abs_diff(twin_page) } else { WINDOW_PAGES };
        let most = self.reach(slot).min(apart).min(end - page).min(other.space.pages() - twin_page);
        let is_possible = |&next: &u32| member.mergeable(page + next) && other.mergeable(twin_page + next);
        let count = (0..most).take_while(is_possible).count() as u32;
        if count == 0 {
            return 1;
        }
        let preferred = follows(other, twin_page).or_else(|| follows(member, page));
        let Some(hold) = self.store.allocate(count, preferred) else {
            self.counters.refusals += 1;
            return 1;
        };
        let frame = hold.first();
        let source = Source::Frames(frame);
        let twin_cost = self.members.at(twin_slot).space.mappings_added(twin_page, count, source);
        let mut merged = 0;
        if self.affordable(slot, page, count, source, twin_cost) {
            if self.write_frames(&hold, twin_slot, twin_page).is_ok() {
                self.store.fill(&hold);
                // Pages of zeros become untouched memory when they are scanned.
                // SAFETY: the frames are filled.
                let is_content = |&next: &u32| !unsafe { content::zero(self.store.content(frame + next)) };
                let full = (0..count).take_while(is_content).count() as u32;
                merged = if full > 0 { self.merge_until(slot, page, frame, full, 1) } else { 0 };
                let twins = if merged > 0 { self.merge_run(twin_slot, twin_page, frame, merged) } else { 0 };
                self.members.at_mut(slot).reach.learn(merged, count);
                self.counters.merges_unstable += u64::from((merged + twins).min(2));
                self.counters.merges_lookahead += u64::from((merged + twins).saturating_sub(2));
            } else {
                self.counters.refusals += 1;
            }
        }
        for frame in frame.run(merged) {
            if self.store.sharers(frame) > 0 {
                self.index_frame(frame);
            }
        }
        self.release_hold(hold);
        if merged > 0 {
            self.index_copies(frame, merged, [(slot, page), (twin_slot, twin_page)]);
        }
        merged.max(1)
    }
}

/// The frame behind that of the page before.
pub(crate) fn follows(member: &Member, page: u32) -> Option<Frame> {
    let before = page.checked_sub(1)?;
    member.space.attached(before).then(|| member.space.refers(before))?.map(|frame| frame + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reach_follows_the_length_of_runs() {
        let mut reach = Reach::default();
        for _ in 0..10 {
            reach.learn(reach.0, reach.0);
        }
        assert_eq!(reach.0, WINDOW_PAGES);
        // A run at the end of memory says nothing of others.
        reach.learn(3, 3);
        assert_eq!(reach.0, WINDOW_PAGES);
        reach.learn(20, 100);
        assert_eq!(reach.0, 40);
        reach.learn(0, 40);
        assert_eq!(reach.0, LEAST);
    }
}
