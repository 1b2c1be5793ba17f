//! samepage's side: an engine on made-up VMs, driven step by step on this thread, so that its CPU time
//! is the thread's.
//!
//! The engine follows the VMs' logs of changes, as it does for VMs that run. Its intervals end when
//! there is nothing left to do: time is made up, no time passes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use samepage_sharing::calls::Linux;
use samepage_sharing::changes::ChangeLog;
use samepage_sharing::engine::{Engine, Settings, Step};
use samepage_sharing::statistics::EngineStatistics;
use samepage_sharing::store::FrameStore;

use super::context::Bench;
use super::cpu;
use super::memory::Memory;

/// Frames that the store of a benchmark can hold: 4 GiB.
const FRAMES: u32 = 1 << 20;
/// Intervals after which nothing more is waited for. Pages that were written often are armed in every
/// 128th interval alone.
const PATIENCE: u32 = 300;

/// An engine and its VMs.
pub(super) struct Ours {
    engine: Engine,
    now: Instant,
    lost: Arc<AtomicBool>,
}

impl Ours {
    /// An engine that knows these VMs and has not looked at them.
    pub(super) fn new(settings: &Settings, vms: &[Memory]) -> Result<Self> {
        let store = FrameStore::create(FRAMES).context("create the frame store")?;
        let calls = Linux::open(Arc::clone(store.file())).context("open the kernel's calls")?;
        let engine = Engine::new(settings, store, Box::new(calls)).context("make an engine")?;
        let mut ours = Self { engine, now: Instant::now(), lost: Arc::default() };
        ours.add(vms)?;
        Ok(ours)
    }

    /// More VMs, which the engine has not looked at.
    ///
    /// # Errors
    /// Where their memory cannot be shared.
    pub(super) fn add(&mut self, vms: &[Memory]) -> Result<()> {
        for vm in vms {
            let lost = Arc::clone(&self.lost);
            let log: Box<dyn ChangeLog> = Box::new(vm.log());
            self.engine
                .add(vm.ram(), Some(log), Box::new(move |_| lost.store(true, Ordering::Relaxed)))
                .context("share memory")?;
        }
        Ok(())
    }

    /// Lets the engine work until this many pages are merged, and it has looked at this many, and returns
    /// its CPU time.
    ///
    /// # Errors
    /// As [`work_until`](Self::work_until).
    pub(super) fn merge(&mut self, bench: &Bench, pages: u64, of: u64) -> Result<Duration> {
        self.work_until(bench, |now| {
            let merged = now.pages_shared + now.pages_sharing;
            merged >= pages && merged + now.pages_unshared >= of
        })
    }

    /// Lets the engine work until `done` holds, which is asked after each interval, and returns its CPU time.
    ///
    /// # Errors
    /// Where that does not come to pass, or the benchmark was interrupted.
    pub(super) fn work_until(
        &mut self,
        bench: &Bench,
        mut done: impl FnMut(&EngineStatistics) -> bool,
    ) -> Result<Duration> {
        let mut used = Duration::ZERO;
        for _ in 0..PATIENCE {
            used += self.interval(bench)?;
            if done(&self.engine.statistics()) {
                return Ok(used);
            }
        }
        let statistics = self.engine.statistics();
        anyhow::bail!("the engine does not get there: {statistics:?}")
    }

    /// Lets the engine work until it rests.
    ///
    /// # Errors
    /// Where the benchmark was interrupted.
    pub(super) fn interval(&mut self, bench: &Bench) -> Result<Duration> {
        let mut used = Duration::ZERO;
        loop {
            if let Some(until) = self.step(bench, &mut used)? {
                self.now = until;
                return Ok(used);
            }
        }
    }

    /// Lets time pass, in which the engine may use `most` of CPU time; returns what it did use, which may be
    /// a step more.
    ///
    /// # Errors
    /// Where the benchmark was interrupted.
    pub(super) fn work_for(&mut self, bench: &Bench, time: Duration, most: Duration) -> Result<Duration> {
        let end = self.now + time;
        let mut used = Duration::ZERO;
        while used < most && self.now < end {
            let rest = self.step(bench, &mut used)?;
            self.now = rest.unwrap_or(self.now);
        }
        self.now = self.now.max(end);
        Ok(used)
    }

    /// Takes a step. Returns until when there is nothing more to do.
    fn step(&mut self, bench: &Bench, used: &mut Duration) -> Result<Option<Instant>> {
        let (step, time) = cpu::of(|| self.engine.step(self.now));
        *used += time;
        bench.check()?;
        ensure!(!self.lost.load(Ordering::Relaxed), "memory of a VM was lost");
        Ok(match step {
            Step::Worked => None,
            Step::RestUntil(until) => Some(until),
        })
    }

    pub(super) fn statistics(&self) -> EngineStatistics {
        self.engine.statistics()
    }
}
