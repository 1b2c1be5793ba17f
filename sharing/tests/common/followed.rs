//! Made-up VMs whose writes are logged, and time as the engine is told it.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use samepage_sharing::Slot;
use samepage_sharing::changes::{ChangeLog, PageSet, pages_of};
use samepage_sharing::engine::{Engine, Settings, Step};

use super::{Guest, losses, no_rest};

/// The engine's interval in these tests.
pub(crate) const INTERVAL: Duration = Duration::from_millis(100);
/// The longest interval of a VM that does not run, where that is longer.
pub(crate) const LONGEST: Duration = Duration::from_millis(400);

/// A log that arms only half of what it is to arm, and says so, while that is to be refused.
struct Unsure(Told, Arc<AtomicBool>);

impl ChangeLog for Unsure {
    fn collect(&mut self, written: &mut PageSet) -> io::Result<()> {
        self.0.collect(written)
    }

    fn arm(&mut self, first: usize, words: &[u64]) -> io::Result<()> {
        if !self.1.load(Ordering::Relaxed) {
            return self.0.arm(first, words);
        }
        let half: Vec<_> = words.iter().map(|word| word & 0xffff_ffff).collect();
        self.0.arm(first, &half)?;
        Err(io::ErrorKind::OutOfMemory.into())
    }
}

/// A log that is told of each write.
#[derive(Clone)]
pub(crate) struct Told(pub(crate) Arc<Mutex<PageSet>>);

impl ChangeLog for Told {
    fn collect(&mut self, written: &mut PageSet) -> io::Result<()> {
        written.words_mut().copy_from_slice(self.0.lock().words());
        Ok(())
    }

    fn arm(&mut self, first: usize, words: &[u64]) -> io::Result<()> {
        let mut told = self.0.lock();
        pages_of(first, words).for_each(|page| {
            told.remove(page);
        });
        Ok(())
    }
}

/// A log that knows whether anything was written since it was last read, and counts how often it is read.
pub(crate) struct Resting {
    told: Told,
    /// What it said, but for what was armed since. Nothing where it was not read.
    seen: Option<PageSet>,
    readings: Arc<AtomicU32>,
}

impl Resting {
    pub(crate) fn new(told: Told, readings: &Arc<AtomicU32>) -> Self {
        Self { told, seen: None, readings: Arc::clone(readings) }
    }

    /// No page is armed any more.
    pub(crate) fn forget(&mut self, pages: u32) {
        self.told.0.lock().insert_range(0..pages);
        self.seen = None;
    }
}

impl ChangeLog for Resting {
    fn collect(&mut self, written: &mut PageSet) -> io::Result<()> {
        self.readings.fetch_add(1, Ordering::Relaxed);
        self.told.collect(written)?;
        self.seen = Some(written.clone());
        Ok(())
    }

    fn arm(&mut self, first: usize, words: &[u64]) -> io::Result<()> {
        if let Some(seen) = &mut self.seen {
            pages_of(first, words).for_each(|page| {
                seen.remove(page);
            });
        }
        self.told.arm(first, words)
    }

    fn is_at_rest(&mut self, _since: Instant) -> bool {
        self.seen.as_ref().is_some_and(|seen| seen.words() == self.told.0.lock().words())
    }
}

pub(crate) struct Vm {
    pub(crate) guest: Guest,
    pub(crate) told: Told,
    pub(crate) slot: Slot,
}

impl Vm {
    pub(crate) fn start(engine: &mut Engine, pages: u32) -> Self {
        Self::start_guest(engine, Guest::new(pages))
    }

    pub(crate) fn start_guest(engine: &mut Engine, guest: Guest) -> Self {
        Self::start_with(engine, guest, |told| Box::new(told))
    }

    /// One whose log does not arm all pages while that is to be refused.
    pub(crate) fn unsure(engine: &mut Engine, pages: u32, refuse: &Arc<AtomicBool>) -> Self {
        let refuse = Arc::clone(refuse);
        Self::start_with(engine, Guest::new(pages), |told| Box::new(Unsure(told, refuse)))
    }

    /// One whose log knows that it does not run.
    pub(crate) fn resting(engine: &mut Engine, pages: u32, readings: &Arc<AtomicU32>) -> Self {
        Self::start_with(engine, Guest::new(pages), |told| Box::new(Resting::new(told, readings)))
    }

    fn start_with(engine: &mut Engine, guest: Guest, log: impl FnOnce(Told) -> Box<dyn ChangeLog>) -> Self {
        let pages = guest.ram.pages();
        let mut all = PageSet::new(pages);
        all.insert_range(0..pages);
        let told = Told(Arc::new(Mutex::new(all)));
        let slot = engine.add(guest.ram.clone(), Some(log(told.clone())), losses().1).unwrap();
        Self { guest, told, slot }
    }

    pub(crate) fn write(&self, page: u32, seed: u64) {
        self.guest.write(page, seed);
        self.told.0.lock().insert(page);
    }
}

/// Time as the engine is told it.
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn new() -> Self {
        Self(Instant::now() + Duration::from_secs(1))
    }

    /// Does all work there is now, and ends the interval.
    pub(crate) fn end_interval(&mut self, engine: &mut Engine) {
        self.0 = loop {
            if let Step::RestUntil(end) = engine.step(self.0) {
                break end;
            }
        };
    }

    /// Lets so much time pass, doing all work that comes. Returns how many times there was some.
    pub(crate) fn end_within(&mut self, engine: &mut Engine, time: Duration) -> u32 {
        let end = self.0 + time;
        let mut rests = 0;
        loop {
            match engine.step(self.0) {
                Step::RestUntil(due) if due > end => break,
                Step::RestUntil(due) => {
                    rests += 1;
                    self.0 = due;
                }
                Step::Worked => {}
            }
        }
        self.0 = end;
        rests
    }

    /// Lets an interval of any length pass, and more, in which there is time for a single step.
    pub(crate) fn tick(&mut self, engine: &mut Engine) {
        let now = self.later();
        engine.step(now);
    }

    /// Lets an interval of any length pass, and more, and says what time it is.
    pub(crate) fn later(&mut self) -> Instant {
        self.0 += 2 * LONGEST;
        self.0
    }

    /// Lets intervals pass, doing all work in each and after the last.
    pub(crate) fn intervals(&mut self, engine: &mut Engine, count: u32) {
        (0..count).for_each(|_| self.end_interval(engine));
        while engine.step(self.0) == Step::Worked {}
    }
}

pub(crate) fn following() -> Settings {
    Settings { rest_ms: INTERVAL.as_millis() as u64, longest_rest: 1, ..no_rest(true) }
}

/// The same with longer intervals of VMs that do not run.
pub(crate) fn stretching() -> Settings {
    Settings { longest_rest: 4, ..following() }
}
