//! Repairs the frame store when most of it is holes: frames at its end are moved into free places
//! before them, in guest order.
//!
//! Holes cost memory: the kernel keeps a node of 576 bytes for every 64 pages of the memory file of
//! which one is in use, a page of page tables for every 512, and the metadata a record for each. Guests run
//! on; a frame is copied, and each page on it is compared with the copy under protection before it is
//! mapped there.
//!
//! All of it is done in steps of about a millisecond, between which guests and disks use frames as ever. So
//! the repair owns what it moves: it has a [`Hold`](crate::frames::store::Hold) on each frame under way and on its copy, until the pages
//! have been scanned. Neither can die meanwhile, and become another's.

use std::time::{Duration, Instant};

use crate::blocks::block_index::Keep;
use crate::blocks::replace::Replacement;
use crate::engine::Engine;
use crate::frames::space::{SpaceError, WINDOW_PAGES};
use crate::frames::store::Frame;
use crate::memory::guest::Source;
use crate::numbers::Slot;
use crate::policy::compaction::{Move, Work};

/// Frames moved in one go.
const BATCH_FRAMES: usize = 4096;

/// How long one step may take; what it is at is ended, which takes a window at most.
const STEP: Duration = Duration::from_micros(600);

/// Pages or frames that are scanned between two readings of the clock.
const GLANCE: u32 = 512;

/// Frames that are copied at once.
const COPIED: u32 = 64;

/// When it is tried again after moving brought little.
const RETRY: Duration = Duration::from_secs(10);

/// The time that one step has.
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn over(&self) -> bool {
        self.0.elapsed() >= STEP
    }
}

impl Engine {
    /// Goes on with the repair of the store, where one is due. Returns whether there was something to
    /// do.
    pub fn compact_step(&mut self, now: Instant) -> bool {
        let clock = Clock::start();
        self.compaction.work = match self.compaction.work {
            Work::None => {
                if self.compaction.due > now || !self.compaction.wanted(&self.store) {
                    return false;
                }
                self.compaction.due = now + RETRY;
                self.compaction.places_before = self.store.places();
                self.compaction.moved = 0;
                Work::Copying {
                    last: Frame::new(self.store.live() + self.store.live() / 8),
                    slot: Slot::default(),
                    page: 0,
                }
            }
            Work::Copying { last, slot, page } => self.copy_frames(last, slot, page, &clock),
            Work::MovingIdle { last, next } => self.move_idle(last, next, &clock),
            Work::Changing { slot, page } => self.change_pages(slot, page, &clock),
            Work::Ending => self.end_moves(now, &clock),
        };
        self.store.reclaim(&*self.host.calls);
        true
    }

    /// Frames that the repair has copied, and the copies.
    #[doc(hidden)]
    #[must_use]
    pub fn frames_under_way(&self) -> Vec<(Frame, Frame)> {
        self.compaction.moves.iter().map(|(&old, moved)| (old, moved.new.first())).collect()
    }

    /// Copies frames to free places, in the order in which guests use them.
    fn copy_frames(&mut self, last: Frame, slot: Slot, mut page: u32, clock: &Clock) -> Work {
        let enough = self.compaction.moves.len() >= BATCH_FRAMES;
        let Some(next) = self.members.next_from(slot).filter(|_| !enough) else {
            return Work::MovingIdle { last, next: last };
        };
        if next != slot {
            page = 0;
        }
        let pages = self.members.at(next).space.pages();
        while page < pages {
            if clock.over() {
                return Work::Copying { last, slot: next, page };
            }
            let end = pages.min(page + GLANCE);
            let Some((first, count)) = self.next_run(next, page, end, last) else {
                page = end;
                continue;
            };
            let Some(copied) = self.copy_run(next, first, count, last) else {
                // There is no place, or no memory, for more.
                return Work::MovingIdle { last, next: last };
            };
            page = first + copied;
            if self.compaction.moves.len() >= BATCH_FRAMES {
                break;
            }
        }
        Work::Copying { last, slot: next.next(), page: 0 }
    }

    /// The next pages on consecutive frames that are to be moved, between two pages: the first, and how many.
    fn next_run(&self, slot: Slot, from: u32, end: u32, last: Frame) -> Option<(u32, u32)> {
        let backing = self.members.at(slot).space.backing();
        let frame = |page: u32| backing.refers(page).filter(|_| backing.attached(page));
        let moves = |frame: Frame| frame >= last && !self.compaction.moves.contains_key(&frame);
        let mut attached = backing.attached_runs(from..end).flatten();
        let first = attached.find(|&page| frame(page).is_some_and(moves))?;
        let old = frame(first)?;
        let goes_on = |&index: &u32| frame(first + index) == Some(old + index) && moves(old + index);
        let count = 1 + (1..COPIED.min(end - first)).take_while(goes_on).count() as u32;
        Some((first, count))
    }

    /// Copies the frames of a run to free places before `last`. Returns how many; `None` where there are no
    /// places left, or no memory.
    fn copy_run(&mut self, slot: Slot, page: u32, count: u32, last: Frame) -> Option<u32> {
        let old = self.members.at(slot).space.refers(page)?;
        let hold = self.store.allocate_before(last, count)?;
        let count = hold.count();
        if self.store.write(&hold, self.store.content(old)).is_err() {
            self.counters.refusals += 1;
            self.release_hold(hold);
            return None;
        }
        self.store.fill(&hold);
        for (old, new) in old.run(count).zip(hold.each()) {
            let Some(old) = self.store.hold(old) else {
                self.release_hold(new);
                continue;
            };
            // From now on the copy is what is found.
            self.replace_in_books(old.first(), new.first());
            self.compaction.moves.insert(old.first(), Move { old, new });
        }
        Some(count)
    }

