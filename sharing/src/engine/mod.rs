//! The engine: all VMs of a group, their frames, and the order of the work.
//!
//! Each kind of work is a task with a file of its own. `turns` shares the time among them. Pages of VMs with a
//! change log are scanned when they are idle (`scan`); VMs without one are scanned in full passes (`passes`). `merge`
//! finds what a page is merged with.

pub(crate) mod cache;
pub(crate) mod claims;
pub(crate) mod compaction;
pub mod discard;
pub(crate) mod far;
pub(crate) mod give_back;
pub(crate) mod hints;
pub mod holds;
pub(crate) mod huge;
pub(crate) mod intervals;
pub(crate) mod lost;
pub(crate) mod members;
pub(crate) mod merge;
pub(crate) mod modes;
pub(crate) mod neighbours;
pub(crate) mod passes;
pub(crate) mod reads;
pub mod removal;
pub(crate) mod scan;
pub(crate) mod tasks;
pub mod trust;
pub(crate) mod turns;
pub(crate) mod unmerge;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::blocks::CacheSize;
use crate::blocks::limit::CacheLimit;
use crate::blocks::state::CacheState;
use crate::changes::ChangeLog;
use crate::engine::holds::{Hold, Holds, Since};
use crate::engine::intervals::Ends;
pub use crate::engine::members::Mode;
use crate::engine::members::{Member, Members};
use crate::engine::passes::Pass;
use crate::engine::tasks::TASKS;
use crate::engine::trust::Stop;
use crate::engine::turns::{Kind, Turns};
use crate::frames::space::{LostHandler, Space};
use crate::frames::store::FrameStore;
pub use crate::index::Order;
use crate::index::{Effort, FrameIndex, PageIndex};
use crate::memory::calls::MemoryCalls;
use crate::memory::content::{Digester, Page};
use crate::memory::guest::{GuestMemory, Harvest};
use crate::memory::local::{Host, LocalMemory};
use crate::memory::ram::{PAGE_SIZE, Ram};
use crate::numbers::{Digest, Slot};
use crate::policy::budget::Budgets;
use crate::policy::claims::SharedTypes;
use crate::policy::compaction::Compaction;
use crate::policy::hints::{Blocks, Hints};
use crate::policy::huge::HugeRanges;
use crate::policy::pressure::Pressure;
use crate::remote::worker::{Frames, PATIENCE, Process, Worker};

/// How the engine works.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Share of one core that the sharing threads may use together, in percent.
    pub cpu_percent: f64,
    /// Compare the neighbours of a page that matched with the neighbours of what it matched, before
    /// any search. Without it every page is searched for, as KSM does.
    pub lookahead: bool,
    /// The order of the indexes.
    pub order: Order,
    /// Let effort follow change, for VMs with a change log. Without it they are scanned in full
    /// passes as well, as KSM does.
    pub follow: bool,
    /// How long a page must not have been written to count as idle, in milliseconds.
    pub rest_ms: u64,
    /// How many times as long that is at most for a VM whose vCPUs do not run: a power of two.
    pub longest_rest: u32,
    /// Without a change log: look for a page among unshared ones only when it has not changed since
    /// the last pass.
    pub settle: bool,
    /// Pause between full passes while they find something, in milliseconds.
    pub shortest_pause_ms: u64,
    /// Pause between full passes when nothing changes any more, in milliseconds.
    pub longest_pause_ms: u64,
    /// Limit on mappings, where it is to be lower than the kernel's.
    pub mappings_limit: Option<u64>,
    /// Frames that the store can hold; twice the host's memory where not given.
    pub frames: Option<u32>,
    /// Runs of disk blocks shorter than this are copied to guests, not mapped, unless that takes no
    /// mapping: see `samepage bench sharing --only delivery`.
    pub shortest_mapping: u32,
    /// How much memory disk blocks may take that no guest holds.
    pub block_cache: CacheSize,
    /// Which pages are shared, by what guests say that they are for.
    pub types: SharedTypes,
    /// Free places for frames that are always tolerated; the store is repaired when more than these and
    /// half of all places are free.
    pub few_holes: u32,
    /// Windows that one step of the repair takes at most.
    #[doc(hidden)]
    pub compaction_windows: u32,
    /// The effort of one step that ends intervals: a word of 64 pages at least.
    #[doc(hidden)]
    pub interval_effort: u32,
    /// Pages that are read at once at most, before it is known whether the first of them match.
    #[doc(hidden)]
    pub batch: u32,
    /// How long a worker may take for an answer.
    #[doc(hidden)]
    pub patience: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cpu_percent: 10.0,
            lookahead: true,
            order: Order::default(),
            follow: true,
            rest_ms: 250,
            longest_rest: 4,
            settle: true,
            shortest_pause_ms: 20,
            longest_pause_ms: 5000,
            mappings_limit: None,
            frames: None,
            shortest_mapping: 2,
            block_cache: CacheSize::default(),
            types: SharedTypes::default(),
            few_holes: 4096,
            compaction_windows: 32,
            interval_effort: intervals::STEP,
            batch: 1,
            patience: PATIENCE,
        }
    }
}

