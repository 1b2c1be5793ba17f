//! What sharing comes to by type of page, counted page by page.

use std::io;
use std::ops::Range;
use std::time::Instant;

use crate::engine::Engine;
use crate::engine::members::{Flags, Member};
pub use crate::frames::page_types::{Claimed, TYPES, TypeStatistics};
use crate::inspect::survey::{PageCount, Survey};
use crate::numbers::Slot;

impl Engine {
    /// What a VM's guest says of its pages. Takes time in proportion to its memory where it says anything;
    /// `None` for a slot without a VM.
    ///
    /// # Errors
    /// Fails if the page map cannot be read.
    pub fn claimed(&self, slot: Slot) -> io::Result<Option<Claimed>> {
        Survey::new(slot, ClaimCount::default()).all(self)
    }
}

/// What [`Engine::claimed`] counts.
#[derive(Default)]
pub(crate) struct ClaimCount {
    private: [u64; TYPES],
    sharing: [f64; TYPES],
    zero: [u64; TYPES],
}

impl PageCount for ClaimCount {
    type Sum = Claimed;
    const NAME: &'static str = "statistics by type of page";

    fn count(
        &mut self,
        engine: &Engine,
        member: &Member,
        pages: Range<u32>,
        runs: &[Range<u32>],
    ) -> io::Result<()> {
        let space = &member.space;
        let Some(census) = space.backing().census() else { return Ok(()) };
        for page in runs.iter().cloned().flatten() {
            self.private[census.claim(page).page_type() as usize] += 1;
        }
        for page in pages {
            let kind = census.claim(page).page_type() as usize;
            if space.attached(page) {
                let sharers = space.refers(page).map_or(1, |frame| engine.store.sharers(frame).max(1));
                self.sharing[kind] += 1.0 - 1.0 / f64::from(sharers);
            }
            self.zero[kind] += u64::from(member.flags[page as usize].contains(Flags::ZERO));
        }
        Ok(())
    }

    fn end(self, member: &Member) -> Claimed {
        let mut claimed = member.claims.as_ref().map(|claims| claims.summary()).unwrap_or_default();
        let Some(census) = member.space.backing().census() else { return claimed };
        claimed.types = census.statistics(Instant::now());
        for (kind, statistics) in claimed.types.iter_mut().enumerate() {
            statistics.private = self.private[kind];
            statistics.sharing = f64::round(self.sharing[kind]) as u64;
            statistics.zero = self.zero[kind];
        }
        claimed
    }
}
