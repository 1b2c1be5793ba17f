//! Work that follows change, for VMs with a change log: pages are looked at once after they have
//! come to rest, frames are left when their pages were written, and nothing is done otherwise.

use std::io;
use std::ops::Range;
use std::time::Instant;

use crate::changes::{ChangeLog, PageSet, RareSet};
use crate::claims::Turn;
use crate::engine::Engine;
use crate::members::{Flags, Mode};
use crate::passes::CHUNK_PAGES;
use crate::rest::Tracker;

/// To look at this many pages in the page map takes about as long as a system call.
const GAP_PAGES: u32 = 64;

/// What is known of a VM whose changes are followed.
#[derive(Debug)]
pub(crate) struct Follower {
    pub(crate) tracker: Tracker,
    /// When the interval ends.
    due: Instant,
    /// Intervals that have ended.
    pub(crate) intervals: u32,
    /// At rest, and not looked at yet.
    ready: PageSet,
    /// Looked at, and to be tried again later.
    later: PageSet,
    /// Not merged for want of mappings, to be tried again when there is more room.
    denied: RareSet,
    /// There is more room now.
    eased: bool,
    /// Pages that were denied before there was: they are ready once the interval has ended for them.
    admitted: RareSet,
    /// At rest, to be looked at when no better ones are ready anywhere.
    second: RareSet,
}

impl Follower {
    pub(crate) fn new(log: Box<dyn ChangeLog>, pages: u32) -> Self {
        let set = PageSet::new(pages);
        Self {
            tracker: Tracker::new(log, pages),
            due: Instant::now(),
            intervals: 0,
            ready: set.clone(),
            later: set,
            second: RareSet::new(pages),
            denied: RareSet::new(pages),
            eased: false,
            admitted: RareSet::new(pages),
        }
    }

    pub(crate) fn due(&self) -> Instant {
        self.due
    }

    /// A page is not merged for want of mappings.
    pub(crate) fn deny(&mut self, page: u32) {
        self.denied.insert(page);
    }

    /// A page is to be looked at once more.
    pub(crate) fn look_again(&mut self, page: u32) {
        self.ready.insert(page);
    }

    /// There is room again for what was denied: that has another try with the next interval.
    pub(crate) fn admit(&mut self) {
        self.eased = true;
    }

    /// An interval is being ended.
    pub(crate) fn begin_end(&mut self, due: Instant, written: &mut PageSet) -> io::Result<()> {
        self.due = due;
        self.tracker.begin_end(written)?;
        self.intervals = self.intervals.wrapping_add(1);
        if self.eased && self.admitted.bytes() == 0 {
            self.eased = false;
            std::mem::swap(&mut self.denied, &mut self.admitted);
        }
        Ok(())
    }

    /// The interval has ended for all pages, and the next one ends at `due`.
    pub(crate) fn ended(&mut self, due: Instant) {
        self.due = due;
        self.admitted.clear();
    }

    /// The interval has ended for some words of pages: those are ready that were admitted, and if it is time for
    /// that, those that are to be tried again.
    pub(crate) fn try_again(&mut self, words: Range<usize>, retry: bool) {
        self.admitted.move_words(words.clone(), &mut self.ready);
        if retry {
            self.ready.take_words(words, &mut self.later);
        }
    }

    /// Words of pages are at rest.
    pub(crate) fn rested(&mut self, first_word: usize, words: &[u64]) {
        self.ready.insert_words(first_word, words);
    }

    /// A page is not to be looked at before it has been written again.
    pub(crate) fn skip(&mut self, page: u32) {
        self.tracker.skip(page);
        self.drop_page(page);
    }

    /// A page is not to be looked at for now.
    pub(crate) fn drop_page(&mut self, page: u32) {
        self.ready.remove(page);
        self.second.remove(page);
        self.later.remove(page);
        self.denied.remove(page);
        self.admitted.remove(page);
    }

    /// Pages at rest that are not among the best have their turn, if there are any. None is ready.
    fn promote(&mut self) -> Option<()> {
        self.second.replace(&mut self.ready).then_some(())
    }

    /// A page is at rest.
    pub(crate) fn queue(&mut self, page: u32, turn: Turn) {
        match turn {
            Turn::First => self.ready.insert(page),
            Turn::Second => self.second.insert(page),
            Turn::Last => self.later.insert(page),
            Turn::Never => {}
        }
    }

    /// All pages are to be looked at, or none until they are written.
    pub(crate) fn reset(&mut self, pages: Range<u32>) {
        self.later.clear();
        self.denied.clear();
        self.admitted.clear();
        self.second.clear();
        self.ready.clear();
        self.ready.insert_range(pages);
    }

    /// Changes are followed from now on, all pages being new, or no longer.
    pub(crate) fn set_following(&mut self, following: bool, pages: u32) -> io::Result<()> {
        self.reset(if following { 0..pages } else { 0..0 });
        self.tracker.set_following(following)
    }

    pub(crate) fn metadata_bytes(&self) -> usize {
        let rare = [&self.second, &self.denied, &self.admitted].map(RareSet::bytes);
        self.tracker.metadata_bytes() + 2 * self.ready.bytes() + rare.iter().sum::<usize>()
    }
}

