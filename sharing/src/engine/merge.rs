//! What to merge a page with: its frame or its twin, and then its neighbours with theirs.
//!
//! A page of zeros is freed. A page whose digest is that of a frame is compared with the frame;
//! otherwise it is looked for among the pages of all VMs that are not shared yet. Where one page
//! matches, its neighbours ahead and behind are compared at once, before any digest: runs are
//! protected, compared and remapped as one.
//!
//! Digests and comparisons here are hints. [`Space`](crate::frames::space::Space) compares under protection.

#![expect(unsafe_code, reason = "reads frames by address")]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::blocks::block_index::BlockKey;
use crate::engine::Engine;
use crate::engine::far::follows;
use crate::engine::members::{Flags, Mode};
use crate::engine::neighbours::{OnFrame, Twins, Way, run_length};
use crate::frames::space::{SpaceError, WINDOW_PAGES};
use crate::frames::store::{Frame, Hold};
use crate::index::Wanted;
use crate::memory::content::Page;
use crate::memory::guest::{Harvest, Seen, Source};
use crate::numbers::{Digest, Slot};
use crate::policy::pressure::value;

/// Pages that are read at once where a question takes as long as some pages, even if each of them may match.
const FAR_BATCH: u32 = 16;

/// Failed comparisons after which a run is given up: its pages are changing.
const MISSES: u32 = 8;

impl Engine {
    /// Scans the private pages of a run, or those of them that are ready. Returns up to which there was time.
    pub(crate) fn scan_run(&mut self, slot: Slot, run: Range<u32>, ready: bool) -> u32 {
        let mut harvest = std::mem::take(&mut self.harvest);
        let end = self.scan_batches(slot, run, ready, &mut harvest);
        self.harvest = harvest;
        end
    }

    fn scan_batches(&mut self, slot: Slot, run: Range<u32>, ready: bool, harvest: &mut Harvest) -> u32 {
        // A page that matches takes its neighbours with it, which need no digests. So batches grow while nothing
        // matches.
        let memory = Arc::clone(self.members.at(slot).space.memory());
        let batch = memory.batch();
        let least = if memory.is_far() { FAR_BATCH.min(batch) } else { 1 };
        let mut size = least;
        let mut page = run.start;
        while page < run.end && !memory.lost() {
            let next = self.choose(slot, page..run.end, ready, size, harvest);
            memory.harvest(harvest);
            let merges = self.counters.merges + self.counters.zeroed;
            for index in 0..harvest.len() {
                let (at, seen, content) = harvest.get(index);
                if at < page {
                    continue;
                }
                let looked = self.scan_page(slot, at, run.end, seen, content).max(1);
                page = at + looked;
                if self.time_to_end(looked) {
                    return page.min(run.end);
                }
            }
            page = page.max(next);
            let none_matched = self.counters.merges + self.counters.zeroed == merges;
            size = if none_matched { (2 * size).min(batch) } else { least };
        }
        run.end
    }

    /// Chooses the next pages of a range to be scanned, so many at most. Returns behind which page the next batch
    /// begins.
    fn choose(&self, slot: Slot, pages: Range<u32>, ready: bool, most: u32, harvest: &mut Harvest) -> u32 {
        let member = self.members.at(slot);
        let next = |page: u32| match &member.follower {
            Some(follower) if ready => follower.next_ready(page),
            _ => Some(page),
        };
        harvest.clear();
        let mut from = pages.start;
        while let Some(page) = (from < pages.end).then(|| next(from)).flatten()
            && page < pages.end
        {
            from = page + 1;
            if !member.is_to_be_scanned(page) {
                continue;
            }
            let has_digest = member.is_huge(page) || member.mode != Mode::Zero && member.admits(page);
            harvest.want(page, has_digest);
            if harvest.len() >= most as usize {
                return from;
            }
        }
        pages.end
    }

    /// Whether the step is to end after a look that dealt with so many pages. A merge takes as long as many looks
    /// at pages that match nothing, after only some of which the time is asked for.
    pub(crate) fn time_to_end(&mut self, looked: u32) -> bool {
        self.looks = self.looks.wrapping_add(1);
        let events = self.counters.events();
        let merged = std::mem::replace(&mut self.events_seen, events) != events;
        (looked > 1 || merged || self.looks.is_multiple_of(16)) && self.spent()
    }

