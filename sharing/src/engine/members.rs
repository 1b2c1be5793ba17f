//! The VMs of one engine, and what the search knows about each of their pages.

use std::cmp;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

pub use samepage_spec::SharingMode as Mode;

use crate::blocks::admission::Sampler;
use crate::blocks::block_index::BlockKey;
use crate::blocks::working_set::{self, WorkingSet};
use crate::changes::ChangeLog;
use crate::changes::follower::Follower;
use crate::engine::far::Reach;
use crate::engine::modes::Unshare;
use crate::frames::space::{LostHandler, Space, SpaceError};
use crate::index::Contents;
use crate::memory::content::{Page, Snapshot};
use crate::numbers::{Digest, GlobalPage, Slot};
use crate::policy::budget::{Budget, Share};
use crate::policy::claims::{Claims, SharedTypes};
use crate::policy::hints::Hints;
use crate::policy::huge::HugeRanges;

/// What the search knows about a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags(u8);

impl Flags {
    /// Private when last seen, and not merged or freed since.
    pub(crate) const PRIVATE: Self = Self(1);
    /// In the index of unique pages.
    pub(crate) const UNIQUE: Self = Self(1 << 1);
    /// Given back as a page of zeros, and not seen private since.
    pub(crate) const ZERO: Self = Self(1 << 2);
    /// Its digest is that of the last scan.
    pub(crate) const DIGESTED: Self = Self(1 << 3);
    /// It had changed at the last scan.
    pub(crate) const VOLATILE: Self = Self(1 << 4);
    /// In a range that a huge page backs, and known to have its like elsewhere or to be zero.
    pub(crate) const ALIKE: Self = Self(1 << 5);

    pub(crate) fn contains(self, flag: Self) -> bool {
        self.0 & flag.0 != 0
    }

    pub(crate) fn insert(&mut self, flag: Self) {
        self.0 |= flag.0;
    }

    fn remove(&mut self, flag: Self) -> bool {
        let was = self.contains(flag);
        self.0 &= !flag.0;
        was
    }
}

/// Pages of a VM by what they are.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) unique: u32,
    pub(crate) volatile: u32,
    pub(crate) zero: u32,
}

/// One VM.
pub(crate) struct Member {
    pub(crate) space: Space,
    pub(crate) flags: Vec<Flags>,
    pub(crate) counts: Counts,
    /// What follows its changes; without one the VM is scanned in full passes.
    pub(crate) follower: Option<Follower>,
    pub(crate) mode: Mode,
    /// How far it has come, where it is not to share any more.
    pub(crate) unshare: Option<Unshare>,
    pub(crate) hints: Arc<Hints>,
    /// What huge pages back, where they are wanted.
    pub(crate) huge: Option<HugeRanges>,
    /// What more memory would bring it, once it has read a block through the cache.
    pub(crate) working_set: Option<Box<WorkingSet<Sampler>>>,
    /// What its guest says of its pages, where it can say anything.
    pub(crate) claims: Option<Box<Claims>>,
    /// Which of its pages are shared.
    pub(crate) types: SharedTypes,
    /// How long its runs are, where it is in another process.
    pub(crate) reach: Reach,
    /// How many of its first pages were taken out of all indexes, since it has lost memory.
    pub(crate) retired: u32,
    /// Its number among all that the engine ever had: another VM in its slot has another.
    pub(crate) id: u64,
    base: GlobalPage,
    on_lost: LostHandler,
    /// Its part of the mappings of the process that has its memory.
    share: Share,
}

impl Member {
    pub(crate) fn global_page(&self, page: u32) -> GlobalPage {
        self.base.offset(page)
    }

    /// The digest of the last scan of a page that is not attached, where there was one since it was.
    pub(crate) fn digest(&self, page: u32) -> Digest {
        Digest::new(self.space.backing().note(page))
    }

    pub(crate) fn known_digest(&self, page: u32) -> Option<Digest> {
        self.flags[page as usize].contains(Flags::DIGESTED).then(|| self.digest(page))
    }

