//! Repairs the frame store when most of it is holes: frames at its end are moved into free places
//! before them, in guest order.
//!
//! Holes cost memory: the kernel keeps a node of 576 bytes for every 64 pages of the memory file of
//! which one is in use, a page of page tables for every 512, and the books a record for each. Guests run
//! on; a frame is copied, and each page on it is compared with the copy under protection before it is
//! mapped there.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::calls::Source;
use crate::engine::Engine;
use crate::space::{SpaceError, WINDOW_PAGES};
use crate::store::{Frame, FrameStore};

/// Places beyond those in use that do not count as holes.
const FEW: u32 = 4096;
/// Frames moved in one go.
const BATCH_FRAMES: u32 = 4096;
/// Pages that one step goes over.
const STEP_PAGES: u32 = 1 << 16;
/// Windows that one step takes.
const STEP_WINDOWS: u32 = 32;
/// When it is tried again after moving brought little.
const RETRY: Duration = Duration::from_secs(10);

/// Where the repair stands.
#[derive(Debug)]
pub(crate) struct Compaction {
    /// Frames under way, from their old places to their new.
    moves: HashMap<Frame, Frame>,
    /// The slot and page where it goes on.
    cursor: (usize, u32),
    places_before: u32,
    due: Instant,
}

impl Compaction {
    pub(crate) fn new() -> Self {
        Self { moves: HashMap::new(), cursor: (0, 0), places_before: 0, due: Instant::now() }
    }
}

/// Whether the store is more than half holes.
pub(crate) fn fragmented(store: &FrameStore) -> bool {
    store.places() > FEW + 2 * store.live()
}

impl Engine {
    /// Goes on with the repair of the store, where one is due. Returns whether there was something to
    /// do.
    pub(crate) fn compact(&mut self, now: Instant) -> bool {
        if self.compaction.moves.is_empty() {
            let due = self.compaction.due <= now && fragmented(&self.store);
            return due && self.begin_moves(now);
        }
        let (slot, page) = self.compaction.cursor;
        let Some(next) = self.members.next_from(slot) else {
            self.end_moves(now);
            return true;
        };
        let page = if next == slot { page } else { 0 };
        let pages = self.members.at(next).space.pages();
        let end = if self.members.at(next).space.lost() {
            pages
        } else {
            self.move_pages(next, page..pages.min(page.saturating_add(STEP_PAGES)))
        };
        self.compaction.cursor = if end >= pages { (next + 1, 0) } else { (next, end) };
        true
    }

    /// Copies the last frames to free places, in the order in which guests use them.
    fn begin_moves(&mut self, now: Instant) -> bool {
        let last = self.store.live() + self.store.live() / 8;
        let mut moves = HashMap::new();
        let slots: Vec<_> = self.members.slots().collect();
        for slot in slots {
            let mut page = 0;
            while (moves.len() as u32) < BATCH_FRAMES {
                let Some(run) = self.next_run(slot, page, last) else { break };
                page = run.end;
                self.move_frames(slot, run, last, &mut moves);
            }
        }
        self.move_idle(last);
        self.compaction.due = now + RETRY;
        self.compaction.places_before = self.store.places();
        self.compaction.cursor = (0, 0);
        self.compaction.moves = moves;
        !self.compaction.moves.is_empty()
    }

    /// Moves frames that no page is on to free places before `last`, as far as there are any.
    fn move_idle(&mut self, last: Frame) {
        let idle = |&(frame, _): &(Frame, _)| frame >= last && self.store.sharers(frame) == 0;
        let late: Vec<_> =
            self.books.names.all().filter(idle).map(|(frame, named)| (frame, *named)).collect();
        for (old, named) in late.into_iter().take(BATCH_FRAMES as usize) {
            let Some((new, _)) = self.store.allocate_before(last, 1) else { return };
            if self.store.write(new, self.store.content(old), 1).is_err() {
                self.counters.refusals += 1;
                self.store.abandon(new);
                return;
            }
            self.store.set_digest(new, self.store.digest(old));
            if named.indexed {
                self.stable.remove(old, &self.store);
                self.stable.insert(new, &self.store);
            }
            self.move_names(old, new);
        }
    }

