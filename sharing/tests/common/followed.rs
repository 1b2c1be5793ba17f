//! Made-up VMs whose writes are logged, and time as the engine is told it.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use samepage_sharing::Slot;
use samepage_sharing::changes::{ChangeLog, PageSet, pages_of};
use samepage_sharing::engine::{Engine, Settings, Step};

use super::{Guest, losses, no_rest};

/// The engine's interval in these tests.
pub(crate) const INTERVAL: Duration = Duration::from_millis(100);

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

    /// Lets an interval pass, and more, in which there is time for a single step.
    pub(crate) fn tick(&mut self, engine: &mut Engine) {
        self.0 += 2 * INTERVAL;
        engine.step(self.0);
    }

    /// Lets an interval pass, and more, and says what time it is.
    pub(crate) fn later(&mut self) -> Instant {
        self.0 += 2 * INTERVAL;
        self.0
    }

    /// Lets intervals pass, doing all work in each and after the last.
    pub(crate) fn intervals(&mut self, engine: &mut Engine, count: u32) {
        (0..count).for_each(|_| self.end_interval(engine));
        while engine.step(self.0) == Step::Worked {}
    }
}

pub(crate) fn following() -> Settings {
    Settings { rest_ms: INTERVAL.as_millis() as u64, ..no_rest(true) }
}
