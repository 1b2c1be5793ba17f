//! When pages have become idle: they are examined once after an interval without a write, and
//! pages that keep changing are scanned less and less often.
//!
//! At the end of each interval the change log is collected. A page that was armed during the
//! interval and was not written is *idle*. A page that was written is armed again for the next
//! interval, or, if that has been in vain several times, is left alone for 2, 4, up to 128
//! intervals: meanwhile its writes cost the guest nothing.

use std::io;
use std::ops::Range;
use std::time::Instant;

use crate::changes::ChangeLog;
use crate::collections::sets::{PageSet, ones};

/// A page of this slowness pauses for 2 to the power of 7 intervals.
const SLOWEST: u8 = 8;
/// Pages that are armed in the same interval.
const TURN_PAGES: u32 = 512;
/// Words of 64 pages that a part has at most.
const PART_WORDS: usize = 64;

/// What it takes to look at a word of 64 pages: the unit in which the effort of a part is counted, some
/// nanoseconds.
const LOOK: u32 = 1;
/// What it takes to arm a page.
const ARM: u32 = 16;
/// What it takes to note that a page has changed, with all that follows from it.
pub(crate) const CHANGE: u32 = 512;
/// The most effort that a part takes, about half a millisecond; the 64 pages of its last word may exceed it.
pub(crate) const PART: u32 = 256 * CHANGE;

/// Follows the changes of one VM's pages.
pub struct Tracker {
    log: Box<dyn ChangeLog>,
    pages: u32,
    /// Pages whose next write will be noted.
    armed: PageSet,
    /// Armed at the end of the last interval: idle if they are not written in this one.
    waiting: PageSet,
    /// Pages of which a failed call may have armed some.
    again: Option<PageSet>,
    /// How often a page was written in an interval in which it was waited for, less how often not.
    slowness: Slowness,
    interval: u32,
    /// While an interval is being ended: the first word of pages for which it has not ended.
    next: Option<usize>,
    /// While an interval is being ended: some pages could not be armed.
    refused: bool,
    /// As far as the interval has ended: all pages are armed, and none is waited for.
    settled: bool,
}

/// A number up to 15 for each page, two in a byte.
struct Slowness(Vec<u8>);

impl Slowness {
    fn new(pages: u32) -> Self {
        Self(vec![0; (pages as usize).div_ceil(2)])
    }

    fn get(&self, page: u32) -> u8 {
        self.0[page as usize / 2] >> (page % 2 * 4) & 15
    }

    fn set(&mut self, page: u32, slowness: u8) {
        let (byte, shift) = (&mut self.0[page as usize / 2], page % 2 * 4);
        *byte = *byte & !(15 << shift) | slowness << shift;
    }
}

/// What the end of an interval brought for a part of a VM's pages. Reused from part to part.
#[derive(Debug, Default)]
pub struct Part {
    /// The words of pages for which the interval has ended, with those of which there is nothing to tell.
    pub words: Range<usize>,
    /// The first word of which there is something to tell.
    first: usize,
    changed: Vec<u64>,
    rested: Vec<u64>,
    restless: Vec<u64>,
    arm: Vec<u64>,
    /// What it took.
    pub effort: u32,
    /// Whether all pages are armed that were to be; where not, they are when the next interval ends.
    pub armed: bool,
}

impl Part {
    fn begin(&mut self, next: usize) {
        self.words = next..next;
        self.first = next;
        for words in [&mut self.changed, &mut self.rested, &mut self.restless, &mut self.arm] {
            words.clear();
        }
        self.effort = 0;
        self.armed = true;
    }

    fn pages<'a>(&self, words: &'a [u64]) -> impl Iterator<Item = u32> + use<'a> {
        let first = self.first;
        words.iter().enumerate().flat_map(move |(index, &word)| ones(first + index, word))
    }

    /// Pages that were armed and have been written.
    pub fn changed(&self) -> impl Iterator<Item = u32> + '_ {
        self.pages(&self.changed)
    }

    /// Whether a page that has changed was waited for.
    #[must_use]
    pub fn restless(&self, page: u32) -> bool {
        let word = (page as usize / 64).checked_sub(self.first).and_then(|index| self.restless.get(index));
        word.is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// Pages that have become idle.
    pub fn rested(&self) -> impl Iterator<Item = u32> + '_ {
        self.pages(&self.rested)
    }

    /// The same as words, and which is the first.
    #[must_use]
    pub fn rested_words(&self) -> (usize, &[u64]) {
        (self.first, &self.rested)
    }
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracker").field("interval", &self.interval).finish_non_exhaustive()
    }
}

