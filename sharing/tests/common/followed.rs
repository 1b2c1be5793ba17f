//! Made-up VMs whose writes are logged, and time as the engine is told it.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use samepage_sharing::changes::{ChangeLog, PageSet};
use samepage_sharing::engine::{Engine, Settings, Step};

use super::{Guest, losses, no_rest};

/// The engine's interval in these tests.
pub(crate) const INTERVAL: Duration = Duration::from_millis(100);

/// A log that is told of each write.
#[derive(Clone)]
pub(crate) struct Told(pub(crate) Arc<Mutex<PageSet>>);

impl ChangeLog for Told {
    fn collect(&mut self, written: &mut PageSet) -> io::Result<()> {
        written.words_mut().copy_from_slice(self.0.lock().words());
        Ok(())
    }

    fn arm(&mut self, pages: &PageSet) -> io::Result<()> {
        let mut told = self.0.lock();
        pages.iter().for_each(|page| {
            told.remove(page);
        });
        Ok(())
    }
}

pub(crate) struct Vm {
    pub(crate) guest: Guest,
    pub(crate) told: Told,
    pub(crate) slot: usize,
}

impl Vm {
    pub(crate) fn start(engine: &mut Engine, pages: u32) -> Self {
        Self::start_guest(engine, Guest::new(pages))
    }

    pub(crate) fn start_guest(engine: &mut Engine, guest: Guest) -> Self {
        let pages = guest.ram.pages();
        let mut all = PageSet::new(pages);
        all.insert_range(0..pages);
        let told = Told(Arc::new(Mutex::new(all)));
        let slot = engine.add(guest.ram.clone(), Some(Box::new(told.clone())), losses().1).unwrap();
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

    /// Lets intervals pass, doing all work in each and after the last.
    pub(crate) fn intervals(&mut self, engine: &mut Engine, count: u32) {
        (0..count).for_each(|_| self.end_interval(engine));
        while engine.step(self.0) == Step::Worked {}
    }
}

pub(crate) fn following() -> Settings {
    Settings { rest_ms: INTERVAL.as_millis() as u64, ..no_rest(true) }
}
