//! Mappings, a budget of each process: the kernel allows `vm.max_map_count` of them, and at
//! the limit thread creation and malloc fail as well. Merging stops at a reserve before that, and the
//! nearer it comes, the longer must a run be that is worth the mappings it needs.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

/// Mappings kept free for the process itself.
const RESERVE: u64 = 4096;
/// Mappings kept free for each VM: stacks, devices, the end of its RAM.
const RESERVE_PER_VM: u64 = 64;
/// The kernel's own default, where the setting cannot be read.
const DEFAULT_LIMIT: u64 = 65530;
/// After how many steps the process is recounted although few mappings were added.
const RECOUNT_STEPS: u32 = 4096;
/// Every run is welcome while this part of the room is left, as a divisor.
const AMPLE: u64 = 8;

/// How many mappings there are, may be, and are kept back.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    reserve: u64,
    /// The process, if it is another one.
    process: Option<u32>,
    /// Guest RAM's mappings, those of all engines.
    guest: AtomicU64,
    vms: AtomicU64,
    /// Mappings of the process beyond those that guest RAM is known to need.
    other: AtomicU64,
    /// Guest RAM's at the last count.
    counted: AtomicU64,
    steps: AtomicU32,
}

impl Budget {
    /// A budget under the kernel's limit, or under a lower one of the caller's.
    #[must_use]
    pub fn new(limit: Option<u64>) -> Self {
        let kernels = fs::read_to_string("/proc/sys/vm/max_map_count")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(DEFAULT_LIMIT);
        let limit = limit.map_or(kernels, |limit| limit.min(kernels));
        Self {
            limit,
            reserve: RESERVE.min(limit / 2),
            process: None,
            guest: AtomicU64::new(0),
            vms: AtomicU64::new(0),
            other: AtomicU64::new(0),
            counted: AtomicU64::new(0),
            steps: AtomicU32::new(u32::MAX),
        }
    }

    /// The budget of another process, under the kernel's limit.
    pub(crate) fn of(process: u32) -> Self {
        Self { process: Some(process), ..Self::new(None) }
    }

