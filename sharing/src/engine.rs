//! What to merge: passes over the private pages of all VMs.
//!
//! A pass goes over each VM's RAM in chunks. In each chunk it asks the page map which pages are
//! private: pages that left their frames give them up, and every private page is looked at. A page
//! of zeros is given back. A page whose digest is that of a frame is compared with the frame; one
//! whose digest has not changed since the last pass is looked for among the pages of all VMs that
//! are not shared yet. Where one page matches, its neighbours are compared at once, before any
//! digest: runs are protected, compared and remapped as one.
//!
//! Digests and comparisons here are hints. [`Space`] compares under protection.

#![expect(unsafe_code, reason = "looks at guest pages by address")]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use hashbrown::HashTable;

use crate::budget::Budget;
use crate::calls::{MemoryCalls, Source};
use crate::content::{self, Digester, Page};
use crate::members::{Flags, Member, Members, Place};
use crate::pagemap::Pagemap;
use crate::ram::{PAGE_SIZE, Ram};
use crate::space::{LostHandler, Space, SpaceError, WINDOW_PAGES};
use crate::statistics::{EngineStatistics, VmStatistics};
use crate::store::{Frame, FrameStore};

/// Pages that one step goes over: about a millisecond of work.
const CHUNK_PAGES: u32 = 2048;
/// Failed comparisons after which a run is given up: its pages are changing.
const MISSES: u32 = 8;

/// How the engine works.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Share of one core that the sharing thread may use, in percent.
    pub cpu_percent: f64,
    /// Look for a page among unshared ones only when it has not changed since the last pass.
    pub settle: bool,
    /// Pause between passes while they find something, in milliseconds.
    pub shortest_pause_ms: u64,
    /// Pause between passes when nothing changes any more, in milliseconds.
    pub longest_pause_ms: u64,
    /// Limit on mappings, where it is to be lower than the kernel's.
    pub mappings_limit: Option<u64>,
    /// Frames that the store can hold; twice the host's memory where not given.
    pub frames: Option<u32>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cpu_percent: 10.0,
            settle: true,
            shortest_pause_ms: 20,
            longest_pause_ms: 5000,
            mappings_limit: None,
            frames: None,
        }
    }
}

/// What a step was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A part of a pass.
    Partial,
    /// The end of a pass in which this many pages were merged, given back, or had changed.
    PassEnded {
        /// Pages.
        events: u64,
    },
}

/// Counters since the start.
#[derive(Debug, Default)]
struct Counters {
    full_scans: u64,
    scanned: u64,
    merges: u64,
    breaks: u64,
    denied: u64,
    refusals: u64,
    changes: u64,
    zeroed: u64,
}

impl Counters {
    fn events(&self) -> u64 {
        self.merges + self.changes + self.zeroed
    }
}

/// The engine: all VMs that share, their frames, and where the pass stands.
pub struct Engine {
    pub(crate) calls: Box<dyn MemoryCalls>,
    pub(crate) pagemap: Pagemap,
    pub(crate) store: FrameStore,
    pub(crate) members: Members,
    pub(crate) budget: Budget,
    digester: Digester,
    settle: bool,
    /// Frames by digest.
    stable: HashTable<Frame>,
    /// Pages that were found unique, by digest.
    unique: HashTable<Place>,
    counters: Counters,
    /// The slot and page where the next step starts.
    cursor: (usize, u32),
    events_before_pass: u64,
    membership_changed: bool,
    scratch: Box<Page>,
    runs: Vec<Range<u32>>,
}

impl Engine {
    /// An engine without VMs.
    pub fn new(settings: &Settings, store: FrameStore, calls: Box<dyn MemoryCalls>) -> io::Result<Self> {
        Ok(Self {
            calls,
            pagemap: Pagemap::open()?,
            store,
            members: Members::default(),
            budget: Budget::new(settings.mappings_limit),
            digester: Digester::new()?,
            settle: settings.settle,
            stable: HashTable::new(),
            unique: HashTable::new(),
            counters: Counters::default(),
            cursor: (0, 0),
            events_before_pass: 0,
            membership_changed: true,
            scratch: Box::new([0; PAGE_SIZE]),
            runs: Vec::new(),
        })
    }

