//! Pages whose content their guest no longer wants: those in its balloon, and those that it reports as free.
//!
//! The guest says so by a request that the device answers when this is done, and leaves the pages alone until then.
//! So there is nothing to be proven, other than for pages of which a guest only [says](crate::engine::give_back)
//! that they are free: whatever a page holds, it becomes untouched memory. A guest that writes all the same loses
//! what it wrote.
//!
//! Nothing is done to pages without memory. A run on frames whose new mappings the process cannot bear stays as it
//! is: what it holds is the guest's own, and takes little memory.

use std::ops::Range;

use crate::blocks::VmNumber;
use crate::collections::sets::without;
use crate::engine::Engine;
use crate::engine::holds::Since;
use crate::frames::space::WINDOW_PAGES;
use crate::memory::guest::Source;
use crate::memory::ram::HUGE_PAGES;
use crate::numbers::Slot;

/// Pages that one piece looks at, at most.
const PIECE_PAGES: u32 = 1024;

/// Mappings that are left for others.
const ROOM: i64 = 64;

/// What was done of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discarded {
    /// The page to go on with.
    pub next: u32,
    /// Pages that had memory and have none any more.
    pub freed: u32,
}

impl Engine {
    /// Frees the first of these pages, as many as about a millisecond is enough for, and one at least. Does nothing
    /// for a VM that is not there any more.
    pub fn discard(&mut self, vm: VmNumber, pages: Range<u32>) -> Discarded {
        let member = self.members.get(vm.slot);
        let member = member.filter(|member| member.id == vm.id && !member.space.lost());
        let end = member.map_or(0, |member| member.space.pages()).min(pages.end);
        if pages.start >= end {
            return Discarded { next: pages.end, freed: 0 };
        }
        let since = Since::now();
        self.begin_step();
        let discarded = self.discard_piece(vm.slot, pages.start..end);
        self.report_mappings();
        self.store.reclaim(&*self.host.calls);
        self.holds.note("pages that guests give back", since);
        // Pages behind the end of the memory are nobody's.
        let next = if discarded.next == end { pages.end } else { discarded.next };
        Discarded { next, ..discarded }
    }

    fn discard_piece(&mut self, slot: Slot, pages: Range<u32>) -> Discarded {
        let end = (pages.start / PIECE_PAGES + 1).saturating_mul(PIECE_PAGES).min(pages.end);
        let piece = pages.start..end;
        let mut done = Discarded { next: end, freed: 0 };
        self.split_at_edges(slot, &pages, piece.clone());
        let space = &self.members.at(slot).space;
        let mut runs: Vec<(Range<u32>, bool)> =
            space.backing().on_frames().runs_within(piece.clone()).map(|run| (run, true)).collect();
        let mut private = Vec::new();
        if space.memory().private(piece, &mut private).is_err() {
            self.counters.refusals += 1;
            return done;
        }
        let on_frames: Vec<_> = runs.iter().map(|(run, _)| run.clone()).collect();
        runs.extend(without(&private, &on_frames).map(|run| (run, false)));
        runs.sort_unstable_by_key(|(run, _)| run.start);
        for (run, on_frames) in runs {
            let mut first = run.start;
            while first < run.end {
                let count = WINDOW_PAGES.min(run.end - first);
                if !on_frames || self.bears_untouched(slot, first, count) {
                    done.freed += self.discard_run(slot, first, count);
                }
                first += count;
                if self.spent() || self.members.at(slot).space.lost() {
                    return Discarded { next: first, ..done };
                }
            }
        }
        done
    }

    /// Breaks up huge pages that lie in the piece, and of which not all is to go: the kernel would keep the memory.
    fn split_at_edges(&mut self, slot: Slot, pages: &Range<u32>, piece: Range<u32>) {
        if self.members.at(slot).huge.is_none() {
            return;
        }
        self.learn_huge(slot, piece.clone());
        let firsts = [piece.start, piece.end - 1].map(|page| page / HUGE_PAGES * HUGE_PAGES);
        for first in firsts {
            let is_whole = pages.start <= first && first + HUGE_PAGES <= pages.end;
            if !is_whole && self.members.at(slot).is_huge(first) {
                self.split(slot, first);
            }
        }
    }

    /// Whether the process can bear the mappings that untouched memory in the place of frames needs.
    fn bears_untouched(&mut self, slot: Slot, first: u32, count: u32) -> bool {
        let member = self.members.at(slot);
        let added = member.space.mappings_added(first, count, Source::Zeros);
        if added <= 0 {
            return true;
        }
        self.report_mappings();
        let budget = self.members.at(slot).budget();
        budget.room() >= added + ROOM && budget.shortest_run() <= count
    }

    /// Makes a run untouched memory, all of which is on frames or none. Returns how many pages had memory.
    fn discard_run(&mut self, slot: Slot, first: u32, count: u32) -> u32 {
        let held = self.forget_run(slot, first, count);
        let mut dead = Vec::new();
        let Self { members, store, .. } = self;
        let outcome = members.at_mut(slot).space.discard(first, count, store, &mut dead);
        dead.into_iter().for_each(|frame| self.stable.remove(frame, &mut self.store));
        let freed = self.note_outcome(slot, outcome);
        for (page, held) in (first..first + freed).zip(held) {
            let member = self.members.at_mut(slot);
            member.became_untouched(page);
            let noted = self.cache.copies.remove(member.global_page(page)).map(|record| record.key);
            if let Some(key) = held.or(noted) {
                member.gave_up(key);
            }
        }
        freed
    }
}
