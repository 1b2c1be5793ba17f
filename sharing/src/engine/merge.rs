//! What to merge a page with: its frame or its twin, and then its neighbours with theirs.
//!
//! A page of zeros is given back. A page whose digest is that of a frame is compared with the frame;
//! otherwise it is looked for among the pages of all VMs that are not shared yet. Where one page
//! matches, its neighbours ahead and behind are compared at once, before any digest: runs are
//! protected, compared and remapped as one.
//!
//! Digests and comparisons here are hints. [`Space`](crate::memory::space::Space) compares under protection.

#![expect(unsafe_code, reason = "looks at guest pages by address")]

use std::ops::Range;

use crate::engine::Engine;
use crate::engine::members::{Flags, Member, Mode};
use crate::index::Wanted;
use crate::memory::calls::Source;
use crate::memory::content::{self, Page, Snapshot};
use crate::memory::space::{SpaceError, WINDOW_PAGES};
use crate::memory::store::{Frame, Hold};
use crate::numbers::{Digest, Slot};
use crate::policy::pressure::value;

/// Neighbours that are compared as a whole before it is taken for granted that a run goes on.
const CERTAIN: u32 = 2;
/// Failed comparisons after which a run is given up: its pages are changing.
const MISSES: u32 = 8;

impl Engine {
    /// Looks at the private pages of a run that are to be scanned. Returns up to which there was time.
    pub(crate) fn scan_run(&mut self, slot: Slot, run: Range<u32>) -> u32 {
        let mut page = run.start;
        while page < run.end && !self.members.at(slot).space.lost() {
            let looked = self.scan_page(slot, page, run.end).max(1);
            page += looked;
            if self.time_to_end(looked) {
                return page.min(run.end);
            }
        }
        run.end
    }

    /// Whether the step is to end after a look that dealt with so many pages. A merge takes as long as many looks
    /// at pages that match nothing, after only some of which the time is asked for.
    pub(crate) fn time_to_end(&mut self, looked: u32) -> bool {
        self.looks = self.looks.wrapping_add(1);
        let events = self.counters.events();
        let merged = std::mem::replace(&mut self.events_seen, events) != events;
        (looked > 1 || merged || self.looks.is_multiple_of(16)) && self.spent()
    }

