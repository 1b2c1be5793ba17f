//! What guests say that their pages are for, page by page, and what sharing comes to by type.
//!
//! A guest's word is a claim: nothing here decides what may be shared.

use std::time::Instant;

use samepage_hole::flags::in_motion;
use samepage_hole::{PageType, flags};
use serde::{Deserialize, Serialize};

use crate::collections::sets::RareSet;

/// How many types of pages there are.
pub const TYPES: usize = PageType::ALL.len();

/// Pages of one type, of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TypeStatistics {
    /// Pages that the guest says are of this type.
    pub pages: u64,
    /// Of those, the ones with memory of their own.
    pub private: u64,
    /// The ones mapped to frames.
    pub merged: u64,
    /// What sharing saves by them: each of n sharers of a frame saves 1 - 1/n of a page.
    pub sharing: u64,
    /// The ones freed on the host.
    pub zero: u64,
    /// Merges since the start.
    pub merges: u64,
    /// Merged ones that were written since the start.
    pub broken: u64,
    /// How long pages were mapped to frames, all together, in page-seconds since the start. Divided by
    /// `broken` it is how long a merged page of this type lives: the likeliest mean where each moment is
    /// as good as another for a write, in which pages that still are merged count as they should.
    pub merged_seconds: f64,
    /// How long that start is ago, in seconds; 0 where there has been nothing of this type.
    #[serde(default)]
    pub watched_seconds: f64,
}

/// What a guest says of its pages, and what that comes to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Claimed {
    /// Whether an agent in the guest says what its pages are for.
    pub publishing: bool,
    /// Passes of the agent that were taken in.
    pub passes: u64,
    /// Words that had changed in them.
    pub words: u64,
    /// The guest's CPU time for its last pass, in microseconds, as it says.
    pub pass_cpu_us: u32,
    /// Free pages that were freed on the host since the start.
    pub given_back: u64,
    /// By type, in the order of [`PageType::ALL`].
    pub types: [TypeStatistics; TYPES],
}

/// What a guest says of one page: a number below 16, of which two are kept in a byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Claim(u8);

/// The types whose pages may be on their way to or from a disk, which have numbers of their own then.
const MOVING: [PageType; 3] = [PageType::Anonymous, PageType::FileMapped, PageType::FileUnmapped];

impl Claim {
    /// What a word of flags says.
    pub(crate) fn new(word: u32) -> Self {
        let kind = flags::page_type(word);
        let moving = MOVING.iter().position(|&moving| moving == kind).filter(|_| in_motion(word));
        Self(moving.map_or(kind as u8, |place| (TYPES + place) as u8))
    }

    pub(crate) fn page_type(self) -> PageType {
        let number = usize::from(self.0);
        if number < TYPES { PageType::ALL[number] } else { MOVING[number - TYPES] }
    }

    pub(crate) fn free(self) -> bool {
        self.page_type() == PageType::Free
    }

    /// Whether it is a page of the kernel's own, or on its way to or from a disk: it is unlikely to have
    /// its like, or to keep its content.
    pub(crate) fn poor(self) -> bool {
        matches!(self.page_type(), PageType::Slab | PageType::PageTable) || usize::from(self.0) >= TYPES
    }
}

/// The counts of one type.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    pages: u32,
    attached: u32,
    merges: u64,
    broken: u64,
    merged_seconds: f64,
}

/// What one guest says of each page, and counts by type that are kept up as pages are merged and written.
#[derive(Debug)]
pub(crate) struct Census {
    /// Two in a byte.
    claims: Vec<u8>,
    counts: [Count; TYPES],
    /// Pages that were put on frames to see whether they are written.
    lent: RareSet,
    /// Since when time is counted.
    started: Instant,
    /// Up to when time was counted.
    counted: Instant,
}

impl Census {
    /// Nothing is said of any page; `attached` are on frames.
    pub(crate) fn new(pages: u32, attached: u32) -> Self {
        let mut counts = [Count::default(); TYPES];
        counts[PageType::Unknown as usize] = Count { pages, attached, ..Count::default() };
        let claims = vec![0; (pages as usize).div_ceil(2)];
        let now = Instant::now();
        Self { claims, counts, lent: RareSet::new(pages), started: now, counted: now }
    }

    pub(crate) fn claim(&self, page: u32) -> Claim {
        Claim(self.claims[page as usize / 2] >> (page % 2 * 4) & 15)
    }

    fn count(&mut self, page: u32) -> &mut Count {
        &mut self.counts[self.claim(page).page_type() as usize]
    }

    /// The guest says something of a page. Returns what it said before, where that is something else.
    pub(crate) fn set(&mut self, page: u32, claim: Claim, attached: bool) -> Option<Claim> {
        let before = self.claim(page);
        if before == claim {
            return None;
        }
        let count = self.count(page);
        count.pages -= 1;
        count.attached -= u32::from(attached);
        let (byte, shift) = (&mut self.claims[page as usize / 2], page % 2 * 4);
        *byte = *byte & !(15 << shift) | claim.0 << shift;
        let count = self.count(page);
        count.pages += 1;
        count.attached += u32::from(attached);
        Some(before)
    }

