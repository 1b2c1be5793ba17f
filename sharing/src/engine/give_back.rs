//! Free memory of guests goes back to the host.
//!
//! A guest says that a page is free; by the time that this is read it may be in use. So the host first makes
//! writes show: it puts the page on a frame of its own, with the content that it has, where the first write
//! makes a private copy that the page map proves. Then it asks the guest for a pass. What that pass, which
//! began after all this, says to be free, and what under protection still shows its frame, was free at some
//! moment since when nobody has written to it: its content is nobody's. It becomes fresh memory, which takes
//! none before it is touched. A page that was taken into use in between has been written, or its user has yet
//! to write to it before it can read anything that means something.
//!
//! Guests that look at the content of freed pages say so ([`samepage_hole::FREED_PAGES_MATTER`]), and keep
//! them. A guest that lies loses content of its own.

use std::ops::Range;

use samepage_hole::FREED_PAGES_MATTER;

use crate::engine::Engine;
use crate::engine::members::{Member, Mode};
use crate::engine::turns::Kind;
use crate::frames::space::WINDOW_PAGES;
use crate::memory::guest::Source;
use crate::numbers::Slot;
use crate::policy::give_back::Work;

/// Pages that are worth asking for.
const ENOUGH: u32 = 64;

/// Free pages in a row that are worth two mappings for a while.
const SHORTEST_RUN: u32 = 4;

/// Pages that one step puts on frames, or gives back, at most; it ends earlier once it has taken its time.
const STEP_PAGES: u32 = 1024;

/// Pages that are asked for at once, whatever became of others: 4 MiB.
const MUCH: u32 = 1024;

/// Mappings that are left for others.
const ROOM: i64 = 64;

impl Engine {
    /// A pass was read that answers this request.
    pub(crate) fn pass_was_read(&mut self, slot: Slot, answered: u32) {
        let member = self.members.at_mut(slot);
        let keeps = member.mode != Mode::Full;
        let Some(claims) = &mut member.claims else { return };
        let matter = claims.header().is_some_and(|header| header.features & FREED_PAGES_MATTER != 0);
        let offered = claims.offered.count();
        let giving = &mut claims.giving;
        giving.work = match giving.work {
            _ if matter || keeps => Work::None,
            Work::Asked if answered == giving.request => Work::Taking(0),
            Work::None if giving.pause && offered < MUCH => {
                giving.pause = false;
                Work::None
            }
            Work::None if offered >= ENOUGH => Work::Lending(0),
            other => other,
        };
    }

    /// Goes on with giving memory back, by about a millisecond of work. Returns whether there was any.
    pub(crate) fn give_back_step(&mut self) -> bool {
        let busy = |member: &Member| {
            let work = member.claims.as_ref().map(|claims| claims.giving.work);
            member.active() && matches!(work, Some(Work::Lending(_) | Work::Taking(_)))
        };
        let Some(slot) = self.next_with_work(Kind::GiveBack, busy) else { return false };
        let work = self.members.at(slot).claims.as_ref().map(|claims| claims.giving.work);
        let next = match work {
            Some(_) if self.members.at(slot).mode != Mode::Full => Work::None,
            Some(Work::Lending(from)) => self.lend_next(slot, from),
            Some(Work::Taking(from)) => self.take_next(slot, from),
            _ => Work::None,
        };
        if let Some(claims) = &mut self.members.at_mut(slot).claims {
            claims.giving.work = next;
        }
        self.store.reclaim(&*self.host.calls);
        true
    }

    /// Puts the next free pages on frames.
    fn lend_next(&mut self, slot: Slot, from: u32) -> Work {
        let member = self.members.at(slot);
        let Some(claims) = &member.claims else { return Work::None };
        let pages = member.space.pages();
        let end = pages.min(from.saturating_add(STEP_PAGES));
        let runs: Vec<_> = claims.offered.runs_within(from..end).collect();
        let stopped = runs.into_iter().find_map(|run| self.lend(slot, run));
        let end = stopped.unwrap_or(end);
        let member = self.members.at_mut(slot);
        let Some(claims) = &mut member.claims else { return Work::None };
        claims.offered.remove_range(from..end);
        let next = if end < pages { claims.offered.next_from(end) } else { None };
        if let Some(next) = next {
            return Work::Lending(next);
        }
        let lent = member.space.backing().census().map_or(0, |census| census.lent().count());
        claims.giving.lent = lent;
        claims.giving.given = 0;
        if lent == 0 {
            return Work::None;
        }
        claims.giving.request = claims.giving.request.wrapping_add(1);
        claims.request(claims.giving.request);
        Work::Asked
    }

    /// Puts free pages on frames. Returns where it is to go on, once the step has taken its time.
    fn lend(&mut self, slot: Slot, pages: Range<u32>) -> Option<u32> {
        let member = self.members.at_mut(slot);
        for page in pages.clone().filter(|&page| member.space.attached(page)).collect::<Vec<_>>() {
            if let Some(census) = member.space.census_mut() {
                census.lend(page);
            }
        }
        for run in self.private_runs(slot, pages.clone()) {
            let mut page = run.start;
            while page < run.end && !self.members.at(slot).space.lost() {
                let member = self.members.at(slot);
                let is_huge = member.is_huge(page);
                let alike = |&next: &u32| member.is_huge(next) == is_huge;
                let end = run.end.min(page + WINDOW_PAGES);
                let count = (page..end).take_while(alike).count() as u32;
                let zero = member.space.memory().zeros(page..page + 1) == 1;
                page += if is_huge {
                    // A huge page that is free in good part is split when it is cold.
                    let member = self.members.at_mut(slot);
                    (page..page + count).for_each(|page| member.set_alike(page));
                    count
                } else if zero {
                    self.give_back(slot, page, page + count).max(1)
                } else {
                    self.lend_run(slot, page, count);
                    count
                };
                if self.spent() {
                    return Some(page);
                }
            }
        }
        self.spent().then_some(pages.end)
    }