impl Tracker {
    /// Follows the log of a VM of this many pages, none of which is armed yet.
    #[must_use]
    pub fn new(log: Box<dyn ChangeLog>, pages: u32) -> Self {
        let set = PageSet::new(pages);
        Self {
            log,
            pages,
            armed: set.clone(),
            waiting: set,
            again: None,
            slowness: Slowness::new(pages),
            interval: 0,
            next: None,
            refused: false,
            settled: false,
        }
    }

    /// Follows changes from now on, with no page armed, or no longer. An interval that was being ended is no more.
    ///
    /// # Errors
    /// What the log said; it is as it was.
    pub fn set_following(&mut self, following: bool) -> io::Result<()> {
        self.log.set_noting(following)?;
        self.armed.clear();
        self.waiting.clear();
        self.again = None;
        self.next = None;
        self.settled = false;
        Ok(())
    }

    /// Begins to end an interval: `written` is what the log says. One that was being ended goes on as a part of it.
    ///
    /// # Errors
    /// What the log said. The interval then goes on, and has brought nothing so far.
    pub fn begin_end(&mut self, written: &mut PageSet) -> io::Result<()> {
        written.clear();
        self.log.collect(written)?;
        self.interval = self.interval.wrapping_add(1);
        self.next = Some(0);
        self.refused = false;
        self.settled = true;
        Ok(())
    }