    /// A page is mapped to a frame now that was not.
    pub(crate) fn attached(&mut self, page: u32) {
        self.count(page).attached += 1;
    }

    /// A page is on a frame no more.
    pub(crate) fn left(&mut self, page: u32) {
        self.lent.remove(page);
        self.count(page).attached -= 1;
    }

    /// Pages have other mappings.
    pub(crate) fn remapped(&mut self, pages: std::ops::Range<u32>) {
        self.lent.remove_range(pages);
    }

    pub(crate) fn merged(&mut self, page: u32) {
        self.count(page).merges += 1;
    }

    /// A page that is on a frame was written. Returns whether it had only been put there to see that.
    pub(crate) fn broken(&mut self, page: u32) -> bool {
        let lent = self.lent.contains(page);
        self.count(page).broken += u64::from(!lent);
        lent
    }

    /// Pages that were put on frames, and have been on the same frames since.
    pub(crate) fn lent(&self) -> &RareSet {
        &self.lent
    }

    pub(crate) fn lend(&mut self, page: u32) {
        self.lent.insert(page);
    }

    pub(crate) fn end_lending(&mut self) {
        self.lent.clear();
    }

    /// Counts the time until now.
    pub(crate) fn elapse(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.counted).as_secs_f64();
        self.counted = self.counted.max(now);
        for count in &mut self.counts {
            count.merged_seconds += f64::from(count.attached) * seconds;
        }
    }

    pub(crate) fn statistics(&self, now: Instant) -> [TypeStatistics; TYPES] {
        let seconds = now.saturating_duration_since(self.counted).as_secs_f64();
        let watched = now.saturating_duration_since(self.started).as_secs_f64();
        self.counts.map(|count| {
            let none = count.pages == 0 && count.merged_seconds == 0.0 && count.broken == 0;
            TypeStatistics {
                pages: count.pages.into(),
                merged: count.attached.into(),
                merges: count.merges,
                broken: count.broken,
                merged_seconds: count.merged_seconds + f64::from(count.attached) * seconds,
                watched_seconds: if none { 0.0 } else { watched },
                ..TypeStatistics::default()
            }
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.claims.capacity() + self.lent.bytes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use samepage_hole::PUBLISHED;

    use super::*;

    const FREE: u32 = PUBLISHED | flags::BUDDY;
    const SLAB: u32 = PUBLISHED | flags::SLAB;

    #[test]
    fn counts_follow_what_is_said_and_what_is_mapped() {
        let mut census = Census::new(10, 0);
        let start = census.counted;
        census.attached(3);
        census.elapse(start + Duration::from_secs(2));
        assert_eq!(census.set(3, Claim::new(SLAB), true), Some(Claim::default()));
        assert_eq!(census.set(3, Claim::new(SLAB), true), None);
        census.set(4, Claim::new(FREE), false);
        census.merged(3);
        let statistics = census.statistics(start + Duration::from_secs(3));
        let of = |kind: PageType| statistics[kind as usize];
        assert_eq!((of(PageType::Unknown).pages, of(PageType::Unknown).merged_seconds), (8, 2.0));
        assert_eq!((of(PageType::Slab).merged, of(PageType::Slab).merged_seconds), (1, 1.0));
        assert_eq!((of(PageType::Slab).merges, of(PageType::Free).pages), (1, 1));
        assert_eq!((of(PageType::Slab).watched_seconds, of(PageType::Balloon).watched_seconds), (3.0, 0.0));
        assert!(!census.broken(3));
        census.left(3);
        let statistics = census.statistics(start + Duration::from_secs(9));
        assert_eq!(
            (statistics[PageType::Slab as usize].merged, statistics[PageType::Slab as usize].broken),
            (0, 1)
        );
    }

    #[test]
    fn a_page_that_gets_another_mapping_is_lent_no_more() {
        let mut census = Census::new(10, 2);
        (0..2).for_each(|page| census.lend(page));
        assert!(census.broken(0));
        census.left(0);
        assert!(census.lent().runs_within(0..10).eq(std::iter::once(1..2)));
        census.remapped(1..2);
        assert_eq!(census.lent().count(), 0);
    }

    #[test]
    fn any_word_is_a_claim() {
        for bit in 0..32 {
            for word in [1 << bit, PUBLISHED | 1 << bit, !(1 << bit)] {
                let claim = Claim::new(word);
                assert_eq!(claim.page_type(), flags::page_type(word));
                assert!(claim.0 < 16);
            }
        }
        assert!(Claim::new(FREE).free() && !Claim::new(FREE).poor() && Claim::new(SLAB).poor());
        assert!(Claim::new(PUBLISHED | flags::LRU | flags::WRITEBACK).poor());
    }
}
