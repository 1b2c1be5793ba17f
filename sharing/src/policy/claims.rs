//! What guests say that their pages are for: read from memory that they write at any time
//! ([`samepage_hole`]), pass by pass, at a cost that follows the words that changed.
//!
//! All of it is claims by a stranger. They say what to look at first and what to leave alone; what is
//! shared is compared as ever, and what is freed has proof of its own ([`give_back`](crate::policy::give_back)).
//! A guest that lies, or that tells of passes without end, is read a few times a second at most, and only by
//! the part of the engine's time that its words take.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use samepage_hole::{BLOCK_PAGES, FrameRange, GuestHeader, Hole};
use serde::{Deserialize, Serialize};

use crate::collections::sets::RareSet;
use crate::frames::page_types::Claimed;
use crate::policy::give_back::Giving;

/// Where a guest makes its claims about its pages.
pub trait ClaimSource: Send + Sync + fmt::Debug {
    /// The memory for it, which the guest may write at any time.
    fn hole(&self) -> Hole<'_>;

    /// Which page frames of the guest are RAM, in the order of the RAM's pages.
    fn ranges(&self) -> &[FrameRange];

    /// Asks the guest for a pass, by a number other than before. What the host did before is done before
    /// the guest sees it.
    fn request(&self, number: u32) {
        self.hole().set_requested(number);
    }
}

/// Which pages are shared, by what guests say that they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SharedTypes {
    /// All, whatever guests say.
    #[default]
    All,
    /// All but content of files. Guests that say nothing share nothing.
    NotFile,
    /// Content of files alone.
    File,
}

/// A guest that has been silent for so long, and for thrice the time that it had named and that its last pass
/// took, has stopped.
const SILENCE: Duration = Duration::from_secs(10);

/// The longest time that a guest may name.
const LONGEST: Duration = Duration::from_secs(600);

/// What one guest has said so far.
#[derive(Debug)]
pub(crate) struct Claims {
    pub(crate) source: Arc<dyn ClaimSource>,
    pub(crate) rung: Arc<AtomicBool>,
    /// The counters of blocks, as of when their words were read.
    pub(crate) counters: Vec<u32>,
    pub(crate) heard: Option<Heard>,
    pub(crate) reading: Option<Reading>,
    /// Since when the guest is listened to.
    pub(crate) begun: Instant,
    /// Before this moment no pass is read.
    pub(crate) not_before: Instant,
    /// What is to be done with all pages, and from which page on. Until then no pass is read.
    pub(crate) sweep: Option<(Sweep, u32)>,
    /// Free pages that may take memory, and have not been tried.
    pub(crate) offered: RareSet,
    pub(crate) giving: Giving,
    pub(crate) passes: u64,
    pub(crate) words: u64,
    pub(crate) given_back: u64,
}

/// What is done with all pages, some in each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sweep {
    /// What the guest said holds no longer.
    Forget,
    /// Free pages are tried again.
    Retry,
}

/// The last pass that was read to its end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heard {
    pub(crate) header: GuestHeader,
    pub(crate) at: Instant,
    /// After how long a silence it holds no longer.
    pub(crate) patience: Duration,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    pub(crate) header: GuestHeader,
    pub(crate) block: u32,
    pub(crate) started: Instant,
    /// The CPU time that it took so far.
    pub(crate) took: Duration,
}

impl Claims {
    pub(crate) fn new(source: Arc<dyn ClaimSource>, rung: Arc<AtomicBool>, pages: u32) -> Self {
        let counters = vec![0; source.hole().blocks() as usize];
        Self {
            source,
            rung,
            counters,
            heard: None,
            reading: None,
            begun: Instant::now(),
            not_before: Instant::now(),
            sweep: None,
            offered: RareSet::new(pages),
            giving: Giving::default(),
            passes: 0,
            words: 0,
            given_back: 0,
        }
    }

    /// Asks the guest for a pass.
    pub(crate) fn request(&self, number: u32) {
        self.source.request(number);
    }