    pub(crate) fn became_private(&mut self, page: u32) {
        self.not_zero(page);
        self.flags[page as usize].insert(Flags::PRIVATE);
    }

    /// A log says that the page was written.
    pub(crate) fn changed(&mut self, page: u32, restless: bool) {
        self.set_volatile(page, restless);
        self.flags[page as usize].remove(Flags::PRIVATE);
        self.changed_in_range(page);
    }

    /// The page has changed, and so has the range that it is in.
    pub(crate) fn changed_in_range(&mut self, page: u32) {
        self.clear_alike(page);
        if let Some(huge) = &mut self.huge {
            huge.changed(page);
        }
    }

    /// Whether the page belongs to a huge page that is to stay whole.
    pub(crate) fn is_huge(&self, page: u32) -> bool {
        self.huge.as_ref().is_some_and(|huge| huge.is_huge(page))
    }

    /// Whether the page has memory of its own and may be mapped to a frame.
    pub(crate) fn mergeable(&self, page: u32) -> bool {
        self.flags[page as usize].contains(Flags::PRIVATE) && !self.is_huge(page) && self.admits(page)
    }

    /// Whether the page has memory of its own, as far as is known, and its guest does not say that it is free.
    pub(crate) fn is_to_be_scanned(&self, page: u32) -> bool {
        self.flags[page as usize].contains(Flags::PRIVATE) && !self.claim(page).free()
    }

    /// A page of a huge page could be shared.
    pub(crate) fn set_alike(&mut self, page: u32) {
        if let Some(huge) = &mut self.huge
            && !self.flags[page as usize].contains(Flags::ALIKE)
        {
            self.flags[page as usize].insert(Flags::ALIKE);
            huge.add_alike(page);
        }
    }

    /// Returns whether the page could have been shared.
    pub(crate) fn clear_alike(&mut self, page: u32) -> bool {
        let was = self.flags[page as usize].remove(Flags::ALIKE);
        if let Some(huge) = self.huge.as_mut().filter(|_| was) {
            huge.remove_alike(page);
        }
        was
    }

    /// The page, which has memory of its own, is not merged for want of mappings.
    pub(crate) fn denied(&mut self, page: u32) {
        self.flags[page as usize].insert(Flags::PRIVATE);
        if let Some(follower) = &mut self.follower {
            follower.deny(page);
        }
    }

    /// The page provably has memory of its own.
    pub(crate) fn not_zero(&mut self, page: u32) {
        self.counts.zero -= u32::from(self.flags[page as usize].remove(Flags::ZERO));
    }

    /// Whether the page takes no memory of its own as far as is known: a log may say that it was
    /// written when it was not.
    pub(crate) fn shared_or_zero(&self, page: u32) -> bool {
        self.space.attached(page) || self.flags[page as usize].contains(Flags::ZERO)
    }

    pub(crate) fn became_zero(&mut self, pages: Range<u32>) {
        for page in pages {
            self.left_private(page);
            self.flags[page as usize].insert(Flags::ZERO);
            self.counts.zero += 1;
        }
    }

    /// The page has no memory any more.
    pub(crate) fn became_untouched(&mut self, page: u32) {
        self.not_zero(page);
        self.left_private(page);
    }

    pub(crate) fn became_merged(&mut self, page: u32) {
        self.left_private(page);
    }

    fn left_private(&mut self, page: u32) {
        self.set_volatile(page, false);
        self.clear_alike(page);
        let flags = &mut self.flags[page as usize];
        flags.remove(Flags::PRIVATE);
        flags.remove(Flags::DIGESTED);
    }

    pub(crate) fn set_volatile(&mut self, page: u32, volatile: bool) {
        let flags = &mut self.flags[page as usize];
        self.counts.volatile -= u32::from(flags.remove(Flags::VOLATILE));
        if volatile {
            flags.insert(Flags::VOLATILE);
            self.counts.volatile += 1;
        }
    }

    pub(crate) fn set_unique(&mut self, page: u32) {
        self.flags[page as usize].insert(Flags::UNIQUE);
        self.counts.unique += 1;
    }

