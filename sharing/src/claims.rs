//! What guests say that their pages are for: read from memory that they write at any time
//! ([`samepage_hole`]), pass by pass, at a cost that follows the words that changed.
//!
//! All of it is claims by a stranger. They say what to look at first and what to leave alone; what is
//! shared is compared as ever, and what is given back has proof of its own ([`give_back`](crate::give_back)).
//! A guest that lies, or that tells of passes without end, is read a few times a second at most, and only by
//! the part of the engine's time that its words take.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use samepage_hole::{BLOCK_PAGES, FrameRange, GuestHeader, Hole, PageType, Unread};
use serde::{Deserialize, Serialize};

use crate::by_type::{Claim, Claimed};
use crate::changes::RareSet;
use crate::engine::Engine;
use crate::give_back::Giving;
use crate::members::Member;
use crate::turns::Kind;
use crate::worker::thread_cpu;

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

/// Blocks of words that one step reads: some hundred microseconds where all have changed.
const STEP_BLOCKS: u32 = 16;
/// The least time between the beginnings of two passes' readings.
const SHORTEST: Duration = Duration::from_millis(100);
/// Reading takes one part in so many of the time.
const SHARE: u32 = 50;
/// A guest that has been silent for so long, and for thrice the time that it had named and that its last pass
/// took, has stopped.
const SILENCE: Duration = Duration::from_secs(10);
/// The longest time that a guest may name.
const LONGEST: Duration = Duration::from_secs(600);
/// Pages that one step goes over, where something is to be done with all of them.
const STEP_PAGES: u32 = 8192;
/// After how many passes all free pages are tried again: some may have been used and freed between two.
const RETRY_PASSES: u64 = 32;

/// What one guest has said so far.
#[derive(Debug)]
pub(crate) struct Claims {
    source: Arc<dyn ClaimSource>,
    rung: Arc<AtomicBool>,
    /// The counters of blocks, as of when their words were read.
    counters: Vec<u32>,
    heard: Option<Heard>,
    reading: Option<Reading>,
    /// Since when the guest is listened to.
    begun: Instant,
    /// Before this moment no pass is read.
    not_before: Instant,
    /// What is to be done with all pages, and from which page on. Until then no pass is read.
    sweep: Option<(Sweep, u32)>,
    /// Free pages that may take memory, and have not been tried.
    pub(crate) offered: RareSet,
    pub(crate) giving: Giving,
    passes: u64,
    words: u64,
    pub(crate) given_back: u64,
}

/// What is done with all pages, some in each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sweep {
    /// What the guest said holds no longer.
    Forget,
    /// Free pages are tried again.
    Retry,
}