    /// Whether nothing can come of the next interval unless a page is written: all pages are idle.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.settled && self.next.is_none() && self.again.is_none()
    }

    /// Whether nobody can have written since the last interval began to end: see [`ChangeLog::is_at_rest`].
    pub fn is_at_rest(&mut self, since: Instant) -> bool {
        self.log.is_at_rest(since)
    }

    /// Whether an interval is being ended, of which there is more to be done.
    #[must_use]
    pub fn ending(&self) -> bool {
        self.next.is_some()
    }

    /// Ends the interval for the next pages, and begins the next one for them. Stops at the word of pages with
    /// which the effort reaches `most`. `written` is what the log said as the end began: what was written since
    /// belongs to the next interval, unless it is armed here and now.
    pub fn end_part(&mut self, written: &PageSet, most: u32, part: &mut Part) {
        let count = written.words().len();
        part.begin(self.next.unwrap_or(count));
        let most = most.min(PART);
        let mut index = part.words.start;
        while index < count && part.effort < most && part.changed.len() < PART_WORDS {
            part.effort += LOOK;
            self.end_word(index, written.words()[index], part);
            index += 1;
        }
        part.words.end = index;
        if part.arm.iter().any(|&word| word != 0) && self.log.arm(part.first, &part.arm).is_err() {
            part.armed = false;
            self.refused = true;
            // To arm a page once more does no harm.
            let again = self.again.get_or_insert_with(|| PageSet::new(self.pages));
            for (index, &arm) in (part.first..).zip(&part.arm) {
                again.words_mut()[index] |= arm;
                self.armed.words_mut()[index] &= !arm;
                self.waiting.words_mut()[index] = 0;
            }
        }
        self.next = (index < count).then_some(index);
        if self.next.is_none() && !self.refused {
            // All of them had their turn.
            self.again = None;
        }
    }

    fn end_word(&mut self, index: usize, written: u64, part: &mut Part) {
        let armed = self.armed.words()[index];
        let waiting = self.waiting.words()[index];
        // Which of them are armed nobody knows, and the log does not name those that are and were not written.
        let again = self.again.as_mut().map_or(0, |again| std::mem::take(&mut again.words_mut()[index]));
        // What is not armed counts as written, though the log forgot to say so.
        let written = written | !(armed | again) & self.all(index);
        if written | waiting | again == 0 && part.changed.is_empty() {
            part.first = index + 1;
            return;
        }
        let changed = written & (armed | again);
        let rested = waiting & !written;
        for page in ones(index, changed & waiting) {
            self.slowness.set(page, (self.slowness.get(page) + 1).min(SLOWEST));
        }
        for page in ones(index, rested) {
            self.slowness.set(page, self.slowness.get(page).saturating_sub(1));
        }
        let mut arm = again;
        for page in ones(index, written & !again) {
            let every = (1_u32 << self.slowness.get(page).saturating_sub(1)) - 1;
            // Pages of the same slowness take turns, but neighbours become idle together.
            if self.interval.wrapping_add(page / TURN_PAGES) & every == 0 {
                arm |= 1 << (page % 64);
            }
        }
        let armed = armed & !written | arm;
        self.settled &= armed == self.all(index) && arm == 0;
        self.armed.words_mut()[index] = armed;
        self.waiting.words_mut()[index] = arm;
        part.changed.push(changed);
        part.rested.push(rested);
        part.restless.push(changed & waiting);
        part.arm.push(arm);
        part.effort += arm.count_ones() * ARM + changed.count_ones() * CHANGE;
    }

    /// The pages that there are of a word.
    fn all(&self, index: usize) -> u64 {
        match self.pages - (index * 64) as u32 {
            64.. => u64::MAX,
            pages => (1 << pages) - 1,
        }
    }

    /// Bytes that following takes.
    #[must_use]
    pub fn metadata_bytes(&self) -> usize {
        self.slowness.0.len() + 2 * self.armed.bytes() + self.again.as_ref().map_or(0, PageSet::bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::collections::sets::pages_of;

    const PAGES: u32 = 200;

    /// What an interval brought.
    struct Changes {
        changed: PageSet,
        rested: PageSet,
        restless: PageSet,
    }

    impl Changes {
        fn new() -> Self {
            let set = PageSet::new(PAGES);
            Self { changed: set.clone(), rested: set.clone(), restless: set }
        }
    }

    impl Tracker {
        /// Ends an interval in the smallest parts. Returns whether all pages are armed that were to be.
        fn next_interval(&mut self, changes: &mut Changes) -> io::Result<bool> {
            let mut written = PageSet::new(PAGES);
            self.begin_end(&mut written)?;
            *changes = Changes::new();
            let (mut part, mut armed, mut words) = (Part::default(), true, 0);
            while self.ending() {
                self.end_part(&written, 1, &mut part);
                assert_eq!((part.words.start, part.words.len()), (words, 1));
                words = part.words.end;
                armed &= part.armed;
                part.changed().for_each(|page| changes.changed.insert(page));
                part.rested().for_each(|page| changes.rested.insert(page));
                let restless = part.changed().filter(|&page| part.restless(page));
                restless.for_each(|page| changes.restless.insert(page));
            }
            assert_eq!(words, PAGES.div_ceil(64) as usize);
            Ok(armed)
        }
    }

    /// What was written, how often each page was armed, how many can be, and how many were.
    type Noted = (PageSet, Vec<u32>, usize, usize);

    /// A log that is written to by hand, counts how often each page was armed, and arms so many at most.
    #[derive(Clone)]
    struct ByHand(Arc<Mutex<Noted>>);

    impl ByHand {
        fn new() -> Self {
            let mut all = PageSet::new(PAGES);
            all.insert_range(0..PAGES);
            Self(Arc::new(Mutex::new((all, vec![0; PAGES as usize], usize::MAX, 0))))
        }

        fn write(&self, page: u32) {
            self.0.lock().unwrap().0.insert(page);
        }

        fn times_armed(&self, page: u32) -> u32 {
            self.0.lock().unwrap().1[page as usize]
        }
    }

    impl ChangeLog for ByHand {
        fn collect(&mut self, written: &mut PageSet) -> io::Result<()> {
            written.words_mut().copy_from_slice(self.0.lock().unwrap().0.words());
            Ok(())
        }

        fn arm(&mut self, first: usize, words: &[u64]) -> io::Result<()> {
            let mut log = self.0.lock().unwrap();
            for page in pages_of(first, words) {
                if log.3 == log.2 {
                    return Err(io::ErrorKind::OutOfMemory.into());
                }
                log.0.remove(page);
                log.1[page as usize] += 1;
                log.3 += 1;
            }
            Ok(())
        }
    }

    fn tracker() -> (ByHand, Tracker, Changes) {
        let log = ByHand::new();
        (log.clone(), Tracker::new(Box::new(log), PAGES), Changes::new())
    }

    #[test]
    fn a_page_rests_once_after_an_interval_without_a_write() {
        let (log, mut tracker, mut changes) = tracker();
        tracker.next_interval(&mut changes).unwrap();
        assert!(changes.rested.is_empty() && changes.changed.is_empty());
        log.write(7);
        tracker.next_interval(&mut changes).unwrap();
        assert_eq!(changes.rested.count(), PAGES - 1);
        assert!(!changes.rested.contains(7) && changes.restless.contains(7));
        tracker.next_interval(&mut changes).unwrap();
        assert!(changes.rested.iter().eq([7]), "the others have been told");
        log.write(9);
        tracker.next_interval(&mut changes).unwrap();
        assert!(changes.changed.iter().eq([9]) && changes.restless.is_empty());
        tracker.next_interval(&mut changes).unwrap();
        assert!(changes.rested.iter().eq([9]));
    }

    #[test]
    fn what_an_interval_brought_is_told_though_nothing_can_be_armed() {
        // Wherever the log gives up, and whichever pages are armed before it does.
        for most in [0, 1, 50, 150] {
            let (log, mut tracker, mut changes) = tracker();
            tracker.next_interval(&mut changes).unwrap();
            tracker.next_interval(&mut changes).unwrap();
            (0..100).for_each(|page| log.write(page));
            log.0.lock().unwrap().2 = most;
            log.0.lock().unwrap().3 = 0;
            let armed = tracker.next_interval(&mut changes).unwrap();
            assert_eq!(armed, most >= 100);
            assert!(changes.changed.iter().eq(0..100), "those that were written, with {most} armed");
            log.0.lock().unwrap().2 = usize::MAX;
            // One that may be armed is written.
            log.write(30);
            assert!(tracker.next_interval(&mut changes).unwrap());
            assert!(changes.changed.contains(30));
            // All of them become idle, now or later.
            let mut rested: Vec<_> = changes.rested.iter().collect();
            for _ in 0..4 {
                tracker.next_interval(&mut changes).unwrap();
                rested.extend(changes.rested.iter());
            }
            rested.sort_unstable();
            assert_eq!(rested, (0..100).collect::<Vec<_>>(), "with {most} armed");
        }
    }

    #[test]
    fn a_page_that_keeps_changing_is_armed_ever_less_often() {
        let (log, mut tracker, mut changes) = tracker();
        for _ in 0..1000 {
            log.write(64);
            tracker.next_interval(&mut changes).unwrap();
            assert!(!changes.rested.contains(64));
        }
        assert!(log.times_armed(64) < 20, "armed {} times", log.times_armed(64));
        assert_eq!(log.times_armed(65), 1);
        let mut intervals = 0;
        while !changes.rested.contains(64) {
            tracker.next_interval(&mut changes).unwrap();
            intervals += 1;
        }
        assert!(intervals <= 130, "{intervals} intervals to rest");
    }

    #[test]
    fn a_part_is_bounded_however_much_there_is() {
        const MANY: u32 = 1 << 20;
        let mut all = PageSet::new(MANY);
        all.insert_range(0..MANY);
        let log = ByHand(Arc::new(Mutex::new((all.clone(), vec![0; MANY as usize], usize::MAX, 0))));
        let mut tracker = Tracker::new(Box::new(log.clone()), MANY);
        let (mut written, mut part) = (PageSet::new(MANY), Part::default());
        let mut parts = Vec::new();
        // All pages are armed; nothing is written; all are; none is any more.
        for round in 0..4 {
            if round == 2 {
                log.0.lock().unwrap().0.insert_range(0..MANY);
            }
            tracker.begin_end(&mut written).unwrap();
            let mut count = 0;
            let (mut changed, mut rested) = (0, 0);
            while tracker.ending() {
                let before = log.0.lock().unwrap().3;
                tracker.end_part(&written, u32::MAX, &mut part);
                let armed = log.0.lock().unwrap().3 - before;
                assert!(armed <= PART_WORDS * 64 && part.rested().count() <= PART_WORDS * 64);
                assert!(part.changed().count() <= (PART / CHANGE + 64) as usize);
                changed += part.changed().count() as u32;
                rested += part.rested().count() as u32;
                count += 1;
            }
            assert_eq!((changed, rested), [(0, 0), (0, MANY), (MANY, 0), (0, MANY)][round]);
            parts.push(count);
        }
        assert!(parts[2] >= MANY / (PART / CHANGE + 64), "{parts:?}");
        // Where there is nothing, many words are one part.
        tracker.begin_end(&mut written).unwrap();
        tracker.end_part(&written, u32::MAX, &mut part);
        assert!(!tracker.ending() && part.effort == MANY / 64);
    }

    #[test]
    fn what_is_written_while_an_interval_ends_belongs_to_the_next_or_was_armed_after() {
        let (log, mut tracker, mut changes) = tracker();
        tracker.next_interval(&mut changes).unwrap();
        tracker.next_interval(&mut changes).unwrap();
        log.write(150);
        let (mut written, mut part) = (PageSet::new(PAGES), Part::default());
        tracker.begin_end(&mut written).unwrap();
        tracker.end_part(&written, 1, &mut part);
        // Behind, and before what has ended; the last was written before as well.
        [10, 100, 150].into_iter().for_each(|page| log.write(page));
        let mut changed = Vec::new();
        while tracker.ending() {
            tracker.end_part(&written, 1, &mut part);
            changed.extend(part.changed());
        }
        assert_eq!(changed, [150]);
        tracker.next_interval(&mut changes).unwrap();
        assert!(changes.changed.iter().eq([10, 100]));
        assert!(changes.rested.iter().eq([150]), "it was armed after both writes");
        tracker.next_interval(&mut changes).unwrap();
        assert!(changes.rested.iter().eq([10, 100]));
    }

    #[test]
    fn pages_that_are_not_armed_count_as_written_though_the_log_forgets_them() {
        let (log, mut tracker, mut changes) = tracker();
        for _ in 0..20 {
            log.write(7);
            tracker.next_interval(&mut changes).unwrap();
        }
        // A device's write is told of once, and the page pauses.
        log.0.lock().unwrap().0.clear();
        let mut rested = 0;
        for _ in 0..300 {
            tracker.next_interval(&mut changes).unwrap();
            rested += u32::from(changes.rested.contains(7));
        }
        assert_eq!(rested, 1);
    }
}