/// The time that a step takes, as far as it can end early.
const STEP: Duration = Duration::from_millis(1);

/// What a step was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Some work was done, and there may be more.
    Worked,
    /// There is nothing to do before this moment.
    RestUntil(Instant),
}

/// Counters since the start.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) full_scans: u64,
    pub(crate) scanned: u64,
    pub(crate) merges: u64,
    pub(crate) merges_lookahead: u64,
    pub(crate) merges_stable: u64,
    pub(crate) merges_unstable: u64,
    pub(crate) merges_hinted: u64,
    pub(crate) effort: Effort,
    pub(crate) digests: u64,
    pub(crate) hints: u64,
    pub(crate) unmerged: u64,
    pub(crate) compactions: u64,
    pub(crate) breaks: u64,
    pub(crate) denied: u64,
    pub(crate) refusals: u64,
    pub(crate) changes: u64,
    pub(crate) zeroed: u64,
    pub(crate) split: u64,
}

impl Counters {
    pub(crate) fn events(&self) -> u64 {
        self.merges + self.changes + self.zeroed
    }
}

/// The engine: all VMs that share, their frames, and where the pass stands.
pub struct Engine {
    /// What the half with guests' memory has in this process.
    pub(crate) host: Host,
    pub(crate) store: FrameStore,
    pub(crate) members: Members,
    /// The mappings of this process and of workers.
    pub(crate) budgets: Arc<Budgets>,
    /// Nobody else keeps the budget and the limit true.
    pub(crate) alone: bool,
    pub(crate) digester: Arc<Digester>,
    /// The digest of a page of zeros.
    pub(crate) zero_digest: Digest,
    pub(crate) settle: bool,
    follow: bool,
    patience: Duration,
    pub(crate) lookahead: bool,
    pub(crate) interval: Duration,
    pub(crate) longest_rest: u32,
    pub(crate) shortest_mapping: u32,
    pub(crate) pauses_ms: (u64, u64),
    pub(crate) stable: FrameIndex,
    /// Pages that are not shared, but for those of huge pages.
    pub(crate) unique: PageIndex,
    /// Pages of huge pages.
    pub(crate) huge_pages: PageIndex,
    /// A VM wants huge pages, or one did.
    pub(crate) any_huge: bool,
    pub(crate) blocks: Blocks,
    pub(crate) cache: CacheState,
    pub(crate) pressure: Pressure,
    pub(crate) compaction: Compaction,
    pub(crate) counters: Counters,
    pub(crate) pass: Pass,
    /// The slot and page where the scan of idle pages goes on.
    pub(crate) rested_cursor: (Slot, u32),
    pub(crate) has_scanned_rested: bool,
    pub(crate) turns: Turns,
    /// When the step that is under way is to end.
    pub(crate) step_ends: Instant,
    pub(crate) holds: Holds,
    /// How many wait for the engine that guests wait for: steps end early then.
    pub(crate) urgent: Arc<AtomicU32>,
    /// Pages scanned so far.
    pub(crate) looks: u32,
    /// Merges, and the like, that there were when the time was last thought of.
    pub(crate) events_seen: u64,
    /// Whether it can still be trusted.
    pub(crate) stop: Arc<Stop>,
    /// Losses of memory in this process up to which VMs have been looked through.
    pub(crate) losses_seen: u64,
    pub(crate) membership_changed: bool,
    // Reused from step to step.
    pub(crate) runs: Vec<std::ops::Range<u32>>,
    pub(crate) harvest: Harvest,
    pub(crate) ends: Ends,
    /// The effort of a step that ends intervals, in the unit of [`rest`](crate::changes::rest).
    pub(crate) interval_effort: u32,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("members", &self.members).finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine without VMs, the only one of its process.
    ///
    /// # Errors
    /// Fails if the page map or random numbers cannot be read.
    pub fn new(settings: &Settings, store: FrameStore, calls: Box<dyn MemoryCalls>) -> io::Result<Self> {
        let limit = Arc::new(CacheLimit::new(settings.block_cache));
        let budgets = Arc::new(Budgets::new(settings.mappings_limit));
        Ok(Self { alone: true, ..Self::with_budgets(settings, store, calls, budgets, limit)? })
    }