    /// What the guest said at the end of the last pass.
    pub(crate) fn header(&self) -> Option<GuestHeader> {
        self.heard.map(|heard| heard.header)
    }

    /// Whether the guest says what its pages are for.
    pub(crate) fn publishing(&self) -> bool {
        self.heard.is_some()
    }

    /// When there is something to be done.
    pub(crate) fn due(&self) -> Option<Instant> {
        if self.sweep.is_some() {
            return Some(self.begun);
        }
        if self.reading.is_some() || self.rung.load(Ordering::Acquire) {
            return Some(self.not_before);
        }
        self.heard.map(|heard| heard.at + heard.patience)
    }

    pub(crate) fn summary(&self) -> Claimed {
        Claimed {
            publishing: self.publishing(),
            passes: self.passes,
            words: self.words,
            pass_cpu_us: self.header().map_or(0, |header| header.cpu_us),
            given_back: self.given_back,
            ..Claimed::default()
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.counters.capacity() * size_of::<u32>() + self.offered.bytes()
    }
}

/// For how long a guest may be silent after a pass, which came `since` the one before: a pass takes its time,
/// where the guest is slow or has much memory.
pub(crate) fn patience(header: &GuestHeader, since: Option<Duration>) -> Duration {
    let next = Duration::from_millis(header.next_ms.into());
    let took = Duration::from_micros(header.cpu_us.into()).max(since.unwrap_or_default());
    (3 * (next + took).min(LONGEST)).max(SILENCE)
}

/// What the page frames of a block are among the pages of RAM: index of the first in the block, first page,
/// and how many.
pub(crate) fn ram_of_block(ranges: &[FrameRange], block: u32) -> impl Iterator<Item = (u32, u32, u32)> {
    let frames = u64::from(block) * u64::from(BLOCK_PAGES)..u64::from(block + 1) * u64::from(BLOCK_PAGES);
    let mut before = 0_u64;
    ranges.iter().filter_map(move |range| {
        let (first, end) = (u64::from(range.first), u64::from(range.first) + u64::from(range.count));
        let page = before;
        before += u64::from(range.count);
        let (start, end) = (frames.start.max(first), frames.end.min(end));
        (start < end)
            .then(|| ((start - frames.start) as u32, (page + start - first) as u32, (end - start) as u32))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u32, count: u32) -> FrameRange {
        FrameRange { first, count }
    }

    #[test]
    fn page_frames_are_found_among_the_pages_of_ram() {
        let ranges = [range(0, 1500), range(4000, 2000), range(0, 0)];
        let of = |block| ram_of_block(&ranges, block).collect::<Vec<_>>();
        assert_eq!(of(0), [(0, 0, 1024)]);
        assert_eq!(of(1), [(0, 1024, 476)]);
        assert_eq!(of(2), []);
        assert_eq!(of(3), [(928, 1500, 96)]);
        assert_eq!(of(5), [(0, 1500 + 1120, 880)]);
        assert_eq!(of(u32::MAX / BLOCK_PAGES), []);
        let both = [range(0, 100), range(200, 100)];
        assert_eq!(ram_of_block(&both, 0).collect::<Vec<_>>(), [(0, 0, 100), (200, 100, 100)]);
    }

    #[test]
    fn guests_that_name_no_time_are_waited_for_a_while_and_others_not_for_ever() {
        let header = |next_ms, cpu_us| GuestHeader { next_ms, cpu_us, ..GuestHeader::default() };
        let seconds = Duration::from_secs;
        assert_eq!(patience(&header(0, 0), None), SILENCE);
        assert_eq!(patience(&header(60_000, 1000), None), seconds(180) + Duration::from_millis(3));
        assert_eq!(patience(&header(1000, 11_000_000), None), seconds(36));
        assert_eq!(patience(&header(1000, 11_000_000), Some(seconds(88))), seconds(267));
        assert_eq!(patience(&header(u32::MAX, u32::MAX), None), 3 * LONGEST);
    }
}