    /// Scans a private page that was read a moment ago, and its neighbours up to `end` where it matches. Returns how
    /// many pages from it on are dealt with.
    fn scan_page(&mut self, slot: Slot, page: u32, end: u32, seen: Seen, content: &Page) -> u32 {
        let member = self.members.at(slot);
        // It may have been merged with another of its batch.
        if !member.is_to_be_scanned(page) || member.space.lost() {
            return 1;
        }
        self.counters.scanned += 1;
        if member.is_huge(page) {
            self.take_census(slot, page, seen, content);
            return 1;
        }
        let digest = match seen {
            Seen::Zero => return self.give_back(slot, page, end),
            Seen::Content => return 1,
            Seen::Digest(digest) => digest,
        };
        self.counters.digests += 1;
        let known = member.known_digest(page);
        let same = known == Some(digest);
        if same && member.flags[page as usize].contains(Flags::UNIQUE) {
            self.members.at_mut(slot).set_volatile(page, false);
            return 1;
        }
        if let Some(frame) = self.frame_like(content, digest) {
            return self.merge_stable(slot, page, end, frame);
        }
        self.forget_page(slot, page);
        let changed = known.is_some_and(|known| known != digest);
        self.counters.changes += u64::from(changed);
        let member = self.members.at_mut(slot);
        member.set_volatile(page, changed);
        member.space.set_note(page, digest.number());
        member.flags[page as usize].insert(Flags::DIGESTED);
        if member.follower.is_none() && self.settle && !same {
            // A page that is new counts as changed: it is scanned again.
            self.counters.changes += u64::from(!changed);
            return 1;
        }
        if let Some(twin) = self.page_like(slot, page, content, digest) {
            return self.merge_unstable(slot, page, end, twin);
        }
        self.huge_twin(slot, page, content, digest);
        self.enter_unique(slot, page);
        1
    }

    /// Enters a page that was scanned into the index of unique pages. Where that has enough pages that had
    /// its content, it is scanned again in its time.
    pub(crate) fn enter_unique(&mut self, slot: Slot, page: u32) {
        if self.unique.insert(self.members.at(slot).global_page(page), &self.members) {
            self.members.at_mut(slot).set_unique(page);
        }
    }

    /// Returns a frame with this content, which has this digest.
    pub(crate) fn frame_like(&mut self, content: &Page, digest: Digest) -> Option<Frame> {
        let Self { stable, store, counters, .. } = self;
        stable.find(Wanted { page: content, digest }, store, &mut counters.effort)
    }

    /// Returns another page than this one with this content, which has this digest. It belongs to no huge page.
    pub(crate) fn page_like(
        &mut self,
        slot: Slot,
        page: u32,
        content: &Page,
        digest: Digest,
    ) -> Option<(Slot, u32)> {
        let Self { unique, members, counters, .. } = self;
        let itself = members.at(slot).global_page(page);
        let wanted = Wanted { page: content, digest };
        unique.find(wanted, itself, members, &mut counters.effort).map(|global| members.locate(global))
    }

    /// Gives pages of zeros back, from `page` up to `end` as far as they go.
    pub(crate) fn give_back(&mut self, slot: Slot, page: u32, end: u32) -> u32 {
        let member = self.members.at(slot);
        let space = &member.space;
        let anonymous = space.refers(page).is_none();
        let count = 1 + run_length(WINDOW_PAGES.min(end - page) - 1, |distance, count| {
            let next = page + distance;
            let is_like = |&next: &u32| space.refers(next).is_none() == anonymous && !member.is_huge(next);
            let count = (next..next + count).take_while(is_like).count() as u32;
            space.memory().zeros(next..next + count)
        });
        if !self.affordable(slot, page, count, Source::Zeros, 0) {
            return count;
        }
        for page in page..page + count {
            self.forget_page(slot, page);
        }
        let outcome = self.members.at_mut(slot).space.discard_zeros(page, count);
        let given = self.note_outcome(slot, outcome);
        self.members.at_mut(slot).became_zero(page..page + given);
        self.counters.zeroed += u64::from(given);
        given
    }

    /// How long the runs are that lookahead may find.
    fn longest_run(&self) -> u32 {
        if self.lookahead { WINDOW_PAGES } else { 1 }
    }

    /// Maps a frame over a page, and its neighbours over the page's neighbours.
    pub(crate) fn merge_stable(&mut self, slot: Slot, page: u32, end: u32, frame: Frame) -> u32 {
        if self.is_far([slot; 2]) {
            return self.merge_far_stable(slot, page, end, frame);
        }
        let longest = self.longest_run();
        let Self { store, members, counters, .. } = self;
        let pair = OnFrame { member: members.at(slot), page, store, frame };
        let effort = &mut counters.effort;
        let forward = 1 + pair.matching(Way::Ahead, longest.min(end - page) - 1, effort);
        let backward = pair.matching(Way::Behind, page.min(longest - forward), effort);
        let (first, frame, count) = (page - backward, frame - backward, forward + backward);
        if !self.affordable(slot, first, count, Source::Frames(frame), 0) {
            return forward;
        }
        let merged = self.merge_run(slot, first, frame, count);
        self.counters.merges_stable += u64::from(merged.min(1));
        self.counters.merges_lookahead += u64::from(merged.saturating_sub(1));
        forward
    }