    /// An engine without VMs that has its part of a budget of mappings, and of the limit on cached blocks. The
    /// caller keeps both true.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub(crate) fn with_budgets(
        settings: &Settings,
        store: FrameStore,
        calls: Box<dyn MemoryCalls>,
        budgets: Arc<Budgets>,
        limit: Arc<CacheLimit>,
    ) -> io::Result<Self> {
        let host = store.host(calls.into(), settings.batch)?;
        let digester = Arc::clone(&host.digester);
        Ok(Self {
            host,
            store,
            members: Members::new(settings.types),
            budgets,
            alone: false,
            zero_digest: digester.digest(&[0; PAGE_SIZE]),
            digester,
            settle: settings.settle,
            follow: settings.follow,
            patience: settings.patience,
            lookahead: settings.lookahead,
            interval: Duration::from_millis(settings.rest_ms),
            longest_rest: settings.longest_rest.max(1),
            shortest_mapping: settings.shortest_mapping,
            pauses_ms: (settings.shortest_pause_ms, settings.longest_pause_ms),
            stable: FrameIndex::new(settings.order),
            unique: PageIndex::new(settings.order),
            huge_pages: PageIndex::new(settings.order),
            any_huge: false,
            blocks: Blocks::default(),
            cache: CacheState::new(limit)?,
            pressure: Pressure::default(),
            compaction: Compaction::new(settings.few_holes, settings.compaction_windows),
            counters: Counters::default(),
            pass: Pass::new(),
            rested_cursor: (Slot::default(), 0),
            has_scanned_rested: false,
            turns: Turns::default(),
            step_ends: Instant::now(),
            holds: Holds::default(),
            urgent: Arc::default(),
            looks: 0,
            events_seen: 0,
            stop: Arc::default(),
            losses_seen: 0,
            membership_changed: true,
            runs: Vec::new(),
            harvest: Harvest::default(),
            ends: Ends::default(),
            interval_effort: settings.interval_effort,
        })
    }

    /// Takes a VM's RAM in. `log` notes the writes to it, none of its pages being armed yet; without
    /// one the VM is scanned in full passes. `on_lost` is called when a part of it could not be
    /// kept.
    ///
    /// # Errors
    /// Fails if the RAM cannot be registered with userfaultfd, or there are too many pages in all.
    pub fn add(
        &mut self,
        ram: Arc<Ram>,
        log: Option<Box<dyn ChangeLog>>,
        on_lost: LostHandler,
    ) -> io::Result<Slot> {
        let is_huge = ram.huge();
        let memory = self.local(ram)?;
        self.add_memory(memory, is_huge, log, on_lost)
    }

    /// Takes RAM of this process under management.
    ///
    /// # Errors
    /// Fails if the RAM cannot be registered with userfaultfd.
    #[doc(hidden)]
    pub fn local(&self, ram: Arc<Ram>) -> io::Result<Arc<dyn GuestMemory>> {
        Ok(Arc::new(LocalMemory::new(ram, self.host.clone())?))
    }

    /// As [`add`](Self::add), for memory wherever it is. `is_huge` says whether huge pages are wanted for it.
    ///
    /// # Errors
    /// Fails if there are too many pages in all.
    #[doc(hidden)]
    pub fn add_memory(
        &mut self,
        memory: Arc<dyn GuestMemory>,
        is_huge: bool,
        log: Option<Box<dyn ChangeLog>>,
        on_lost: LostHandler,
    ) -> io::Result<Slot> {
        let huge = is_huge.then(|| HugeRanges::new(memory.pages(), !memory.tells_huge()));
        let space = Space::new(memory);
        self.membership_changed = true;
        self.cache.join();
        self.any_huge |= huge.is_some();
        let log = log.filter(|_| self.follow);
        if log.is_none() {
            self.pass.due = Instant::now();
        }
        let memory = space.memory();
        let budget = if memory.is_far() {
            self.budgets.of_worker(memory.process())
        } else {
            Arc::clone(self.budgets.own())
        };
        self.members.add(space, log, huge, Mode::Full, on_lost, budget)
    }

    /// Connects to a worker in another process, whose end of a [`pair`](crate::remote::worker::pair) is served. Its
    /// VMs can be [added](Self::add_memory) then.
    ///
    /// # Errors
    /// Fails if the worker is gone, does not answer, or is of another version.
    pub fn greet(&self, socket: OwnedFd, process: Process) -> io::Result<Arc<Worker>> {
        Worker::greet(socket, process, &self.frames_for_workers()?, self.patience)
    }

    /// What a worker is told of the frames.
    pub(crate) fn frames_for_workers(&self) -> io::Result<Frames> {
        let file = self.store.readable()?;
        Ok(Frames { file, capacity: self.store.capacity(), key: self.digester.key().to_vec() })
    }

    /// Where hints about a VM's pages go; `None` for a slot without a VM.
    #[must_use]
    pub fn hints(&self, slot: Slot) -> Option<Arc<Hints>> {
        self.members.get(slot).map(|member| Arc::clone(&member.hints))
    }

    /// Does the next piece of work, about a millisecond of it, or says until when there is none.
    pub fn step(&mut self, now: Instant) -> Step {
        let since = Since::now();
        self.recount();
        self.holds.note("recount of mappings", since);
        let since = Since::now();
        let (kind, step) = self.next_step(now);
        self.host.calls.wake_latecomers();
        self.holds.note(kind.map_or("looking for work", |kind| kind.task().name), since);
        step
    }

    /// What kind of work there was, if it has a turn, and what the step was.
    fn next_step(&mut self, now: Instant) -> (Option<Kind>, Step) {
        if self.retire_step() {
            return (None, Step::Worked);
        }
        if self.store.any_left() {
            self.update_cache();
        }
        for kind in self.turns.order() {
            let started = Instant::now();
            self.begin_step();
            if (kind.task().step)(self, now) {
                self.turns.served(kind, started.elapsed());
                return (Some(kind), Step::Worked);
            }
        }
        let due = TASKS.iter().filter_map(|task| (task.due)(self)).min();
        (None, Step::RestUntil(due.unwrap_or(now + Duration::from_secs(3600))))
    }

    /// The next VM in turn, after the one that this kind of work was last done for, that has such work.
    pub(crate) fn next_with_work(&mut self, kind: Kind, work: impl Fn(&Member) -> bool) -> Option<Slot> {
        let slot =
            self.members.slots_after(self.turns.slot(kind)).find(|&slot| work(self.members.at(slot)))?;
        self.turns.set_slot(kind, slot);
        Some(slot)
    }

    /// Frees memory of frames that died faster than that. Returns whether there was any.
    pub(crate) fn reclaim_step(&mut self) -> bool {
        self.store.dead() > 0 && self.store.reclaim(&*self.host.calls) > 0
    }

    /// Keeps the counts of the processes' mappings true.
    pub(crate) fn recount(&mut self) {
        let force = std::mem::take(&mut self.membership_changed);
        self.report_mappings();
        if force {
            self.budgets.all().iter().for_each(|budget| budget.ask_for_recount());
        }
        if self.alone {
            self.budgets.recount();
        }
    }

    /// Lets the budgets know how many mappings the VMs have.
    pub(crate) fn report_mappings(&mut self) {
        self.members.iter_mut().for_each(Member::report_mappings);
    }

    /// Whether there may be something to do: an engine without VMs may still cache blocks.
    pub(crate) fn busy(&self) -> bool {
        self.members.count() > 0 || self.store.dead() > 0 || self.cache_due().is_some()
    }

    /// The digest of a page under this engine's key.
    pub(crate) fn digest_of(&self, page: &Page) -> Digest {
        self.digester.digest(page)
    }

    pub(crate) fn shortest_run(&self) -> u32 {
        self.budgets.own().shortest_run().max(self.pressure.floor())
    }

    pub(crate) fn metadata_bytes(&self) -> usize {
        self.store.metadata_bytes()
            + self.blocks.bytes()
            + self.cache.bytes()
            + self.ends.bytes()
            + self.stable.bytes()
            + self.unique.bytes()
            + self.huge_pages.bytes()
            + self.members.iter().map(Member::metadata_bytes).sum::<usize>()
    }

    /// For how long this engine was kept from others at a time since the last call, by what it did.
    pub fn take_holds(&self) -> BTreeMap<&'static str, Hold> {
        self.holds.take()
    }

    /// Whether a step has taken its time, or a guest waits for the engine: it is to end.
    pub(crate) fn spent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed) > 0 || Instant::now() >= self.step_ends
    }

    /// A step begins.
    pub(crate) fn begin_step(&mut self) {
        self.step_ends = Instant::now() + STEP;
    }
}
