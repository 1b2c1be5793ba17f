//! Full passes, for VMs whose changes nobody notes: every private page is scanned in every pass,
//! and counts as settled when its digest is that of the pass before.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::engine::Engine;
use crate::numbers::Slot;

/// Pages that one step scans: about a millisecond of work.
pub(crate) const CHUNK_PAGES: u32 = 1024;

/// Where the pass stands.
#[derive(Debug)]
pub(crate) struct Pass {
    /// The slot and page where the next step starts.
    cursor: (Slot, u32),
    events_before: u64,
    /// When the next pass may begin.
    pub(crate) due: Instant,
    /// The pause after a pass that found nothing.
    pub(crate) pause_ms: u64,
}

impl Pass {
    pub(crate) fn new() -> Self {
        Self { cursor: (Slot::default(), 0), events_before: 0, due: Instant::now(), pause_ms: 0 }
    }
}

impl Engine {
    /// When the next pass may begin or go on, if there is one.
    pub(crate) fn pass_due(&self) -> Option<Instant> {
        self.passes().then_some(self.pass.due)
    }

    /// Whether there are VMs to be scanned in full passes.
    fn passes(&self) -> bool {
        self.members.iter().any(|member| member.follower.is_none() && member.active())
    }

    /// Goes on with the pass if it is time for that. Returns whether it was.
    pub(crate) fn go_on_with_pass(&mut self, now: Instant) -> bool {
        if self.pass.due > now || !self.passes() {
            return false;
        }
        if let Some(events) = self.pass_step() {
            let (shortest, longest) = self.pauses_ms;
            let pause = if events > 0 { shortest } else { 2 * self.pass.pause_ms };
            self.pass.pause_ms = pause.clamp(shortest, longest);
            self.pass.due = now + Duration::from_millis(self.pass.pause_ms);
        }
        true
    }

    /// Goes over the next chunk of pages of VMs without a change log. At the end of a pass returns
    /// how many pages were merged, freed, or had changed in it.
    pub fn pass_step(&mut self) -> Option<u64> {
        self.recount();
        self.begin_step();
        let (slot, start) = self.pass.cursor;
        let Some(next) = self.members.next_from(slot) else {
            return Some(self.end_pass());
        };
        let start = if next == slot { start } else { 0 };
        let member = self.members.at(next);
        let pages = member.space.pages();
        let end = pages.min(start.saturating_add(CHUNK_PAGES));
        if member.follower.is_some() || !member.active() || start >= end {
            self.pass.cursor = (next.next(), 0);
            return None;
        }
        let end = self.go_over(next, start..end);
        self.pass.cursor = if end == pages { (next.next(), 0) } else { (next, end) };
        self.store.reclaim(&*self.host.calls);
        self.host.calls.wake_latecomers();
        None
    }

    fn end_pass(&mut self) -> u64 {
        self.pass.cursor = (Slot::default(), 0);
        self.counters.full_scans += 1;
        let events = self.counters.events() - self.pass.events_before;
        self.pass.events_before = self.counters.events();
        for slot in self.members.slots().collect::<Vec<_>>() {
            if self.members.at(slot).follower.is_none() {
                self.end_interval_of_huge(slot);
            }
        }
        events
    }

    /// Returns up to which page there was time.
    fn go_over(&mut self, slot: Slot, chunk: Range<u32>) -> u32 {
        let mut done = chunk.end;
        self.learn_huge(slot, chunk.clone());
        let mut runs = std::mem::take(&mut self.runs);
        runs.clear();
        match self.members.at(slot).space.memory().private(chunk, &mut runs) {
            Ok(()) => {
                for run in &runs {
                    self.release(slot, run.clone());
                    let member = self.members.at_mut(slot);
                    run.clone().for_each(|page| member.became_private(page));
                }
                for run in &runs {
                    let end = self.scan_run(slot, run.clone(), false);
                    if end < run.end {
                        done = end;
                        break;
                    }
                }
            }
            Err(_) => self.counters.refusals += 1,
        }
        self.runs = runs;
        done
    }

    /// Private pages have left their frames, and are zero pages no longer.
    pub(crate) fn release(&mut self, slot: Slot, run: Range<u32>) {
        let Self { members, store, stable, counters, cache, .. } = self;
        let member = members.at_mut(slot);
        for page in run {
            member.not_zero(page);
            if member.space.attached(page) {
                // Pages that were put on frames to see whether they are written were never merged.
                let lent = member.space.census_mut().is_some_and(|census| census.broken(page));
                counters.breaks += u64::from(!lent);
                if let Some(named) = member.space.refers(page).and_then(|frame| cache.index.of(frame)) {
                    member.gave_up(named.key);
                }
                if let Some(frame) = member.space.detach(page, store) {
                    stable.remove(frame, store);
                }
            }
        }
    }
}