    /// The copy of a frame holds the blocks that the frame held.
    fn move_names(&mut self, old: Frame, new: Frame) {
        if self.store.kept(old) {
            self.books.names.move_frame(old, new);
            self.store.keep(new);
            self.store.let_go(old);
        }
    }

    /// The next run of pages on consecutive frames, the first of which is from `last` on.
    fn next_run(&self, slot: usize, from: u32, last: Frame) -> Option<Range<u32>> {
        let space = &self.members.at(slot).space;
        let on_frame = |page: u32| space.refers(page).filter(|_| space.attached(page));
        let start = (from..space.pages()).find(|&page| on_frame(page).is_some_and(|frame| frame >= last))?;
        let first = on_frame(start)?;
        let longest = WINDOW_PAGES.min(space.pages() - start);
        let count =
            (1..longest).take_while(|&next| on_frame(start + next) == Some(first + next)).count() as u32;
        Some(start..start + 1 + count)
    }

    /// Copies the frames of a run to free places before `last`, as far as there are any.
    fn move_frames(&mut self, slot: usize, run: Range<u32>, last: Frame, moves: &mut HashMap<Frame, Frame>) {
        let mut page = run.start;
        while page < run.end {
            let Some(old) = self.members.at(slot).space.refers(page) else { return };
            let known =
                (0..run.end - page).take_while(|&index| moves.contains_key(&(old + index))).count() as u32;
            if known > 0 {
                page += known;
                continue;
            }
            let count =
                (0..run.end - page).take_while(|&index| !moves.contains_key(&(old + index))).count() as u32;
            let Some((new, count)) = self.store.allocate_before(last, count) else { return };
            if self.store.write(new, self.store.content(old), count).is_err() {
                self.counters.refusals += 1;
                (new..new + count).for_each(|frame| self.store.abandon(frame));
                return;
            }
            for index in 0..count {
                // From now on the copy is what is found.
                self.stable.remove(old + index, &self.store);
                self.store.set_digest(new + index, self.store.digest(old + index));
                self.stable.insert(new + index, &self.store);
                self.move_names(old + index, new + index);
                moves.insert(old + index, new + index);
            }
            page += count;
        }
    }

    /// Maps the new places over pages on frames under way. Returns the page to go on from.
    fn move_pages(&mut self, slot: usize, pages: Range<u32>) -> u32 {
        let mut windows = 0;
        let mut page = pages.start;
        while page < pages.end && windows < STEP_WINDOWS {
            let space = &self.members.at(slot).space;
            let target = |page: u32| {
                let old = space.refers(page).filter(|_| space.attached(page))?;
                self.compaction.moves.get(&old).copied().filter(|&new| self.store.is_live(new))
            };
            let Some(new) = target(page) else {
                page += 1;
                continue;
            };
            let longest = WINDOW_PAGES.min(pages.end - page);
            let count =
                1 + (1..longest).take_while(|&next| target(page + next) == Some(new + next)).count() as u32;
            windows += 1;
            page += self.move_run(slot, page, new, count);
        }
        self.publish_mappings();
        self.store.reclaim(&*self.calls);
        page
    }

    /// Returns how many pages are dealt with: at least one.
    fn move_run(&mut self, slot: usize, first: u32, new: Frame, count: u32) -> u32 {
        let Self { members, store, calls, stable, counters, share, .. } = self;
        let member = members.at_mut(slot);
        let added = member.space.mappings_added(first, count, Source::Frames(new));
        if added > 0 && added + 2 > share.budget().room() {
            return count;
        }
        let mut dead = Vec::new();
        match member.space.change_frames(first, new, count, store, &**calls, &mut dead) {
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

    fn end_moves(&mut self, now: Instant) {
        for (_, new) in self.compaction.moves.drain() {
            if self.store.is_live(new) && self.store.sharers(new) == 0 && !self.store.kept(new) {
                self.stable.remove(new, &self.store);
                self.store.abandon(new);
            }
        }
        self.store.reclaim(&*self.calls);
        self.counters.compactions += 1;
        if self.store.places() < self.compaction.places_before / 10 * 9 {
            self.compaction.due = now;
        }
    }
}