    /// Runs of pages that have memory of their own, with the metadata brought up to date.
    fn private_runs(&mut self, slot: Slot, pages: Range<u32>) -> Vec<Range<u32>> {
        self.learn_huge(slot, pages.clone());
        let mut runs = Vec::new();
        if self.members.at(slot).space.memory().private(pages, &mut runs).is_err() {
            self.counters.refusals += 1;
            return Vec::new();
        }
        for run in &runs {
            self.release(slot, run.clone());
            let member = self.members.at_mut(slot);
            run.clone().for_each(|page| member.became_private(page));
        }
        runs
    }

    /// Puts a run of free pages on frames of their own.
    fn lend_run(&mut self, slot: Slot, first: u32, count: u32) {
        if count < SHORTEST_RUN {
            return;
        }
        let space = &self.members.at(slot).space;
        let before = first.checked_sub(1).filter(|&page| space.attached(page));
        let preferred = before.and_then(|page| space.refers(page)).and_then(|frame| frame.checked_add(1));
        let Some(hold) = self.store.allocate(count, preferred) else {
            self.counters.refusals += 1;
            return;
        };
        let frame = hold.first();
        let space = &self.members.at(slot).space;
        let added = space.mappings_added(first, count, Source::Frames(frame));
        self.report_mappings();
        let budget = self.members.at(slot).budget();
        let room = added <= 0 || budget.room() >= added + ROOM && budget.shortest_run() <= count;
        let mut lent = room;
        if room && self.write_frames(&hold, slot, first).is_err() {
            self.counters.refusals += 1;
            lent = false;
        }
        if lent {
            self.store.fill(&hold);
            self.map_frames(slot, first, frame, count);
        }
        for (page, frame) in (first..).zip(hold.frames()) {
            if self.store.sharers(frame) == 0 {
                continue;
            }
            self.index_frame(frame);
            if let Some(census) = self.members.at_mut(slot).space.census_mut() {
                census.lend(page);
            }
        }
        self.release_hold(hold);
    }

    /// Gives the next pages back of those that were put on frames.
    fn take_next(&mut self, slot: Slot, from: u32) -> Work {
        let member = self.members.at(slot);
        let Some(census) = member.space.backing().census() else { return Work::None };
        let end = member.space.pages().min(from.saturating_add(STEP_PAGES));
        let mut free: Vec<Range<u32>> = Vec::new();
        for page in census.lent().runs_within(from..end).flatten().filter(|&page| census.claim(page).free()) {
            match free.last_mut() {
                Some(run) if run.end == page && run.end - run.start < WINDOW_PAGES => run.end += 1,
                _ => free.push(page..page + 1),
            }
        }
        let end = free.into_iter().find_map(|run| self.take(slot, run)).unwrap_or(end);
        let member = self.members.at_mut(slot);
        if let Some(next) = member.space.backing().census().and_then(|census| census.lent().next_from(end)) {
            return Work::Taking(next);
        }
        if let Some(census) = member.space.census_mut() {
            census.end_lending();
        }
        if let Some(claims) = &mut member.claims {
            let giving = &mut claims.giving;
            // To free what is taken again at once costs more than it saves.
            giving.pause = giving.given < giving.lent / 2;
        }
        Work::None
    }

    /// Gives pages back, but for those that have been written. Returns where it is to go on, once the step has
    /// taken its time.
    fn take(&mut self, slot: Slot, pages: Range<u32>) -> Option<u32> {
        let mut page = pages.start;
        let (mut left, mut dead) = (Vec::new(), Vec::new());
        while page < pages.end && !self.members.at(slot).space.lost() {
            let Self { members, store, .. } = self;
            let (member, count) = (members.at_mut(slot), pages.end - page);
            // A page that has left its frame since is not attached.
            let count = (page..page + count).take_while(|&page| member.space.attached(page)).count() as u32;
            if count == 0 {
                page += 1;
                continue;
            }
            let outcome = member.space.discard_unwritten(page, count, store, &mut left, &mut dead);
            let failed = outcome.is_err();
            let given = self.note_outcome(slot, outcome);
            let member = self.members.at_mut(slot);
            (page..page + given).for_each(|page| member.not_zero(page));
            member.became_zero(page..page + given);
            for frame in left.drain(..) {
                if let Some(named) = self.cache.index.of(frame) {
                    member.gave_up(named.key);
                }
            }
            if let Some(claims) = &mut member.claims {
                claims.given_back += u64::from(given);
                claims.giving.given += given;
            }
            for frame in dead.drain(..) {
                self.stable.remove(frame, &mut self.store);
            }
            if failed {
                break;
            }
            page += given + 1;
            if self.spent() {
                return Some(page.min(pages.end));
            }
        }
        self.spent().then_some(pages.end)
    }
}