    /// The copy of a frame is found in its place, and holds the blocks that the frame held.
    fn replace_in_books(&mut self, old: Frame, new: Frame) {
        self.store.set_digest(new, self.store.digest(old));
        if self.store.indexed(old) {
            self.stable.remove(old, &mut self.store);
            self.stable.insert(new, &mut self.store);
        }
        if self.store.kept(old) {
            self.cache.index.move_frame(old, new);
            if self.store.hand_over(old, new) {
                self.stable.remove(old, &mut self.store);
            }
        }
    }

    /// Moves frames that no page is on, and nobody fills, to free places before `last`, as far as there are any.
    fn move_idle(&mut self, last: Frame, next: Frame, clock: &Clock) -> Work {
        let left = self.store.places().saturating_sub(next.number());
        let mut looked = 0;
        for old in next.run(left) {
            looked += 1;
            if looked % GLANCE == 0 && clock.over() {
                return Work::MovingIdle { last, next: old };
            }
            if !self.store.kept(old) || self.store.sharers(old) > 0 {
                continue;
            }
            // A copy is work for some microseconds.
            looked += COPIED;
            let Some(new) = self.store.allocate_before(last, 1) else { break };
            if self.store.write(&new, self.store.content(old)).is_err() {
                self.counters.refusals += 1;
                self.release_hold(new);
                break;
            }
            self.store.fill(&new);
            self.replace_in_books(old, new.first());
            self.release_hold(new);
        }
        Work::Changing { slot: Slot::default(), page: 0 }
    }

    /// Maps the copies over pages on frames under way.
    fn change_pages(&mut self, slot: Slot, mut page: u32, clock: &Clock) -> Work {
        let Some(next) = self.members.next_from(slot).filter(|_| !self.compaction.moves.is_empty()) else {
            return Work::Ending;
        };
        if next != slot {
            page = 0;
        }
        let pages = self.members.at(next).space.pages();
        let mut windows = 0;
        while page < pages && !self.members.at(next).space.lost() {
            if windows >= self.compaction.windows || clock.over() {
                self.report_mappings();
                return Work::Changing { slot: next, page };
            }
            let end = pages.min(page + GLANCE);
            let Some((first, new, count)) = self.next_to_change(next, page, end) else {
                page = end;
                continue;
            };
            windows += 1;
            page = first + self.change_run(next, first, new, count);
        }
        self.report_mappings();
        Work::Changing { slot: next.next(), page: 0 }
    }

    /// The next pages between two whose frames are under way to consecutive places: the first, its new frame,
    /// and how many.
    fn next_to_change(&self, slot: Slot, from: u32, end: u32) -> Option<(u32, Frame, u32)> {
        let backing = self.members.at(slot).space.backing();
        let target = |page: u32| {
            let old = backing.refers(page).filter(|_| backing.attached(page))?;
            self.compaction.moves.get(&old).map(|moved| moved.new.first())
        };
        let mut attached = backing.attached_runs(from..end).flatten();
        let (first, new) = attached.find_map(|page| target(page).map(|new| (page, new)))?;
        let longest = WINDOW_PAGES.min(end - first);
        let count =
            1 + (1..longest).take_while(|&next| target(first + next) == Some(new + next)).count() as u32;
        Some((first, new, count))
    }

    /// Returns how many pages are dealt with: at least one.
    fn change_run(&mut self, slot: Slot, first: u32, new: Frame, count: u32) -> u32 {
        let Self { members, store, stable, counters, .. } = self;
        let member = members.at_mut(slot);
        let added = member.space.mappings_added(first, count, Source::Frames(new));
        if added > 0 && added + 2 > member.budget().room() {
            return count;
        }
        let mut dead = Vec::new();
        match member.space.change_frames(first, new, count, store, &mut dead) {
            Ok(moved) => {
                dead.into_iter().for_each(|frame| stable.remove(frame, store));
                // The first page that differs was written to, and leaves its frame in its own time.
                (moved + 1).min(count)
            }
            Err(error) => {
                counters.refusals += 1;
                if matches!(error, SpaceError::Lost { .. }) {
                    member.tell_lost(&error);
                }
                count
            }
        }
    }

    /// All pages left while a frame was under way: the block that it holds, if it does, is cached now.
    fn note_left(&mut self, frame: Frame) {
        let named = self.cache.index.of(frame);
        if named.is_some_and(|named| named.keep == Keep::Exclusive && !self.cache.order.contains(named.key)) {
            self.store.note_left(frame);
        }
    }

    /// Gives up what was held, and the memory of what has died.
    fn end_moves(&mut self, now: Instant, clock: &Clock) -> Work {
        let mut ended = 0;
        while let Some((_, Move { old, new })) = self.compaction.moves.pop_first() {
            // Pages may have stayed where they were: for want of mappings, or since a call was refused.
            match (self.store.sharers(old.first()), self.store.sharers(new.first())) {
                (1.., 0) => self.replace_in_books(new.first(), old.first()),
                (0, 0) => self.note_left(new.first()),
                _ => {}
            }
            self.compaction.moved += usize::from(self.store.sharers(old.first()) == 0);
            self.release_hold(new);
            self.release_hold(old);
            ended += 1;
            if ended % COPIED == 0 && clock.over() {
                return Work::Ending;
            }
        }
        if self.store.dead() > 0 && self.store.reclaim(&*self.host.calls) > 0 {
            return Work::Ending;
        }
        self.counters.compactions += 1;
        // What is at the end of the store may be at the end of the guests as well, many batches from here.
        let much = self.compaction.moved >= BATCH_FRAMES / 2;
        if much || self.store.places() < self.compaction.places_before / 10 * 9 {
            self.compaction.due = now;
        }
        Work::None
    }
}
