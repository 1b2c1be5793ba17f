//! Counts of a VM's pages, a part of its memory at a time: whoever waits for the engine waits for a part.
//! What the guest or the engine changes meanwhile may be counted as it was or as it is.

use std::io;
use std::ops::Range;

use crate::engine::Engine;
use crate::engine::holds::Since;
use crate::engine::members::Member;
use crate::inspect::statistics::VmStatistics;
use crate::memory::ram::HUGE_PAGES;
use crate::numbers::Slot;
use crate::policy::huge::HugeRanges;

/// Pages of a part: some hundred microseconds of work.
const PART_PAGES: u32 = 1 << 13;

/// Something that is counted page by page.
pub(crate) trait PageCount {
    /// What it comes to.
    type Sum;
    /// What the work is called.
    const NAME: &'static str;

    /// Counts some pages; `runs` are those of them with memory of their own.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    fn count(
        &mut self,
        engine: &Engine,
        member: &Member,
        pages: Range<u32>,
        runs: &[Range<u32>],
    ) -> io::Result<()>;

    /// All pages were counted.
    fn end(self, member: &Member) -> Self::Sum;
}

/// A count under way.
pub(crate) struct Survey<C> {
    slot: Slot,
    next: u32,
    count: C,
}

impl<C: PageCount> Survey<C> {
    pub(crate) fn new(slot: Slot, count: C) -> Self {
        Self { slot, next: 0, count }
    }

    /// Counts the next part. Returns whether there is more.
    ///
    /// # Errors
    /// Fails if the page map cannot be read.
    pub(crate) fn go_on(&mut self, engine: &Engine) -> io::Result<bool> {
        let since = Since::now();
        let Some(member) = engine.members.get(self.slot) else { return Ok(false) };
        let all = member.space.pages();
        let pages = self.next..all.min(self.next.saturating_add(PART_PAGES));
        let mut runs = Vec::new();
        if !member.space.lost() {
            member.space.memory().private(pages.clone(), &mut runs)?;
        }
        self.count.count(engine, member, pages.clone(), &runs)?;
        self.next = pages.end;
        engine.holds.note(C::NAME, since);
        Ok(self.next < all)
    }

    /// What it comes to; `None` where there is no such VM.
    pub(crate) fn end(self, engine: &Engine) -> Option<C::Sum> {
        Some(self.count.end(engine.members.get(self.slot)?))
    }

    /// Counts all at once.
    pub(crate) fn all(mut self, engine: &Engine) -> io::Result<Option<C::Sum>> {
        while self.go_on(engine)? {}
        Ok(self.end(engine))
    }
}

/// What [`Engine::vm_statistics`] counts.
#[derive(Default)]
pub(crate) struct VmCount {
    merged: u64,
    shared: u64,
    sharing: f64,
    private: u64,
    huge: u64,
}

impl PageCount for VmCount {
    type Sum = VmStatistics;
    const NAME: &'static str = "statistics of a VM";

    fn count(
        &mut self,
        engine: &Engine,
        member: &Member,
        pages: Range<u32>,
        runs: &[Range<u32>],
    ) -> io::Result<()> {
        let total = |runs: &[Range<u32>]| runs.iter().map(|run| u64::from(run.end - run.start)).sum::<u64>();
        self.private += total(runs);
        let memory = member.space.memory();
        if !member.space.lost() && member.huge.is_some() && memory.tells_huge() {
            let mut huge = Vec::new();
            memory.huge(pages.clone(), &mut huge)?;
            self.huge += total(&huge);
        }
        for frame in member.space.backing().frames(pages) {
            let sharers = engine.store.sharers(frame).max(1);
            self.merged += 1;
            self.shared += u64::from(sharers > 1);
            self.sharing += 1.0 - 1.0 / f64::from(sharers);
        }
        Ok(())
    }

    fn end(self, member: &Member) -> VmStatistics {
        let sharing = f64::round(self.sharing) as u64;
        VmStatistics {
            pages: member.space.pages().into(),
            pages_shared: self.shared.saturating_sub(sharing),
            pages_sharing: sharing,
            pages_merged: self.merged,
            pages_unshared: member.counts.unique.into(),
            pages_volatile: member.counts.volatile.into(),
            zero_pages: member.counts.zero.into(),
            pages_private: self.private,
            huge_whole: self.huge / u64::from(HUGE_PAGES),
            huge_split: member.huge.as_ref().map_or(0, HugeRanges::splits),
            mappings: member.space.mappings().into(),
        }
    }
}