    /// Takes a VM's RAM in. `on_lost` is called when a part of it could not be kept.
    ///
    /// # Errors
    /// Where the RAM cannot be registered with userfaultfd, or there are too many pages in all.
    pub fn add(&mut self, ram: Arc<Ram>, on_lost: LostHandler) -> io::Result<usize> {
        let space = Space::new(ram, &*self.calls)?;
        self.membership_changed = true;
        self.members.add(space, on_lost)
    }

    /// Lets a VM's RAM go, which no longer runs: its pages become zeros and its frames are given
    /// up.
    ///
    /// # Errors
    /// What the kernel said; the RAM is still a member then.
    pub fn remove(&mut self, slot: usize) -> io::Result<()> {
        let Self { members, store, stable, unique, calls, .. } = self;
        let Some(member) = members.get_mut(slot) else { return Ok(()) };
        for frame in member.space.clear(store, &**calls)? {
            forget_frame(stable, frame, store.digest(frame));
        }
        for page in 0..member.space.pages() {
            if member.flags[page as usize].contains(Flags::UNIQUE) {
                forget_unique(unique, member.place(page), member.digests[page as usize]);
            }
        }
        store.reclaim(&**calls);
        members.remove(slot);
        let (members, store) = (&self.members, &self.store);
        self.unique.shrink_to_fit(|&place| hash(members.digest(place)));
        self.stable.shrink_to_fit(|&frame| hash(store.digest(frame)));
        self.membership_changed = true;
        Ok(())
    }

    /// Goes over the next chunk of pages.
    pub fn step(&mut self) -> Step {
        let guest = self.members.mappings();
        let force = std::mem::take(&mut self.membership_changed);
        // A count that failed leaves the last one in force.
        let _ = self.budget.recount(guest, force);
        let (slot, start) = self.cursor;
        let Some(slot) = self.members.next_from(slot) else {
            return self.end_pass();
        };
        let start = if slot == self.cursor.0 { start } else { 0 };
        let pages = self.members.at(slot).space.pages();
        let end = pages.min(start.saturating_add(CHUNK_PAGES));
        self.cursor = if end == pages { (slot + 1, 0) } else { (slot, end) };
        if !self.members.at(slot).space.lost() && start < end {
            self.go_over(slot, start..end);
        }
        self.store.reclaim(&*self.calls);
        Step::Partial
    }

    fn end_pass(&mut self) -> Step {
        self.cursor = (0, 0);
        self.counters.full_scans += 1;
        let events = self.counters.events() - self.events_before_pass;
        self.events_before_pass = self.counters.events();
        Step::PassEnded { events }
    }

    fn go_over(&mut self, slot: usize, chunk: Range<u32>) {
        let mut runs = std::mem::take(&mut self.runs);
        runs.clear();
        let member = self.members.at_mut(slot);
        match member.space.private(chunk, &self.pagemap, &mut runs) {
            Ok(()) => {
                for run in &runs {
                    self.release(slot, run.clone());
                }
                for run in &runs {
                    self.look_at_run(slot, run.clone());
                }
            }
            Err(_) => self.counters.refusals += 1,
        }
        self.runs = runs;
    }

    /// Private pages have left their frames, and are zero pages no longer.
    fn release(&mut self, slot: usize, run: Range<u32>) {
        let Self { members, store, stable, counters, .. } = self;
        let member = members.at_mut(slot);
        for page in run {
            if member.space.attached(page) {
                counters.breaks += 1;
                if let Some(frame) = member.space.detach(page, store) {
                    forget_frame(stable, frame, store.digest(frame));
                }
            }
            member.became_private(page);
        }
    }

    fn look_at_run(&mut self, slot: usize, run: Range<u32>) {
        let mut page = run.start;
        while page < run.end && !self.members.at(slot).space.lost() {
            page += self.look_at(slot, page, run.end).max(1);
        }
    }