    /// Makes frames of a page and its twin that are not shared yet, and of their neighbours.
    pub(crate) fn merge_unstable(&mut self, slot: Slot, page: u32, end: u32, twin: (Slot, u32)) -> u32 {
        let (twin_slot, twin_page) = twin;
        if self.is_far([slot, twin_slot]) {
            return self.merge_far_unstable(slot, page, end, twin);
        }
        let longest = self.longest_run();
        let Self { members, counters, .. } = self;
        let member = members.at(slot);
        let other = members.at(twin_slot);
        debug_assert!([member, other].iter().all(|member| member.mode == Mode::Full));
        // Within one VM the two runs must not overlap.
        let apart = if slot == twin_slot { page.abs_diff(twin_page) } else { longest };
        let longest = apart.min(longest);
        let pair = Twins { member, page, other, twin: twin_page };
        let effort = &mut counters.effort;
        let ahead = longest.min(end - page).min(other.space.pages() - twin_page) - 1;
        let forward = 1 + pair.matching(Way::Ahead, ahead, effort);
        let backward = pair.matching(Way::Behind, page.min(twin_page).min(longest - forward), effort);
        let (first, twin_first, count) = (page - backward, twin_page - backward, forward + backward);

        let preferred = follows(other, twin_first).or_else(|| follows(member, first));
        let Some(hold) = self.store.allocate(count, preferred) else {
            self.counters.refusals += 1;
            return forward;
        };
        let frame = hold.first();
        let source = Source::Frames(frame);
        let twin_cost = self.members.at(twin_slot).space.mappings_added(twin_first, count, source);
        let mut written = self.affordable(slot, first, count, source, twin_cost);
        if written && self.write_frames(&hold, twin_slot, twin_first).is_err() {
            self.counters.refusals += 1;
            written = false;
        }
        if written {
            self.store.fill(&hold);
            let merged = self.merge_run(twin_slot, twin_first, frame, count)
                + self.merge_run(slot, first, frame, count);
            self.counters.merges_unstable += u64::from(merged.min(2));
            self.counters.merges_lookahead += u64::from(merged.saturating_sub(2));
        }
        for frame in hold.frames() {
            if self.store.sharers(frame) > 0 {
                self.index_frame(frame);
            }
        }
        self.release_hold(hold);
        self.index_copies(frame, count, [(slot, first), (twin_slot, twin_first)]);
        forward
    }

    /// Enters a fresh frame into the index of frames.
    pub(crate) fn index_frame(&mut self, frame: Frame) {
        // SAFETY: the frame is live, and its content no longer changes.
        let page = unsafe { &*self.store.content(frame).cast::<Page>() };
        let digest = self.digester.digest(page);
        self.counters.digests += 1;
        self.store.set_digest(frame, digest);
        self.stable.insert(frame, &mut self.store);
    }

    /// Writes the contents of consecutive pages to frames that are not filled yet. They may change meanwhile.
    ///
    /// # Errors
    /// See [`FrameStore::write`](crate::frames::store::FrameStore::write).
    pub(crate) fn write_frames(&self, hold: &Hold, slot: Slot, first: u32) -> io::Result<()> {
        let memory = self.members.at(slot).space.memory();
        let mut written = Ok(());
        memory.contents(first..first + hold.count(), &mut |bytes| {
            written = self.store.write(hold, bytes.page(0));
        });
        written
    }

    /// Gives up a hold on frames. Those that have no other owner die.
    pub(crate) fn release_hold(&mut self, hold: Hold) {
        for frame in self.store.release(hold) {
            self.stable.remove(frame, &mut self.store);
        }
    }

    /// Merges a run, leaving out pages that differ under protection. Returns how many were merged.
    pub(crate) fn merge_run(&mut self, slot: Slot, first: u32, frame: Frame, count: u32) -> u32 {
        self.merge_until(slot, first, frame, count, MISSES)
    }

