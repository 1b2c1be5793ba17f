//! Calls that fail, as often as the weather of the moment has it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use samepage_sharing::changes::{ChangeLog, PageSet};

use super::super::followed::{Resting, Told};
use super::super::{Fault, Numbers};

/// Which calls fail, by their names.
pub(crate) type Plan = Arc<Mutex<dyn FnMut(&'static str) -> Fault + Send>>;

/// A log some of whose calls fail.
pub(super) struct Moody {
    told: Resting,
    rests: bool,
    pages: u32,
    plan: Plan,
}

impl Moody {
    /// A log that may know that its VM does not run.
    pub(super) fn new(told: &Told, rests: bool, pages: u32, plan: &Plan) -> Self {
        Self { told: Resting::new(told.clone(), &Arc::default()), rests, pages, plan: Arc::clone(plan) }
    }

    fn refused(&self, call: &'static str) -> bool {
        (self.plan.lock())(call) != Fault::None
    }
}

impl ChangeLog for Moody {
    fn collect(&mut self, written: &mut PageSet) -> io::Result<()> {
        if self.refused("collect") {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.told.collect(written)
    }

    fn arm(&mut self, first: usize, words: &[u64]) -> io::Result<()> {
        if self.refused("arm") {
            // A refusal half-way leaves some armed.
            let some: Vec<u64> = words.iter().map(|word| word & 0x9249_2492_4924_9249).collect();
            self.told.arm(first, &some)?;
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.told.arm(first, words)
    }

    fn set_noting(&mut self, noting: bool) -> io::Result<()> {
        if self.refused("note") {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if noting {
            // No page is armed.
            self.told.forget(self.pages);
        }
        Ok(())
    }

    fn is_at_rest(&mut self, since: Instant) -> bool {
        self.rests && self.told.is_at_rest(since)
    }
}

/// How often calls are refused.
#[derive(Debug, Default)]
pub(crate) struct Weather {
    /// Calls out of a thousand that are refused, or fail after they unmapped.
    pub(crate) refused: AtomicU32,
    /// Calls out of a thousand that are refused where that loses memory.
    pub(crate) fatal: AtomicU32,
    /// Calls that failed so far.
    pub(crate) ever: AtomicU32,
}

/// Refuses calls as the weather is.
pub(crate) fn faults(weather: &Arc<Weather>, seed: u64) -> Plan {
    let weather = Arc::clone(weather);
    let mut luck = Numbers(seed | 1);
    Arc::new(Mutex::new(move |call| {
        let fatal = ["map again", "restore again", "unprotect"].contains(&call);
        let of_thousand = if fatal { &weather.fatal } else { &weather.refused };
        if luck.below(1000) >= u64::from(of_thousand.load(Ordering::Relaxed)) {
            return Fault::None;
        }
        weather.ever.fetch_add(1, Ordering::Relaxed);
        let tears = ["map", "restore"].contains(&call) && luck.below(2) == 0;
        if tears { Fault::Tear } else { Fault::Refuse }
    }))
}