    /// Looks at a private page, and at its neighbours up to `end` where it matches. Returns how
    /// many pages from it on are dealt with.
    fn look_at(&mut self, slot: usize, page: u32, end: u32) -> u32 {
        let member = self.members.at(slot);
        if !member.flags[page as usize].contains(Flags::PRIVATE) {
            return 1;
        }
        self.counters.scanned += 1;
        // SAFETY: a member's RAM is mapped.
        unsafe { content::copy(member.space.page(page), &mut self.scratch) };
        // SAFETY: the scratch page is ours.
        if unsafe { content::zero(self.scratch.as_ptr()) } {
            return self.give_back(slot, page, end);
        }
        let digest = self.digester.digest(&self.scratch);
        let known = member.known_digest(page);
        let same = known == Some(digest);
        if same && member.flags[page as usize].contains(Flags::UNIQUE) {
            self.members.at_mut(slot).set_volatile(page, false);
            return 1;
        }
        if let Some(frame) = self.frame_like_scratch(digest) {
            return self.merge_into(slot, page, end, frame);
        }
        self.forget_page(slot, page);
        let changed = known.is_some_and(|known| known != digest);
        self.counters.changes += u64::from(changed);
        let member = self.members.at_mut(slot);
        member.set_volatile(page, changed);
        member.digests[page as usize] = digest;
        member.flags[page as usize].insert(Flags::DIGESTED);
        if self.settle && !same {
            // New to us is as good as changed: it is looked at again.
            self.counters.changes += u64::from(!changed);
            return 1;
        }
        if let Some(twin) = self.page_like_scratch(member_place(&self.members, slot, page), digest) {
            return self.publish(slot, page, end, twin);
        }
        let place = member_place(&self.members, slot, page);
        let members = &self.members;
        self.unique.insert_unique(hash(digest), place, |&other| hash(members.digest(other)));
        self.members.at_mut(slot).set_unique(page);
        1
    }

    fn frame_like_scratch(&self, digest: u32) -> Option<Frame> {
        let like = |&frame: &Frame| {
            // SAFETY: frames of the index are live, and the scratch page is ours.
            self.store.digest(frame) == digest
                && unsafe { content::equal(self.store.content(frame), self.scratch.as_ptr()) }
        };
        self.stable.find(hash(digest), like).copied()
    }

    fn page_like_scratch(&self, place: Place, digest: u32) -> Option<(usize, u32)> {
        let like = |&other: &Place| {
            other != place && self.members.digest(other) == digest && {
                let (slot, page) = self.members.locate(other);
                // SAFETY: a member's RAM is mapped, and the scratch page is ours.
                unsafe { content::equal(self.members.at(slot).space.page(page), self.scratch.as_ptr()) }
            }
        };
        self.unique.find(hash(digest), like).map(|&twin| self.members.locate(twin))
    }

    /// Gives pages of zeros back, from `page` up to `end` as far as they go.
    fn give_back(&mut self, slot: usize, page: u32, end: u32) -> u32 {
        let space = &self.members.at(slot).space;
        let anonymous = space.refers(page).is_none();
        let end = end.min(page + WINDOW_PAGES);
        let count = 1
            + (page + 1..end)
                .take_while(|&next| {
                    // SAFETY: a member's RAM is mapped.
                    space.refers(next).is_none() == anonymous && unsafe { content::zero(space.page(next)) }
                })
                .count() as u32;
        if !self.affordable(slot, page, count, Source::Zeros, 0) {
            return count;
        }
        for page in page..page + count {
            self.forget_page(slot, page);
        }
        let outcome = self.members.at_mut(slot).space.discard_zeros(page, count, &*self.calls);
        let given = self.settle_outcome(slot, outcome);
        self.members.at_mut(slot).became_zero(page..page + given);
        self.counters.zeroed += u64::from(given);
        given
    }

    /// Maps a frame over a page, and its neighbours over the page's neighbours.
    fn merge_into(&mut self, slot: usize, page: u32, end: u32, frame: Frame) -> u32 {
        let store = &self.store;
        let member = self.members.at(slot);
        let alike = |page: u32, frame: Frame| {
            // SAFETY: a member's RAM is mapped, and the frame was just seen to be live.
            member.flags[page as usize].contains(Flags::PRIVATE)
                && store.is_live(frame)
                && unsafe { content::equal(member.space.page(page), store.content(frame)) }
        };
        let forward = 1
            + (1..(end - page).min(WINDOW_PAGES))
                .take_while(|&ahead| frame.checked_add(ahead).is_some_and(|frame| alike(page + ahead, frame)))
                .count() as u32;
        let backward = (1..=page.min(frame).min(WINDOW_PAGES - forward))
            .take_while(|&behind| alike(page - behind, frame - behind))
            .count() as u32;
        let (first, frame, count) = (page - backward, frame - backward, forward + backward);
        if !self.affordable(slot, first, count, Source::Frames(frame), 0) {
            return forward;
        }
        self.merge_run(slot, first, frame, count);
        forward
    }