    /// Looks at a private page, and at its neighbours up to `end` where it matches. Returns how
    /// many pages from it on are dealt with.
    pub(crate) fn scan_page(&mut self, slot: Slot, page: u32, end: u32) -> u32 {
        let member = self.members.at(slot);
        if !member.flags[page as usize].contains(Flags::PRIVATE) {
            return 1;
        }
        if member.claim(page).free() {
            return 1;
        }
        self.counters.scanned += 1;
        // SAFETY: a member's RAM is mapped.
        let content = unsafe { Snapshot::take(member.space.page(page)) };
        if member.space.lost() {
            return 1;
        }
        if member.is_huge(page) {
            self.take_census(slot, page, &content);
            return 1;
        }
        if content.is_zero() {
            return self.give_back(slot, page, end);
        }
        if self.members.at(slot).mode == Mode::Zero || !self.members.at(slot).admits(page) {
            return 1;
        }
        let digest = self.digester.digest(&content);
        self.counters.digests += 1;
        let known = member.known_digest(page);
        let same = known == Some(digest);
        if same && member.flags[page as usize].contains(Flags::UNIQUE) {
            self.members.at_mut(slot).set_volatile(page, false);
            return 1;
        }
        if let Some(frame) = self.frame_like(&content, digest) {
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
        if let Some(twin) = self.page_like(slot, page, &content, digest) {
            return self.merge_unstable(slot, page, end, twin);
        }
        self.huge_twin(slot, page, &content, digest);
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
        let end = end.min(page + WINDOW_PAGES);
        let count = 1
            + (page + 1..end)
                .take_while(|&next| {
                    space.refers(next).is_none() == anonymous
                        && !member.is_huge(next)
                        // SAFETY: a member's RAM is mapped.
                        && unsafe { content::zero(space.page(next)) }
                })
                .count() as u32;
        if !self.affordable(slot, page, count, Source::Zeros, 0) {
            return count;
        }
        for page in page..page + count {
            self.forget_page(slot, page);
        }
        let outcome = self.members.at_mut(slot).space.discard_zeros(page, count, &*self.calls);
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
        let longest = self.longest_run();
        let Self { store, members, counters, .. } = self;
        let member = members.at(slot);
        let mut alike = |distance: u32, page: u32, frame: Frame| {
            member.mergeable(page) && store.is_filled(frame) && {
                counters.effort.comparisons += 1;
                // SAFETY: a member's RAM is mapped, and the frame was just seen to be live.
                unsafe { neighbours_alike(distance, member.space.page(page), store.content(frame)) }
            }
        };
        let forward = 1
            + (1..(end - page).min(longest))
                .take_while(|&ahead| {
                    frame.checked_add(ahead).is_some_and(|frame| alike(ahead, page + ahead, frame))
                })
                .count() as u32;
        let backward = (1..=page.min(frame.number()).min(longest - forward))
            .take_while(|&behind| alike(behind, page - behind, frame - behind))
            .count() as u32;
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
        let longest = self.longest_run();
        let Self { members, counters, .. } = self;
        let member = members.at(slot);
        let other = members.at(twin_slot);
        debug_assert!([member, other].iter().all(|member| member.mode == Mode::Full));
        let mut alike = |distance: u32, page: u32, twin: u32| {
            member.mergeable(page) && other.mergeable(twin) && !other.space.lost() && {
                counters.effort.comparisons += 1;
                let twin = other.space.page(twin);
                // SAFETY: members' RAM is mapped.
                unsafe { neighbours_alike(distance, member.space.page(page), twin) && !content::zero(twin) }
            }
        };
        // Within one VM the two runs must not overlap.
        let apart = if slot == twin_slot { page.abs_diff(twin_page) } else { longest };
        let longest = apart.min(longest);
        let forward = 1
            + (1..longest.min(end - page).min(other.space.pages() - twin_page))
                .take_while(|&ahead| alike(ahead, page + ahead, twin_page + ahead))
                .count() as u32;
        let backward = (1..=page.min(twin_page).min(longest - forward))
            .take_while(|&behind| alike(behind, page - behind, twin_page - behind))
            .count() as u32;
        let (first, twin_first, count) = (page - backward, twin_page - backward, forward + backward);

        let follows = |member: &Member, first: u32| {
            let before = first.checked_sub(1)?;
            member.space.attached(before).then(|| member.space.refers(before))?.map(|frame| frame + 1)
        };
        let preferred = follows(other, twin_first).or_else(|| follows(member, first));
        let Some(hold) = self.store.allocate(count, preferred) else {
            self.counters.refusals += 1;
            return forward;
        };
        let frame = hold.first();
        let source = Source::Frames(frame);
        let twin_cost = self.members.at(twin_slot).space.mappings_added(twin_first, count, source);
        let mut written = self.affordable(slot, first, count, source, twin_cost);
        if written && self.store.write(&hold, self.members.at(twin_slot).space.page(twin_first)).is_err() {
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

    /// Gives up a hold on frames. Those that have no other owner die.
    pub(crate) fn release_hold(&mut self, hold: Hold) {
        for frame in self.store.release(hold) {
            self.stable.remove(frame, &mut self.store);
        }
    }

    /// Merges a run, leaving out pages that differ under protection. Returns how many were merged.
    fn merge_run(&mut self, slot: Slot, first: u32, frame: Frame, count: u32) -> u32 {
        let merged = self.map_frames(slot, first, frame, count);
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
        while done < count && misses < MISSES {
            let member = self.members.at_mut(slot);
            let outcome =
                member.space.merge(first + done, frame + done, count - done, &mut self.store, &*self.calls);
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
    fn affordable(&mut self, slot: Slot, first: u32, count: u32, source: Source, more: i64) -> bool {
        let added = more + self.members.at(slot).space.mappings_added(first, count, source);
        if added <= 0 {
            return true;
        }
        self.report_mappings();
        let budget = self.share.budget();
        let value = value(count, added);
        let shortest = budget.shortest_run();
        let least = if shortest == 1 { 0 } else { shortest };
        // A window that ends early leaves two more edges.
        let affordable =
            value >= least.max(self.pressure.floor()) && added + 2 * i64::from(MISSES) <= budget.room();
        if !affordable {
            self.counters.denied += 1;
            self.pressure.denied(value, budget.room());
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

    /// Takes a page out of the index of unique pages if it was entered there, under this digest.
    fn forget(&mut self, slot: Slot, page: u32, digest: Digest) {
        let member = self.members.at_mut(slot);
        if member.clear_unique(page) {
            let index = if member.is_huge(page) { &mut self.huge_pages } else { &mut self.unique };
            index.remove(member.global_page(page), digest);
        }
    }
}

/// Whether the neighbours at this distance of two pages that match are identical as well. In a run that has
/// gone on for a while a glance is enough: all of it is compared under protection.
///
/// # Safety
/// As [`content::equal`].
unsafe fn neighbours_alike(distance: u32, one: *const u8, other: *const u8) -> bool {
    // SAFETY: promised by the caller.
    unsafe {
        if distance <= CERTAIN { content::equal(one, other) } else { content::probably_equal(one, other) }
    }
}