/// The last pass that was read to its end.
#[derive(Clone, Copy, Debug)]
struct Heard {
    header: GuestHeader,
    at: Instant,
    /// After how long a silence it holds no longer.
    patience: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Reading {
    header: GuestHeader,
    block: u32,
    started: Instant,
    /// The CPU time that it took so far.
    took: Duration,
}

impl Claims {
    fn new(source: Arc<dyn ClaimSource>, rung: Arc<AtomicBool>, pages: u32) -> Self {
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
    fn due(&self) -> Option<Instant> {
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
fn patience(header: &GuestHeader, since: Option<Duration>) -> Duration {
    let next = Duration::from_millis(header.next_ms.into());
    let took = Duration::from_micros(header.cpu_us.into()).max(since.unwrap_or_default());
    (3 * (next + took).min(LONGEST)).max(SILENCE)
}

/// What the page frames of a block are among the pages of RAM: index of the first in the block, first page,
/// and how many.
fn ram_of_block(ranges: &[FrameRange], block: u32) -> impl Iterator<Item = (u32, u32, u32)> {
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

impl Member {
    /// What the guest says of a page.
    pub(crate) fn claim(&self, page: u32) -> Claim {
        self.space.backing().census().map_or_else(Claim::default, |census| census.claim(page))
    }

    /// Whether the page is of a type that is shared.
    pub(crate) fn admits(&self, page: u32) -> bool {
        match self.types {
            SharedTypes::All => true,
            SharedTypes::File => self.claim(page).page_type().is_file(),
            SharedTypes::NotFile => {
                self.claims.as_ref().is_some_and(|claims| claims.publishing())
                    && !self.claim(page).page_type().is_file()
            }
        }
    }

    /// Takes in what the guest says of a page. Returns whether it is news.
    fn hear(&mut self, page: u32, claim: Claim) -> bool {
        let attached = self.space.attached(page);
        let before = self.space.census_mut().and_then(|census| census.set(page, claim, attached));
        let (Some(before), Some(claims)) = (before, &mut self.claims) else { return false };
        if claim.free() == before.free() {
            // A page that was not shared for what it was.
            if let Some(follower) = self.follower.as_mut().filter(|_| self.types != SharedTypes::All) {
                follower.look_again(page);
            }
            return true;
        }
        if claim.free() {
            claims.offered.insert(page);
            if let Some(follower) = &mut self.follower {
                follower.drop_page(page);
            }
        } else {
            claims.offered.remove(page);
            if let Some(follower) = &mut self.follower {
                follower.look_again(page);
            }
        }
        true
    }

    /// A page of a VM whose guest says what its pages are for was written.
    pub(crate) fn written(&mut self, page: u32) {
        if let Some(claims) = &mut self.claims {
            claims.offered.remove(page);
        }
    }

    /// A page has come to rest: it is looked at when its turn comes.
    pub(crate) fn queue(&mut self, page: u32) {
        let turn = self.turn_of(page);
        if let Some(follower) = &mut self.follower {
            follower.queue(page, turn);
        }
    }

    /// Whether the page is to be shared by what the guest says of it.
    pub(crate) fn wanted(&self, page: u32) -> bool {
        !self.claim(page).free() && self.admits(page)
    }

    fn turn_of(&mut self, page: u32) -> Turn {
        let claim = self.claim(page);
        let Some(claims) = self.claims.as_mut().filter(|claims| claims.publishing()) else {
            return Turn::First;
        };
        match claim.page_type() {
            PageType::Free => {
                // The next pass tells whether it still is.
                claims.offered.insert(page);
                Turn::Never
            }
            _ if claim.poor() => Turn::Last,
            kind if kind.is_file() => Turn::First,
            _ => Turn::Second,
        }
    }
}

/// When a page at rest is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Before others: its like is likely.
    First,
    /// When there are no better ones.
    Second,
    /// When it has been at rest for longer.
    Last,
    /// Not before the guest says something else of it.
    Never,
}

impl Engine {
    /// Has a VM's guest listened to. The bell is to be set when it says that a pass is over.
    pub fn listen(&mut self, slot: usize, source: Arc<dyn ClaimSource>, bell: Arc<AtomicBool>) {
        let Some(member) = self.members.get_mut(slot) else { return };
        let pages = member.space.pages();
        let ram: u64 = source.ranges().iter().map(|range| u64::from(range.count)).sum();
        let frames =
            source.ranges().iter().map(|range| u64::from(range.first) + u64::from(range.count)).max();
        assert_eq!(ram, u64::from(pages), "the ranges of page frames are the VM's RAM");
        assert!(frames.unwrap_or(0) <= u64::from(source.hole().frames()), "all RAM has words");
        member.claims = Some(Box::new(Claims::new(source, bell, pages)));
    }

    /// Takes in the next part of what guests say. Returns whether there was any.
    pub(crate) fn take_claims(&mut self, now: Instant) -> bool {
        let due = |member: &Member| {
            member.claims.as_ref().and_then(|claims| claims.due()).is_some_and(|due| due <= now)
        };
        let Some(slot) = self.next_with_work(Kind::Claims, due) else { return false };
        let claims = self.members.at(slot).claims.as_ref();
        if let Some((sweep, from)) = claims.and_then(|claims| claims.sweep) {
            self.go_on_sweeping(slot, sweep, from);
        } else if claims.is_some_and(|claims| claims.reading.is_some()) {
            self.read_blocks(slot, now);
        } else {
            self.begin_reading(slot, now);
        }
        true
    }

    /// When guests have to be listened to again.
    pub(crate) fn claims_due(&self) -> Option<Instant> {
        self.members.iter().filter_map(|member| member.claims.as_ref()?.due()).min()
    }

    fn begin_reading(&mut self, slot: usize, now: Instant) {
        let member = self.members.at_mut(slot);
        let Some(claims) = &mut member.claims else { return };
        claims.rung.store(false, Ordering::Release);
        claims.not_before = now + SHORTEST;
        let header = claims.source.hole().guest_header();
        let news =
            |header: &GuestHeader| claims.header().is_none_or(|last| last.generation != header.generation);
        match header {
            Ok(header) if news(&header) => {
                claims.reading = Some(Reading { header, block: 0, started: now, took: Duration::ZERO });
                claims.not_before = now;
                member.space.take_census();
            }
            // It was rung for nothing, or the header does not hold still: that is like silence.
            Ok(_) | Err(Unread::Unsettled) => {
                if claims.heard.is_some_and(|heard| heard.at + heard.patience <= now) {
                    self.forget_claims(slot);
                }
            }
            Err(Unread::Absent) => self.forget_claims(slot),
        }
    }

    /// Reads the words of the next blocks that changed.
    fn read_blocks(&mut self, slot: usize, now: Instant) {
        // Time in which this thread had no processor is not the guest's.
        let started = thread_cpu();
        let member = self.members.at_mut(slot);
        let Some(claims) = &mut member.claims else { return };
        let Some(mut reading) = claims.reading.take() else { return };
        let source = Arc::clone(&claims.source);
        let hole = source.hole();
        let mut read = 0;
        let mut words = 0;
        while reading.block < hole.blocks() && read < STEP_BLOCKS {
            let block = reading.block;
            reading.block += 1;
            let counter = hole.counter(block);
            let Some(claims) = &mut member.claims else { return };
            let known = std::mem::replace(&mut claims.counters[block as usize], counter);
            // At the first pass the counter may be what it happened to be.
            if known == counter && claims.heard.is_some() {
                continue;
            }
            read += 1;
            let flags = hole.block(block);
            for (index, page, count) in ram_of_block(source.ranges(), block) {
                for (word, page) in flags[index as usize..].iter().zip(page..page + count) {
                    words += u64::from(member.hear(page, Claim::new(word.load(Ordering::Relaxed))));
                }
            }
        }
        let Some(claims) = &mut member.claims else { return };
        claims.words += words;
        reading.took += thread_cpu().saturating_sub(started);
        if reading.block < hole.blocks() {
            claims.reading = Some(reading);
            return;
        }
        claims.not_before = reading.started + SHORTEST.max(reading.took * SHARE);
        let answered = reading.header.answered;
        let first = !claims.publishing();
        let since = claims.heard.map(|heard| now.saturating_duration_since(heard.at));
        let patience = patience(&reading.header, since);
        claims.heard = Some(Heard { header: reading.header, at: now, patience });
        claims.passes += 1;
        if let Some(census) = member.space.census_mut() {
            census.elapse(now);
        }
        let Some(claims) = &mut member.claims else { return };
        if claims.passes.is_multiple_of(RETRY_PASSES) {
            claims.sweep = Some((Sweep::Retry, 0));
        }
        self.pass_was_read(slot, answered);
        if first && self.members.at(slot).types == SharedTypes::NotFile {
            // Only now is it known what may be shared.
            let member = self.members.at_mut(slot);
            let pages = member.space.pages();
            if let Some(follower) = &mut member.follower {
                follower.reset(0..pages);
            }
        }
    }

    /// Goes over the next pages.
    fn go_on_sweeping(&mut self, slot: usize, sweep: Sweep, from: u32) {
        let member = self.members.at_mut(slot);
        let pages = member.space.pages();
        let end = pages.min(from.saturating_add(STEP_PAGES));
        for page in from..end {
            match sweep {
                Sweep::Forget => {
                    member.hear(page, Claim::default());
                }
                Sweep::Retry => {
                    let free = member.claim(page).free();
                    if let Some(claims) = member.claims.as_mut().filter(|_| free) {
                        claims.offered.insert(page);
                    }
                }
            }
        }
        if let Some(claims) = &mut member.claims {
            claims.sweep = (end < pages).then_some((sweep, end));
        }
    }

    /// A guest says nothing any more: what it said holds no longer, page by page.
    fn forget_claims(&mut self, slot: usize) {
        let member = self.members.at_mut(slot);
        let Some(claims) = &mut member.claims else { return };
        if claims.heard.take().is_none() {
            return;
        }
        claims.reading = None;
        claims.giving = Giving::default();
        claims.counters.fill(0);
        claims.offered.clear();
        claims.sweep = Some((Sweep::Forget, 0));
        if let Some(census) = member.space.census_mut() {
            census.end_lending();
        }
    }
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