    /// Makes frames of a page and its twin that are not shared yet, and of their neighbours.
    fn publish(&mut self, slot: usize, page: u32, end: u32, twin: (usize, u32)) -> u32 {
        let (twin_slot, twin_page) = twin;
        let member = self.members.at(slot);
        let other = self.members.at(twin_slot);
        let alike = |page: u32, twin: u32| {
            // SAFETY: members' RAM is mapped.
            member.flags[page as usize].contains(Flags::PRIVATE)
                && other.flags[twin as usize].contains(Flags::PRIVATE)
                && unsafe { content::equal(member.space.page(page), other.space.page(twin)) }
                && unsafe { !content::zero(other.space.page(twin)) }
        };
        // Within one VM the two runs must not overlap.
        let apart = if slot == twin_slot { page.abs_diff(twin_page) } else { WINDOW_PAGES };
        let longest = apart.min(WINDOW_PAGES);
        let forward = 1
            + (1..longest.min(end - page).min(other.space.pages() - twin_page))
                .take_while(|&ahead| alike(page + ahead, twin_page + ahead))
                .count() as u32;
        let backward = (1..=page.min(twin_page).min(longest - forward))
            .take_while(|&behind| alike(page - behind, twin_page - behind))
            .count() as u32;
        let (first, twin_first, count) = (page - backward, twin_page - backward, forward + backward);

        let follows = |member: &Member, first: u32| {
            let before = first.checked_sub(1)?;
            member.space.attached(before).then(|| member.space.refers(before))?.map(|frame| frame + 1)
        };
        let preferred = follows(other, twin_first).or_else(|| follows(member, first));
        let Some(frame) = self.store.allocate(count, preferred) else {
            self.counters.refusals += 1;
            return forward;
        };
        let source = Source::Frames(frame);
        let twin_cost = self.members.at(twin_slot).space.mappings_added(twin_first, count, source);
        let mut written = self.affordable(slot, first, count, source, twin_cost);
        if written
            && self.store.write(frame, self.members.at(twin_slot).space.page(twin_first), count).is_err()
        {
            self.counters.refusals += 1;
            written = false;
        }
        if written {
            self.merge_run(twin_slot, twin_first, frame, count);
            self.merge_run(slot, first, frame, count);
        }
        for frame in frame..frame + count {
            if self.store.sharers(frame) == 0 {
                self.store.abandon(frame);
            } else {
                self.index_frame(frame);
            }
        }
        forward
    }

    /// Enters a fresh frame into the index of frames.
    fn index_frame(&mut self, frame: Frame) {
        // SAFETY: the frame is live; its content no longer changes.
        unsafe { content::copy(self.store.content(frame), &mut self.scratch) };
        let digest = self.digester.digest(&self.scratch);
        self.store.set_digest(frame, digest);
        let store = &self.store;
        self.stable.insert_unique(hash(digest), frame, |&other| hash(store.digest(other)));
    }

    /// Merges a run, leaving out pages that differ under protection.
    fn merge_run(&mut self, slot: usize, first: u32, frame: Frame, count: u32) {
        let mut done = 0;
        let mut misses = 0;
        while done < count && misses < MISSES {
            let member = self.members.at_mut(slot);
            let outcome =
                member.space.merge(first + done, frame + done, count - done, &mut self.store, &*self.calls);
            let failed = outcome.is_err();
            let merged = self.settle_outcome(slot, outcome);
            for page in first + done..first + done + merged {
                self.forget_page(slot, page);
                self.members.at_mut(slot).became_merged(page);
            }
            self.counters.merges += u64::from(merged);
            done += merged + 1;
            misses += 1;
            if failed {
                break;
            }
        }
    }