    /// Returns whether the page was in the index of unique pages.
    pub(crate) fn clear_unique(&mut self, page: u32) -> bool {
        let was = self.flags[page as usize].remove(Flags::UNIQUE);
        self.counts.unique -= u32::from(was);
        was
    }

    /// Whether there is anything to be looked for in its memory.
    pub(crate) fn active(&self) -> bool {
        self.mode != Mode::Off && !self.space.lost()
    }

    /// The VM reads a block that it does not hold.
    pub(crate) fn missed(&mut self, key: BlockKey, sampler: &Sampler) {
        self.working_set_by(sampler).missed(key);
    }

    /// What more memory would bring it, followed by the hashes that samples are taken by.
    pub(crate) fn working_set_by(&mut self, sampler: &Sampler) -> &mut WorkingSet<Sampler> {
        let settings = working_set::Settings::default();
        let new = || Box::new(WorkingSet::with_hashes(settings, sampler.clone()));
        self.working_set.get_or_insert_with(new)
    }

    /// The VM holds a block no more.
    pub(crate) fn gave_up(&mut self, key: BlockKey) {
        if let Some(working_set) = &mut self.working_set {
            working_set.evicted(key);
        }
    }

    /// How many mappings its process has, and may have.
    pub(crate) fn budget(&self) -> &Budget {
        self.share.budget()
    }

    /// Lets the budget know how many mappings it has.
    pub(crate) fn report_mappings(&mut self) {
        self.share.set(self.space.mappings().into(), 1);
    }

    pub(crate) fn tell_lost(&self, error: &SpaceError) {
        (self.on_lost)(error);
    }

    pub(crate) fn metadata_bytes(&self) -> usize {
        self.space.metadata_bytes()
            + self.flags.len() * size_of::<Flags>()
            + self.follower.as_ref().map_or(0, Follower::metadata_bytes)
            + self.hints.metadata_bytes()
            + self.huge.as_ref().map_or(0, HugeRanges::metadata_bytes)
            + self.working_set.as_ref().map_or(0, |working_set| working_set.bytes())
            + self.claims.as_ref().map_or(0, |claims| claims.bytes())
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("memory", &self.space.memory()).field("base", &self.base).finish()
    }
}

/// All VMs, each in a slot that stays its own while it is a member.
#[derive(Debug, Default)]
pub(crate) struct Members {
    slots: Vec<Option<Member>>,
    /// First place of each member to its slot.
    places: BTreeMap<GlobalPage, Slot>,
    /// Members that there ever were.
    ids: u64,
    /// Which pages are shared.
    types: SharedTypes,
}

impl Members {
    /// None, of which pages of these types will be shared.
    pub(crate) fn new(types: SharedTypes) -> Self {
        Self { types, ..Self::default() }
    }

    pub(crate) fn add(
        &mut self,
        space: Space,
        log: Option<Box<dyn ChangeLog>>,
        huge: Option<HugeRanges>,
        mode: Mode,
        on_lost: LostHandler,
        budget: Arc<Budget>,
    ) -> io::Result<Slot> {
        let pages = space.pages();
        let base = self.free_places(pages).ok_or_else(|| {
            io::Error::other("all VMs together have more than 16 TiB of memory: too much for one engine")
        })?;
        let free = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let slot = Slot::new(free);
        self.places.insert(base, slot);
        self.ids += 1;
        self.slots[free] = Some(Member {
            flags: vec![Flags::default(); pages as usize],
            counts: Counts::default(),
            follower: log.map(|log| Follower::new(log, pages)),
            mode,
            unshare: None,
            hints: Arc::default(),
            huge,
            working_set: None,
            claims: None,
            types: self.types,
            space,
            reach: Reach::default(),
            retired: 0,
            id: self.ids,
            base,
            on_lost,
            share: Share::new(budget),
        });
        Ok(slot)
    }

    /// The first gap of `pages` places.
    fn free_places(&self, pages: u32) -> Option<GlobalPage> {
        let mut start = GlobalPage::default();
        for (&base, &slot) in &self.places {
            if base.behind(start) >= pages {
                break;
            }
            start = base.checked_add(self.at(slot).space.pages())?;
        }
        start.checked_add(pages).map(|_| start)
    }