    /// The limit on mappings.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Mappings in use by the process.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.other.load(Ordering::Relaxed) + self.guest.load(Ordering::Relaxed)
    }

    /// How many more mappings merging may make.
    #[must_use]
    pub fn room(&self) -> i64 {
        self.ceiling() - self.used() as i64
    }

    /// How many mappings merging may make in all: what is left of the limit without any.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        (self.ceiling() - self.other.load(Ordering::Relaxed) as i64).max(0) as u64
    }

    fn ceiling(&self) -> i64 {
        let reserve = self.reserve + RESERVE_PER_VM * self.vms.load(Ordering::Relaxed);
        self.limit as i64 - reserve as i64
    }

    /// The shortest run that is worth two mappings: 1 page while an eighth of the room is left, then
    /// twice as long whenever half of the rest is gone.
    #[must_use]
    pub fn shortest_run(&self) -> u32 {
        let room = self.room().max(0) as u64;
        if room == 0 {
            return u32::MAX;
        }
        let ample = self.capacity() / AMPLE;
        if room >= ample { 1 } else { (ample / room + 1).next_power_of_two() as u32 }
    }

    /// The room that there should be, so that every run is welcome again.
    #[must_use]
    pub fn ample(&self) -> i64 {
        (self.capacity() / AMPLE) as i64
    }

    /// Has the mappings counted anew soon: VMs came or went.
    pub fn ask_for_recount(&self) {
        self.steps.store(u32::MAX, Ordering::Relaxed);
    }

    /// Counts the process's mappings anew where that is due: a count costs 1 µs a mapping, so it
    /// comes when a quarter of the room has been used up since the last, when it was
    /// [asked for](Self::ask_for_recount), and now and then. Nobody is to wait for it.
    ///
    /// # Errors
    /// Where `/proc` cannot be read; the old count stays.
    pub fn recount(&self) -> io::Result<()> {
        let guest = self.guest.load(Ordering::Relaxed);
        let steps = self.steps.load(Ordering::Relaxed).saturating_add(1);
        self.steps.store(steps, Ordering::Relaxed);
        let few = (self.room().max(0) as u64 / 4).max(1000);
        let changed = guest.abs_diff(self.counted.load(Ordering::Relaxed));
        let due = steps >= RECOUNT_STEPS || changed >= few;
        if due {
            self.steps.store(0, Ordering::Relaxed);
            let all = self
                .process
                .map_or_else(mappings_of_process, |process| mappings_in(&format!("/proc/{process}/maps")))?;
            self.other.store(all.saturating_sub(guest), Ordering::Relaxed);
            self.counted.store(guest, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The budgets of this process and of worker processes.
#[derive(Debug)]
pub struct Budgets {
    own: Arc<Budget>,
    /// By the numbers of the processes, as long as they have VMs.
    workers: Mutex<BTreeMap<u32, Weak<Budget>>>,
}

impl Budgets {
    /// This process has a limit of the caller's, or the kernel's. Workers have the kernel's.
    #[must_use]
    pub fn new(limit: Option<u64>) -> Self {
        Self { own: Arc::new(Budget::new(limit)), workers: Mutex::default() }
    }

    /// The budget of this process.
    #[must_use]
    pub fn own(&self) -> &Arc<Budget> {
        &self.own
    }

    /// The budget of a worker.
    #[must_use]
    pub fn of_worker(&self, process: u32) -> Arc<Budget> {
        let mut workers = self.workers.lock();
        if let Some(budget) = workers.get(&process).and_then(Weak::upgrade) {
            return budget;
        }
        workers.retain(|_, budget| budget.strong_count() > 0);
        let budget = Arc::new(Budget::of(process));
        workers.insert(process, Arc::downgrade(&budget));
        budget
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Budget>> {
        let workers = self.workers.lock();
        std::iter::once(Arc::clone(&self.own)).chain(workers.values().filter_map(Weak::upgrade)).collect()
    }

    /// Keeps all of them true. A count that failed leaves the last one in force: a worker may be gone by now.
    pub fn recount(&self) {
        self.all().iter().for_each(|budget| {
            let _ = budget.recount();
        });
    }

    /// The budget of the process that has the least room.
    #[must_use]
    pub fn tightest(&self) -> Arc<Budget> {
        let tightest = self.all().into_iter().min_by_key(|budget| budget.room());
        tightest.unwrap_or_else(|| Arc::clone(&self.own))
    }
}

/// A part of the mappings; given back when dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    mappings: u64,
    vms: u64,
}

impl Share {
    /// A part with nothing in it yet.
    #[must_use]
    pub fn new(budget: Arc<Budget>) -> Self {
        Self { budget, mappings: 0, vms: 0 }
    }

    /// The budget of the process.
    #[must_use]
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Notes how many mappings the RAM of VMs has, and how many VMs they are.
    pub fn set(&mut self, mappings: u64, vms: u64) {
        if (mappings, vms) == (self.mappings, self.vms) {
            return;
        }
        // The difference, modulo 2^64: atomics wrap around.
        self.budget.guest.fetch_add(mappings.wrapping_sub(self.mappings), Ordering::Relaxed);
        self.budget.vms.fetch_add(vms.wrapping_sub(self.vms), Ordering::Relaxed);
        (self.mappings, self.vms) = (mappings, vms);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0, 0);
    }
}

/// Counts the mappings of this process.
///
/// # Errors
/// Where `/proc/self/maps` cannot be read.
pub fn mappings_of_process() -> io::Result<u64> {
    mappings_in("/proc/self/maps")
}

fn mappings_in(path: &str) -> io::Result<u64> {
    let mut maps = BufReader::with_capacity(1 << 16, fs::File::open(path)?);
    let mut mappings = 0;
    while maps.skip_until(b'\n')? > 0 {
        mappings += 1;
    }
    Ok(mappings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_shrinks_with_the_mappings_and_vms_of_all_engines() {
        let budget = Arc::new(Budget::new(Some(20_000)));
        budget.recount().unwrap();
        let empty = budget.room();
        assert!(empty > 10_000 && empty <= 20_000 - 4096, "{empty}");
        let mut one = Share::new(Arc::clone(&budget));
        let mut other = Share::new(Arc::clone(&budget));
        one.set(100, 0);
        assert_eq!(budget.room(), empty - 100);
        other.set(50, 2);
        assert_eq!(budget.room(), empty - 150 - 128);
        one.set(20, 1);
        drop(other);
        assert_eq!(budget.room(), empty - 20 - 64);
    }

    #[test]
    fn the_shortest_run_worth_merging_grows_as_room_runs_out() {
        let budget = Arc::new(Budget::new(Some(20_000)));
        budget.recount().unwrap();
        let capacity = budget.capacity();
        let mut share = Share::new(Arc::clone(&budget));
        let mut shortest = |room: u64| {
            share.set(capacity - room, 0);
            budget.shortest_run()
        };
        let ample = capacity / AMPLE;
        assert_eq!([capacity, capacity / 2, ample + 1].map(&mut shortest), [1; 3]);
        assert_eq!([ample - 1, ample / 2 - 1, ample / 5, 1].map(&mut shortest)[..3], [2, 4, 8]);
        assert!(shortest(1) >= 1024);
        assert_eq!(shortest(0), u32::MAX);
    }

    #[test]
    fn workers_have_budgets_of_their_own() {
        let budgets = Budgets::new(Some(20_000));
        let worker = budgets.of_worker(std::process::id());
        assert!(Arc::ptr_eq(&worker, &budgets.of_worker(std::process::id())));
        budgets.recount();
        let (own, others) = (budgets.own().room(), worker.room());
        assert!(others > own, "{others} {own}");
        let mut share = Share::new(Arc::clone(&worker));
        share.set(60_000, 1);
        assert_eq!((budgets.own().room(), worker.room()), (own, others - 60_064));
        assert!(Arc::ptr_eq(&worker, &budgets.tightest()));
        drop((worker, share));
        assert_eq!(budgets.all().len(), 1);
    }

    #[test]
    fn the_limit_is_never_above_the_kernels() {
        assert_eq!(Budget::new(Some(u64::MAX)).limit(), Budget::new(None).limit());
    }
}
