//! samepage's side: an engine on synthetic VMs. It runs step by step on this thread, so its CPU time is the
//! thread's.
//!
//! The engine follows the VMs' change logs, as for running VMs. Its intervals end when there is nothing left
//! to do: time is simulated.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use samepage_sharing::calls::Linux;
use samepage_sharing::changes::ChangeLog;
use samepage_sharing::engine::{Engine, Settings, Step};
use samepage_sharing::remote::worker::{Process, VmIndex, Worker};
use samepage_sharing::space::SpaceError;
use samepage_sharing::statistics::EngineStatistics;
use samepage_sharing::store::FrameStore;

use super::context::Bench;
use super::cpu;
use super::memory::Memory;

/// Number of frames that a benchmark's store can hold: 4 GiB.
const FRAMES: u32 = 1 << 20;
/// Limit for the number of intervals. Pages that were written often are armed only in every 128th interval.
const INTERVAL_LIMIT: u32 = 300;

/// An engine and its VMs.
pub(super) struct Ours {
    engine: Engine,
    now: Instant,
    lost: Arc<AtomicBool>,
}

impl Ours {
    /// Returns an engine that knows these VMs and has not scanned them.
    pub(super) fn new(settings: &Settings, vms: &[Memory]) -> Result<Self> {
        let store = FrameStore::create(FRAMES).context("create the frame store")?;
        let calls = Linux::open(Arc::clone(store.file())).context("open the kernel's calls")?;
        let engine = Engine::new(settings, store, Box::new(calls)).context("make an engine")?;
        let mut ours = Self { engine, now: Instant::now(), lost: Arc::default() };
        ours.add(vms)?;
        Ok(ours)
    }

    /// Adds VMs that the engine has not scanned.
    ///
    /// # Errors
    /// Fails if their memory cannot be shared.
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

    /// Connects to a worker in another process.
    ///
    /// # Errors
    /// Fails if the worker does not answer.
    pub(super) fn greet(&self, socket: OwnedFd, process: Process) -> Result<Arc<Worker>> {
        self.engine.greet(socket, process).context("greet a worker")
    }

    /// Adds the first VMs of a worker.
    ///
    /// # Errors
    /// Fails if the worker has fewer.
    pub(super) fn add_workers(&mut self, worker: &Arc<Worker>, vms: u32) -> Result<()> {
        for vm in 0..vms {
            let vm = worker.vm(VmIndex::new(vm)).context("ask a worker for its VM")?;
            let lost = Arc::clone(&self.lost);
            let on_lost = Box::new(move |_: &SpaceError| lost.store(true, Ordering::Relaxed));
            self.engine.add_memory(vm.memory, vm.is_huge, vm.log, on_lost).context("share memory")?;
        }
        Ok(())
    }

    /// Runs the engine until this many pages are merged and this many are scanned. Returns its CPU time.
    ///
    /// # Errors
    /// Fails like [`work_until`](Self::work_until).
    pub(super) fn merge(&mut self, bench: &Bench, pages: u64, of: u64) -> Result<Duration> {
        self.work_until(bench, |now| {
            let merged = now.pages_shared + now.pages_sharing;
            merged >= pages && merged + now.pages_unshared >= of
        })
    }

    /// Runs the engine until `done` returns true. `done` is called after each interval. Returns the CPU time.
    ///
    /// # Errors
    /// Fails if `done` never returns true, or if the benchmark is interrupted.
    pub(super) fn work_until(
        &mut self,
        bench: &Bench,
        mut done: impl FnMut(&EngineStatistics) -> bool,
    ) -> Result<Duration> {
        let mut used = Duration::ZERO;
        for _ in 0..INTERVAL_LIMIT {
            used += self.interval(bench)?;
            if done(&self.engine.statistics()) {
                return Ok(used);
            }
        }
        let statistics = self.engine.statistics();
        anyhow::bail!("the engine does not get there: {statistics:?}")
    }

    /// Runs the engine until it is idle.
    ///
    /// # Errors
    /// Fails if the benchmark is interrupted.
    pub(super) fn interval(&mut self, bench: &Bench) -> Result<Duration> {
        let mut used = Duration::ZERO;
        loop {
            if let Some(until) = self.step(bench, &mut used)? {
                self.now = until;
                return Ok(used);
            }
        }
    }

    /// Lets time pass, in which the engine may use `most` of CPU time. Returns the used CPU time, which may
    /// be longer by a step.
    ///
    /// # Errors
    /// Fails if the benchmark is interrupted.
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

    /// Runs a step. Returns the time until which there is nothing more to do.
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