impl Engine {
    /// Pages of a range that provably have private copies leave their frames, or are zero no longer.
    pub(crate) fn release_private(&mut self, slot: usize, pages: Range<u32>) {
        let mut runs = std::mem::take(&mut self.runs);
        runs.clear();
        match self.members.at(slot).space.private(pages, &self.pagemap, &mut runs) {
            Ok(()) => runs.iter().for_each(|run| self.release(slot, run.clone())),
            // The next sweep finds them.
            Err(_) => self.counters.refusals += 1,
        }
        self.runs = runs;
    }

    /// Looks at the next pages at rest. Returns whether there were any.
    pub(crate) fn look_at_rested(&mut self) -> bool {
        let next = |slot: usize, from: u32| {
            let member = self.members.get(slot).filter(|member| member.active())?;
            let pages = member.space.pages();
            let follower = member.follower.as_ref()?;
            let start = (from < pages).then(|| follower.ready.next_from(from)).flatten()?;
            Some((slot, start, pages.min(start.saturating_add(CHUNK_PAGES))))
        };
        let (slot, page) = self.rested_cursor;
        let found =
            next(slot, page).or_else(|| self.members.slots_after(slot).find_map(|slot| next(slot, 0)));
        let Some((slot, start, end)) = found else {
            let active = self.members.iter_mut().filter(|member| member.active());
            let followers = active.filter_map(|member| member.follower.as_mut());
            if followers.filter_map(Follower::promote).count() > 0 {
                return true;
            }
            self.counters.full_scans += u64::from(std::mem::take(&mut self.looked_at_rested));
            return false;
        };
        self.looked_at_rested = true;
        let end = self.look_at_ready(slot, start..end);
        self.rested_cursor = (slot, end);
        self.store.reclaim(&*self.calls);
        true
    }

    fn next_ready(&self, slot: usize, pages: Range<u32>) -> Option<u32> {
        let member = self.members.at(slot);
        let follower = member.follower.as_ref().filter(|_| !pages.is_empty() && !member.space.lost())?;
        follower.ready.next_from(pages.start).filter(|&page| page < pages.end)
    }

    /// Looks at the pages of a chunk that are ready. Returns up to which: somebody may have waited.
    fn look_at_ready(&mut self, slot: usize, mut chunk: Range<u32>) -> u32 {
        self.learn_huge(slot, chunk.clone());
        let mut runs = std::mem::take(&mut self.runs);
        runs.clear();
        let member = self.members.at(slot);
        let Some(follower) = &member.follower else { return chunk.end };
        let mut unknown = Vec::new();
        for span in spans(follower.ready.runs_within(chunk.clone())) {
            if member.space.private(span.clone(), &self.pagemap, &mut runs).is_err() {
                self.counters.refusals += 1;
                unknown.push(span);
            }
        }
        for run in &runs {
            self.release(slot, run.clone());
            let member = self.members.at_mut(slot);
            let Some(follower) = &member.follower else { continue };
            let ready: Vec<_> = run.clone().filter(|&page| follower.ready.contains(page)).collect();
            ready.into_iter().for_each(|page| member.became_private(page));
        }
        'runs: for run in &runs {
            let mut page = run.start;
            while let Some(next) = self.next_ready(slot, page..run.end) {
                let looked = self.look_at(slot, next, run.end).max(1);
                page = next + looked;
                if self.time_to_end(looked) {
                    chunk.end = page.min(chunk.end);
                    break 'runs;
                }
            }
        }
        let member = self.members.at_mut(slot);
        let full = member.mode == Mode::Full;
        // What a guest says may change while nothing is written.
        let unlikely =
            runs.iter().cloned().flatten().filter(|&page| !member.wanted(page)).collect::<Vec<_>>();
        let passed_over = |page: u32| unlikely.binary_search(&page).is_ok();
        let Some(follower) = &mut member.follower else { return chunk.end };
        for page in runs.iter().cloned().flatten().filter(|&page| page < chunk.end) {
            let flags = member.flags[page as usize];
            let settled = flags.contains(Flags::UNIQUE) || flags.contains(Flags::ALIKE);
            let open = flags.contains(Flags::PRIVATE) && !settled;
            if open && full && !passed_over(page) && !follower.denied.contains(page) {
                follower.later.insert(page);
            }
        }
        for page in unknown.into_iter().flatten().filter(|&page| page < chunk.end) {
            if follower.ready.contains(page) {
                follower.later.insert(page);
            }
        }
        follower.ready.remove_range(chunk.clone());
        self.runs = runs;
        chunk.end
    }
}

/// Ranges that cover some runs, with short gaps closed.
pub(crate) fn spans(runs: impl Iterator<Item = Range<u32>>) -> Vec<Range<u32>> {
    let mut spans: Vec<Range<u32>> = Vec::new();
    for run in runs {
        match spans.last_mut() {
            Some(last) if run.start - last.end < GAP_PAGES => last.end = run.end,
            _ => spans.push(run),
        }
    }
    spans
}
