//! When pages have come to rest: they are examined once after an interval without a write, and
//! pages that keep changing are looked at less and less often.
//!
//! At the end of each interval the change log is collected. A page that was armed during the
//! interval and was not written is *at rest*. A page that was written is armed again for the next
//! interval, or, if that has been in vain several times, is left alone for 2, 4, up to 128
//! intervals: meanwhile its writes cost the guest nothing.

use std::io;

use crate::changes::{ChangeLog, PageSet, ones};

/// A page of this slowness pauses for 2 to the power of 7 intervals.
const SLOWEST: u8 = 8;
/// Pages that are armed in the same interval.
const TURN_PAGES: u32 = 512;

/// Follows the changes of one VM's pages.
pub struct Tracker {
    log: Box<dyn ChangeLog>,
    /// Pages whose next write will be noted.
    armed: PageSet,
    /// Armed at the end of the last interval: at rest if they are not written in this one.
    waiting: PageSet,
    /// Pages of which a failed call may have armed some.
    again: Option<PageSet>,
    /// How often a page was written in an interval in which it was waited for, less how often not.
    slowness: Slowness,
    interval: u32,
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

/// What one interval brought. Reused from interval to interval.
#[derive(Debug, Default)]
pub struct Changes {
    /// Pages that were armed and have been written.
    pub changed: PageSet,
    /// Pages that have come to rest.
    pub rested: PageSet,
    /// Of those that changed, the ones that were waited for.
    pub restless: PageSet,
    /// What the log said; scratch space.
    written: PageSet,
    /// For who follows: pages that changed and took no memory of their own.
    pub left: PageSet,
}

impl Changes {
    /// Room for this many pages.
    #[must_use]
    pub fn new(pages: u32) -> Self {
        let set = PageSet::new(pages);
        Self {
            changed: set.clone(),
            rested: set.clone(),
            restless: set.clone(),
            written: set.clone(),
            left: set,
        }
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
            armed: set.clone(),
            waiting: set,
            again: None,
            slowness: Slowness::new(pages),
            interval: 0,
        }
    }

    /// Follows changes from now on, with no page armed, or no longer.
    ///
    /// # Errors
    /// What the log said; it is as it was.
    pub fn set_following(&mut self, following: bool) -> io::Result<()> {
        self.log.set_noting(following)?;
        self.armed.clear();
        self.waiting.clear();
        self.again = None;
        Ok(())
    }

    /// Ends an interval and begins the next. Returns whether all pages are armed that are to be; where not, they
    /// are when the next ends.
    ///
    /// # Errors
    /// What the log said. The interval then goes on, and has brought nothing so far.
    pub fn next_interval(&mut self, changes: &mut Changes) -> io::Result<bool> {
        let Changes { changed: all_changed, rested: all_rested, restless, written: all_written, .. } =
            changes;
        all_written.clear();
        self.log.collect(all_written)?;
        self.interval = self.interval.wrapping_add(1);
        let again = self.again.take();
        for index in 0..all_written.words().len() {
            let written = all_written.words()[index];
            let armed = self.armed.words()[index];
            let waiting = self.waiting.words()[index];
            // Which of them are armed nobody knows, and the log does not name those that are and were not written.
            let again = again.as_ref().map_or(0, |again| again.words()[index]);
            let changed = written & (armed | again);
            let rested = waiting & !written;
            all_changed.words_mut()[index] = changed;
            all_rested.words_mut()[index] = rested;
            restless.words_mut()[index] = changed & waiting;
            for page in ones(index, changed & waiting) {
                self.slowness.set(page, (self.slowness.get(page) + 1).min(SLOWEST));
            }
            for page in ones(index, rested) {
                self.slowness.set(page, self.slowness.get(page).saturating_sub(1));
            }
            let mut arm = again;
            for page in ones(index, written & !again) {
                let every = (1_u32 << self.slowness.get(page).saturating_sub(1)) - 1;
                // Pages of the same slowness take turns, but neighbours come to rest together.
                if self.interval.wrapping_add(page / TURN_PAGES) & every == 0 {
                    arm |= 1 << (page % 64);
                }
            }
            self.armed.words_mut()[index] = armed & !written | arm;
            self.waiting.words_mut()[index] = arm;
        }
        let armed = self.log.arm(&self.waiting).is_ok();
        if !armed {
            // To arm a page once more does no harm.
            self.again = Some(self.waiting.clone());
            for (armed, waiting) in self.armed.words_mut().iter_mut().zip(self.waiting.words_mut()) {
                *armed &= !std::mem::take(waiting);
            }
        }
        Ok(armed)
    }

    /// A page that is armed is not waited for: nobody cares when it comes to rest.
    pub fn skip(&mut self, page: u32) {
        self.waiting.remove(page);
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

    const PAGES: u32 = 200;

    /// A log that is written to by hand, counts how often each page was armed, and arms so many at most.
    #[derive(Clone)]
    struct ByHand(Arc<Mutex<(PageSet, Vec<u32>, usize)>>);

    impl ByHand {
        fn new() -> Self {
            let mut all = PageSet::new(PAGES);
            all.insert_range(0..PAGES);
            Self(Arc::new(Mutex::new((all, vec![0; PAGES as usize], usize::MAX))))
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

        fn arm(&mut self, pages: &PageSet) -> io::Result<()> {
            let mut log = self.0.lock().unwrap();
            for (index, page) in pages.iter().enumerate() {
                if index == log.2 {
                    return Err(io::ErrorKind::OutOfMemory.into());
                }
                log.0.remove(page);
                log.1[page as usize] += 1;
            }
            Ok(())
        }
    }

    fn tracker() -> (ByHand, Tracker, Changes) {
        let log = ByHand::new();
        (log.clone(), Tracker::new(Box::new(log), PAGES), Changes::new(PAGES))
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
            let armed = tracker.next_interval(&mut changes).unwrap();
            assert_eq!(armed, most >= 100);
            assert!(changes.changed.iter().eq(0..100), "those that were written, with {most} armed");
            log.0.lock().unwrap().2 = usize::MAX;
            // One that may be armed is written.
            log.write(30);
            assert!(tracker.next_interval(&mut changes).unwrap());
            assert!(changes.changed.contains(30));
            // All of them come to rest, now or later.
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
}