    /// Counts a refusal, tells the VM of a loss.
    fn settle_outcome(&mut self, slot: usize, outcome: Result<u32, SpaceError>) -> u32 {
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

    /// Whether the process can bear the mappings of a run, and `more` of them.
    fn affordable(&mut self, slot: usize, first: u32, count: u32, source: Source, more: i64) -> bool {
        let added = more + self.members.at(slot).space.mappings_added(first, count, source);
        // A window that ends early leaves two more edges.
        let room = self.budget.room(self.members.mappings(), self.members.count());
        let affordable = added <= 0 || added + 2 * i64::from(MISSES) <= room;
        self.counters.denied += u64::from(!affordable);
        affordable
    }

    /// Takes a page out of the index of unique pages.
    fn forget_page(&mut self, slot: usize, page: u32) {
        let member = self.members.at_mut(slot);
        if member.clear_unique(page) {
            forget_unique(&mut self.unique, member.place(page), member.digests[page as usize]);
        }
    }

    /// The engine's statistics, without the CPU time.
    #[must_use]
    pub fn statistics(&self) -> EngineStatistics {
        let guest = self.members.mappings();
        EngineStatistics {
            pages_shared: self.store.shared().into(),
            pages_sharing: self.store.sharing(),
            pages_unshared: self.members.iter().map(|member| u64::from(member.counts.unique)).sum(),
            pages_volatile: self.members.iter().map(|member| u64::from(member.counts.volatile)).sum(),
            zero_pages: self.members.iter().map(|member| u64::from(member.counts.zero)).sum(),
            full_scans: self.counters.full_scans,
            frames: self.store.live().into(),
            pages_scanned: self.counters.scanned,
            merges: self.counters.merges,
            breaks: self.counters.breaks,
            mappings_denied: self.counters.denied,
            refusals: self.counters.refusals,
            store_bytes: self.store.charged_bytes().unwrap_or(0),
            metadata_bytes: self.metadata_bytes() as u64,
            mappings: self.budget.used(guest),
            mappings_limit: self.budget.limit(),
            cpu_seconds: 0.0,
        }
    }

    /// The digest of a page under this engine's key.
    pub(crate) fn digest_of(&self, page: &Page) -> u32 {
        self.digester.digest(page)
    }

    fn metadata_bytes(&self) -> usize {
        self.store.metadata_bytes()
            + self.stable.allocation_size()
            + self.unique.allocation_size()
            + self.members.iter().map(Member::metadata_bytes).sum::<usize>()
    }

    /// One VM's statistics; `None` for a slot without a VM.
    ///
    /// # Errors
    /// Where the page map cannot be read.
    pub fn vm_statistics(&self, slot: usize) -> io::Result<Option<VmStatistics>> {
        let Some(member) = self.members.get(slot) else { return Ok(None) };
        let space = &member.space;
        let mut runs = Vec::new();
        if !space.lost() {
            space.private(0..space.pages(), &self.pagemap, &mut runs)?;
        }
        let mut sharing = 0.0;
        let mut shared = 0_u64;
        for page in (0..space.pages()).filter(|&page| space.attached(page)) {
            let sharers = space.refers(page).map_or(1, |frame| self.store.sharers(frame).max(1));
            shared += u64::from(sharers > 1);
            sharing += 1.0 - 1.0 / f64::from(sharers);
        }
        let sharing = f64::round(sharing) as u64;
        Ok(Some(VmStatistics {
            pages: space.pages().into(),
            pages_shared: shared - sharing,
            pages_sharing: sharing,
            pages_merged: space.attached_count().into(),
            pages_unshared: member.counts.unique.into(),
            pages_volatile: member.counts.volatile.into(),
            zero_pages: member.counts.zero.into(),
            pages_private: runs.iter().map(|run| u64::from(run.end - run.start)).sum(),
            mappings: space.mappings().into(),
        }))
    }
}

fn member_place(members: &Members, slot: usize, page: u32) -> Place {
    members.at(slot).place(page)
}

/// Spreads a digest over the 64 bits that the tables use.
fn hash(digest: u32) -> u64 {
    u64::from(digest).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn forget_frame(stable: &mut HashTable<Frame>, frame: Frame, digest: u32) {
    if let Ok(entry) = stable.find_entry(hash(digest), |&other| other == frame) {
        entry.remove();
    }
}

fn forget_unique(unique: &mut HashTable<Place>, place: Place, digest: u32) {
    if let Ok(entry) = unique.find_entry(hash(digest), |&other| other == place) {
        entry.remove();
    }
}
