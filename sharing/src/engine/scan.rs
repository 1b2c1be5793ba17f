//! Scanning of pages that are idle, and pages that leave their frames when they were written.

use std::ops::Range;

use crate::changes::follower::{Follower, spans};
use crate::engine::Engine;
use crate::engine::members::{Flags, Mode};
use crate::engine::passes::CHUNK_PAGES;
use crate::numbers::Slot;

impl Engine {
    /// Pages of a range that provably have private copies leave their frames, or are zero no longer.
    pub(crate) fn release_private(&mut self, slot: Slot, pages: Range<u32>) {
        let mut runs = std::mem::take(&mut self.runs);
        runs.clear();
        match self.members.at(slot).space.memory().private(pages, &mut runs) {
            Ok(()) => runs.iter().for_each(|run| self.release(slot, run.clone())),
            // The next sweep finds them.
            Err(_) => self.counters.refusals += 1,
        }
        self.runs = runs;
    }

    /// Scans the next idle pages. Returns whether there were any.
    pub(crate) fn scan_rested(&mut self) -> bool {
        let next = |slot: Slot, from: u32| {
            let member = self.members.get(slot).filter(|member| member.active())?;
            let pages = member.space.pages();
            let follower = member.follower.as_ref()?;
            let start = (from < pages).then(|| follower.next_ready(from)).flatten()?;
            Some((slot, start, pages.min(start.saturating_add(CHUNK_PAGES))))
        };
        let (slot, page) = self.rested_cursor;
        let found =
            next(slot, page).or_else(|| self.members.slots_after(slot).find_map(|slot| next(slot, 0)));
        let Some((slot, start, end)) = found else {
            let active = self.members.iter_mut().filter(|member| member.active());
            let followers = active.filter_map(|member| member.follower.as_mut());
            if followers.filter_map(Follower::promote).count() > 0 {
                return true;
            }
            self.counters.full_scans += u64::from(std::mem::take(&mut self.has_scanned_rested));
            return false;
        };
        self.has_scanned_rested = true;
        let end = self.scan_ready(slot, start..end);
        self.rested_cursor = (slot, end);
        self.store.reclaim(&*self.host.calls);
        true
    }

    /// Looks at the pages of a chunk that are ready. Returns up to which: somebody may have waited.
    fn scan_ready(&mut self, slot: Slot, mut chunk: Range<u32>) -> u32 {
        self.learn_huge(slot, chunk.clone());
        let mut runs = std::mem::take(&mut self.runs);
        runs.clear();
        let member = self.members.at(slot);
        let Some(follower) = &member.follower else { return chunk.end };
        let mut unknown = Vec::new();
        for span in spans(follower.ready_runs(chunk.clone())) {
            if member.space.memory().private(span.clone(), &mut runs).is_err() {
                self.counters.refusals += 1;
                unknown.push(span);
            }
        }
        for run in &runs {
            self.release(slot, run.clone());
            let member = self.members.at_mut(slot);
            let Some(follower) = &member.follower else { continue };
            let ready: Vec<_> = run.clone().filter(|&page| follower.is_ready(page)).collect();
            ready.into_iter().for_each(|page| member.became_private(page));
        }
        for run in &runs {
            let end = self.scan_run(slot, run.clone(), true);
            if end < run.end {
                chunk.end = end;
                break;
            }
        }
        let member = self.members.at_mut(slot);
        let full = member.mode == Mode::Full;
        // What a guest says may change while nothing is written.
        let unlikely =
            runs.iter().cloned().flatten().filter(|&page| !member.wanted(page)).collect::<Vec<_>>();
        let passed_over = |page: u32| unlikely.binary_search(&page).is_ok();
        let Some(follower) = &mut member.follower else { return chunk.end };
        for page in runs.iter().cloned().flatten().filter(|&page| page < chunk.end) {
            let flags = member.flags[page as usize];
            let settled = flags.contains(Flags::UNIQUE) || flags.contains(Flags::ALIKE);
            let open = flags.contains(Flags::PRIVATE) && !settled;
            if open && full && !passed_over(page) {
                follower.try_later(page);
            }
        }
        for page in unknown.into_iter().flatten().filter(|&page| page < chunk.end) {
            if follower.is_ready(page) {
                follower.try_later(page);
            }
        }
        follower.scanned(chunk.clone());
        self.runs = runs;
        chunk.end
    }
}