    /// Lets a member's memory go, whatever the metadata says of it.
    pub(crate) fn forget(&mut self, slot: Slot) {
        if let Some(member) = self.slots.get_mut(slot.index()).and_then(Option::take) {
            self.places.retain(|_, other| *other != slot);
            drop(member);
        }
    }

    /// Takes a member out, to be dropped by the caller: that takes time in proportion to its memory.
    pub(crate) fn remove(&mut self, slot: Slot) -> Option<Member> {
        let removed = self.slots[slot.index()].take();
        if let Some(member) = &removed {
            self.places.remove(&member.base);
        }
        while self.slots.last().is_some_and(Option::is_none) {
            self.slots.pop();
        }
        removed
    }

    /// The slots with members, in order.
    pub(crate) fn slots(&self) -> impl Iterator<Item = Slot> + '_ {
        self.slots
            .iter()
            .enumerate()
            .filter(|(_, member)| member.is_some())
            .map(|(index, _)| Slot::new(index))
    }

    /// The slots with members, those behind a slot first and this one last.
    pub(crate) fn slots_after(&self, slot: Slot) -> impl Iterator<Item = Slot> + '_ {
        self.slots()
            .filter(move |&other| other > slot)
            .chain(self.slots().filter(move |&other| other <= slot))
    }

    /// The first slot with a member, from `slot` on.
    pub(crate) fn next_from(&self, slot: Slot) -> Option<Slot> {
        (slot.index()..self.slots.len()).find(|&index| self.slots[index].is_some()).map(Slot::new)
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&Member> {
        self.slots.get(slot.index())?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, slot: Slot) -> Option<&mut Member> {
        self.slots.get_mut(slot.index())?.as_mut()
    }

    /// The member of a slot that is known to have one.
    pub(crate) fn at(&self, slot: Slot) -> &Member {
        self.get(slot).expect("a slot in use")
    }

    pub(crate) fn at_mut(&mut self, slot: Slot) -> &mut Member {
        self.get_mut(slot).expect("a slot in use")
    }

    /// The slot and page of a global.
    pub(crate) fn locate(&self, global: GlobalPage) -> (Slot, u32) {
        let (&base, &slot) = self.places.range(..=global).next_back().expect("a place in use");
        (slot, global.behind(base))
    }

    pub(crate) fn digest(&self, global: GlobalPage) -> Digest {
        let (slot, page) = self.locate(global);
        self.at(slot).digest(page)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Member> {
        self.slots.iter().flatten()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Member> {
        self.slots.iter_mut().flatten()
    }

    pub(crate) fn count(&self) -> usize {
        self.places.len()
    }

    /// Mappings of all guest RAM.
    pub(crate) fn mappings(&self) -> u64 {
        self.iter().map(|member| u64::from(member.space.mappings())).sum()
    }
}

impl Contents for Members {
    type Entry = GlobalPage;

    fn read(&self, entry: GlobalPage) -> Box<Snapshot> {
        let (slot, page) = self.locate(entry);
        self.at(slot).space.memory().read(page)
    }

    fn is_alike(&self, content: &Page, entry: GlobalPage) -> bool {
        let (slot, page) = self.locate(entry);
        let memory = self.at(slot).space.memory();
        // To ask takes longer than the order to merge, which compares.
        memory.is_far() || memory.order(content, page).is_eq()
    }

    fn order(&self, content: &Page, entry: GlobalPage) -> cmp::Ordering {
        let (slot, page) = self.locate(entry);
        self.at(slot).space.memory().order(content, page)
    }

    fn digest(&self, entry: GlobalPage) -> Digest {
        Members::digest(self, entry)
    }

    fn readable(&self, entry: GlobalPage) -> bool {
        let (slot, _) = self.locate(entry);
        !self.at(slot).space.lost()
    }

    fn shares(&self, entry: GlobalPage) -> bool {
        let (slot, _) = self.locate(entry);
        self.at(slot).mode == Mode::Full
    }
}