    /// Merges a run up to so many pages that differ under protection. Returns how many were merged.
    pub(crate) fn merge_until(
        &mut self,
        slot: Slot,
        first: u32,
        frame: Frame,
        count: u32,
        misses: u32,
    ) -> u32 {
        let merged = self.map_until(slot, first, frame, count, misses);
        self.counters.merges += u64::from(merged);
        let space = &mut self.members.at_mut(slot).space;
        if space.backing().census().is_some() {
            for page in (first..first + count).filter(|&page| space.attached(page)).collect::<Vec<_>>() {
                if let Some(census) = space.census_mut() {
                    census.merged(page);
                }
            }
        }
        merged
    }

    /// Maps frames over a run, leaving out pages that differ under protection. Returns how many are mapped.
    pub(crate) fn map_frames(&mut self, slot: Slot, first: u32, frame: Frame, count: u32) -> u32 {
        self.map_until(slot, first, frame, count, MISSES)
    }

    fn map_until(&mut self, slot: Slot, first: u32, frame: Frame, count: u32, most_misses: u32) -> u32 {
        // Digests are kept with pages as long as these are on no frame.
        debug_assert!(count <= WINDOW_PAGES);
        let mut digests = [Digest::default(); WINDOW_PAGES as usize];
        let member = self.members.at(slot);
        for (digest, page) in digests.iter_mut().zip(first..first + count) {
            *digest = member.digest(page);
        }
        let mut done = 0;
        let mut total = 0;
        let mut misses = 0;
        while done < count && misses < most_misses {
            let member = self.members.at_mut(slot);
            let outcome = member.space.merge(first + done, frame + done, count - done, &mut self.store);
            let failed = outcome.is_err();
            let merged = self.note_outcome(slot, outcome);
            for page in first + done..first + done + merged {
                self.forget(slot, page, digests[(page - first) as usize]);
                self.members.at_mut(slot).became_merged(page);
            }
            total += merged;
            done += merged + 1;
            misses += 1;
            if failed {
                break;
            }
        }
        total
    }

    /// Counts a refusal, tells the VM of a loss.
    pub(crate) fn note_outcome(&mut self, slot: Slot, outcome: Result<u32, SpaceError>) -> u32 {
        match outcome {
            Ok(pages) => pages,
            Err(error) => {
                self.counters.refusals += 1;
                if matches!(error, SpaceError::Lost { .. }) {
                    self.members.at(slot).tell_lost(&error);
                }
                0
            }
        }
    }

    /// Whether a run is worth its mappings, and `more` of them, and the process can bear them.
    pub(crate) fn affordable(
        &mut self,
        slot: Slot,
        first: u32,
        count: u32,
        source: Source,
        more: i64,
    ) -> bool {
        let added = more + self.members.at(slot).space.mappings_added(first, count, source);
        if added <= 0 {
            return true;
        }
        self.report_mappings();
        let budget = self.members.at(slot).budget();
        let value = value(count, added);
        let shortest = budget.shortest_run();
        let least = if shortest == 1 { 0 } else { shortest };
        // A window that ends early leaves two more edges.
        let affordable =
            value >= least.max(self.pressure.floor()) && added + 2 * i64::from(MISSES) <= budget.room();
        if !affordable {
            self.counters.denied += 1;
            // What is taken apart for better runs is taken apart in this process.
            if !self.members.at(slot).space.memory().is_far() {
                self.pressure.denied(value, self.budgets.own().room());
            }
            let member = self.members.at_mut(slot);
            (first..first + count).for_each(|page| member.denied(page));
        }
        affordable
    }

    /// Takes a page that is on no frame out of the index of unique pages.
    pub(crate) fn forget_page(&mut self, slot: Slot, page: u32) {
        let member = self.members.at(slot);
        if member.flags[page as usize].contains(Flags::UNIQUE) {
            self.forget(slot, page, member.digest(page));
        }
    }

    /// Takes pages that are about to hold something else out of the index of unique pages. Returns for each the disk
    /// block whose frame it is on.
    pub(crate) fn forget_run(&mut self, slot: Slot, first: u32, count: u32) -> Vec<Option<BlockKey>> {
        let mut forget = |page: u32| {
            let space = &self.members.at(slot).space;
            if !space.attached(page) {
                self.forget_page(slot, page);
                return None;
            }
            let named = self.cache.index.of(space.refers(page)?);
            named.map(|named| named.key)
        };
        (first..first + count).map(&mut forget).collect()
    }

    /// Takes a page out of the index of unique pages if it was entered there, under this digest.
    fn forget(&mut self, slot: Slot, page: u32, digest: Digest) {
        let member = self.members.at_mut(slot);
        if member.clear_unique(page) {
            let index = if member.is_huge(page) { &mut self.huge_pages } else { &mut self.unique };
            index.remove(member.global_page(page), digest);
        }
    }
}
