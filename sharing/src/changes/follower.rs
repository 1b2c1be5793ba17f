//! What is known of a VM whose changes are followed: which pages are to be scanned, and when.

use std::io;
use std::ops::Range;
use std::time::Instant;

use crate::changes::ChangeLog;
use crate::changes::rest::{Part, Tracker};
use crate::collections::sets::{PageSet, RareSet};

/// To look at this many pages in the page map takes about as long as a system call.
const GAP_PAGES: u32 = 64;

/// What is known of a VM whose changes are followed.
#[derive(Debug)]
pub(crate) struct Follower {
    tracker: Tracker,
    /// When the interval ends.
    due: Instant,
    /// The length of the interval, as a multiple of the shortest.
    stretch: u32,
    /// What has ended, in shortest intervals.
    intervals: u32,
    /// Idle, and not scanned yet.
    ready: PageSet,
    /// Scanned, and to be tried again later.
    later: PageSet,
    /// Not merged for want of mappings, to be tried again when there is more room.
    denied: RareSet,
    /// There is more room now.
    eased: bool,
    /// Pages that were denied before there was: they are ready once the interval has ended for them.
    admitted: RareSet,
    /// Idle, to be scanned when no better ones are ready anywhere.
    second: RareSet,
}

impl Follower {
    pub(crate) fn new(log: Box<dyn ChangeLog>, pages: u32) -> Self {
        let set = PageSet::new(pages);
        Self {
            tracker: Tracker::new(log, pages),
            due: Instant::now(),
            stretch: 1,
            intervals: 0,
            ready: set.clone(),
            later: set,
            second: RareSet::new(pages),
            denied: RareSet::new(pages),
            eased: false,
            admitted: RareSet::new(pages),
        }
    }

    /// Returns when the interval ends.
    pub(crate) fn due(&self) -> Instant {
        self.due
    }

    /// Whether the interval that is over next is one of those that come every so many shortest intervals.
    pub(crate) fn comes_every(&self, count: u32) -> bool {
        self.intervals % count + self.stretch >= count
    }

    /// An interval is over.
    fn count_interval(&mut self) {
        self.intervals = self.intervals.wrapping_add(self.stretch);
    }

    /// Returns the first page from one on that is idle, and not scanned yet.
    pub(crate) fn next_ready(&self, from: u32) -> Option<u32> {
        self.ready.next_from(from)
    }

    /// Returns the runs of such pages in a range.
    pub(crate) fn ready_runs(&self, pages: Range<u32>) -> impl Iterator<Item = Range<u32>> + '_ {
        self.ready.runs_within(pages)
    }

    /// Whether the page is idle, and not scanned yet.
    pub(crate) fn is_ready(&self, page: u32) -> bool {
        self.ready.contains(page)
    }

    /// A page of those that were ready is to be tried again later, unless it was denied.
    pub(crate) fn try_later(&mut self, page: u32) {
        if !self.denied.contains(page) {
            self.later.insert(page);
        }
    }

    /// Pages that were ready were scanned.
    pub(crate) fn scanned(&mut self, pages: Range<u32>) {
        self.ready.remove_range(pages);
    }

    /// Whether there are pages for which the interval has not ended yet.
    pub(crate) fn is_ending(&self) -> bool {
        self.tracker.ending()
    }

    /// Ends the interval for the next pages: see [`Tracker::end_part`].
    pub(crate) fn end_part(&mut self, written: &PageSet, most: u32, part: &mut Part) {
        self.tracker.end_part(written, most, part);
    }

    /// Returns the length of the interval, as a multiple of the shortest.
    pub(crate) fn stretch(&self) -> u32 {
        self.stretch
    }

    /// Passes over an interval that has brought nothing: all pages are idle, none waits for another try, and nobody can
    /// have written. The next one is longer, and when it ends is [set](Self::set_due) next. Returns whether it did.
    /// `since`: when the interval was over, or later.
    pub(crate) fn skip(&mut self, since: Instant, longest: u32, retry_every: u32) -> bool {
        let admits = self.admitted.bytes() > 0 || self.eased && self.denied.bytes() > 0;
        if admits || !self.tracker.is_settled() {
            return false;
        }
        let retries = self.comes_every(retry_every) && !self.later.is_empty();
        if retries || !self.tracker.is_at_rest(since) {
            return false;
        }
        self.count_interval();
        self.stretch = (2 * self.stretch).min(longest);
        true
    }

    /// A page is not merged for want of mappings.
    pub(crate) fn deny(&mut self, page: u32) {
        self.denied.insert(page);
    }

    /// A page is to be scanned once more.
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
        self.count_interval();
        if self.eased && self.admitted.bytes() == 0 {
            self.eased = false;
            std::mem::swap(&mut self.denied, &mut self.admitted);
        }
        Ok(())
    }

    /// The interval has ended for all pages. When the next one ends is [set](Self::set_due) next.
    pub(crate) fn ended(&mut self) {
        self.stretch = 1;
        self.admitted.clear();
    }

    /// The interval ends at `due`.
    pub(crate) fn set_due(&mut self, due: Instant) {
        self.due = due;
    }

    /// The interval has ended for some words of pages: those are ready that were admitted, and if it is time for
    /// that, those that are to be tried again.
    pub(crate) fn try_again(&mut self, words: Range<usize>, retry: bool) {
        self.admitted.move_words(words.clone(), &mut self.ready);
        if retry {
            self.ready.take_words(words, &mut self.later);
        }
    }

    /// Words of pages are idle.
    pub(crate) fn rested(&mut self, first_word: usize, words: &[u64]) {
        self.ready.insert_words(first_word, words);
    }

    /// A page is not to be scanned for now.
    pub(crate) fn drop_page(&mut self, page: u32) {
        self.ready.remove(page);
        self.second.remove(page);
        self.later.remove(page);
        self.denied.remove(page);
        self.admitted.remove(page);
    }

    /// Idle pages that are not among the best have their turn, if there are any. None is ready.
    pub(crate) fn promote(&mut self) -> Option<()> {
        self.second.replace(&mut self.ready).then_some(())
    }

    /// A page is idle.
    pub(crate) fn queue(&mut self, page: u32, turn: Turn) {
        match turn {
            Turn::First => self.ready.insert(page),
            Turn::Second => self.second.insert(page),
            Turn::Last => self.later.insert(page),
            Turn::Never => {}
        }
    }

    /// All pages are to be scanned, or none until they are written.
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
        self.stretch = 1;
        self.reset(if following { 0..pages } else { 0..0 });
        self.tracker.set_following(following)
    }

    pub(crate) fn metadata_bytes(&self) -> usize {
        let rare = [&self.second, &self.denied, &self.admitted].map(RareSet::bytes);
        self.tracker.metadata_bytes() + 2 * self.ready.bytes() + rare.iter().sum::<usize>()
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

/// When an idle page is scanned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Before others: its like is likely.
    First,
    /// When there are no better ones.
    Second,
    /// When it has been idle for longer.
    Last,
    /// Not before the guest says something else of it.
    Never,
}
