//! Groups: VMs share memory only within theirs. Each has an engine of its own, with its own frames,
//! indexes and key; mappings and CPU time are budgets of the process.

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::Mutex;

use crate::blocks::limit::CacheLimit;
use crate::engine::trust::EngineLock;
use crate::engine::{Engine, Settings, Step};
use crate::frames::store::FrameStore;
use crate::inspect::statistics::EngineStatistics;
use crate::memory::calls::{Linux, MemoryCalls};
use crate::memory::uffd::UffdError;
use crate::memory::wakes::Watch;
use crate::numbers::Slot;
use crate::policy::budget::Budgets;
use crate::service::{DEFAULT_GROUP, StartError};

/// One group.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) name: String,
    pub(crate) engine: EngineLock,
    /// What was counted when it stopped.
    last: OnceLock<EngineStatistics>,
    /// It was told that it has stopped.
    pub(crate) told: AtomicBool,
    /// Threads of guests' disks that wait for the engine.
    urgent: Arc<AtomicU32>,
}

/// All groups of the process.
#[derive(Debug)]
pub(crate) struct Groups {
    settings: Settings,
    frames: u32,
    budgets: Arc<Budgets>,
    limit: Arc<CacheLimit>,
    /// Wakes writers of all groups; started with the first group that needs it.
    watch: Mutex<Option<Arc<Watch>>>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    groups: BTreeMap<String, Entry>,
    /// What was counted in groups that are gone.
    gone: EngineStatistics,
}

#[derive(Debug)]
struct Entry {
    group: Arc<Group>,
    /// VMs that are in it or about to join.
    vms: usize,
}

impl Groups {
    pub(crate) fn new(settings: Settings, frames: u32) -> Self {
        let budgets = Arc::new(Budgets::new(settings.mappings_limit));
        let limit = Arc::new(CacheLimit::new(settings.block_cache));
        Self { settings, frames, budgets, limit, watch: Mutex::default(), known: Mutex::default() }
    }

    /// The kernel's calls for one more group.
    pub(crate) fn calls(&self, store: &FrameStore) -> Result<Linux, UffdError> {
        let watch = match &mut *self.watch.lock() {
            Some(watch) => Arc::clone(watch),
            none => Arc::clone(none.insert(Arc::new(Watch::start().map_err(UffdError::Setup)?))),
        };
        Linux::open_watched(Arc::clone(store.file()), watch)
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn budgets(&self) -> &Budgets {
        &self.budgets
    }

    /// Puts a group up that uses a store and calls of the caller's.
    pub(crate) fn found(&self, name: &str, store: FrameStore, calls: Box<dyn MemoryCalls>) -> io::Result<()> {
        let engine = self.engine(store, calls)?;
        let group = Group::new(name, engine);
        self.known.lock().groups.insert(name.to_owned(), Entry { group: Arc::new(group), vms: 0 });
        Ok(())
    }

    fn engine(&self, store: FrameStore, calls: Box<dyn MemoryCalls>) -> io::Result<Engine> {
        Engine::with_budgets(&self.settings, store, calls, Arc::clone(&self.budgets), Arc::clone(&self.limit))
    }

    /// Keeps the budget of mappings and the limit on cached blocks true, while no engine is held up by it.
    pub(crate) fn look_around(&self, now: Instant) {
        self.budgets.recount();
        if self.limit.used() > 0 {
            self.limit.refresh(now);
        }
    }

    pub(crate) fn cache_limit(&self) -> &CacheLimit {
        &self.limit
    }

    /// The group of this name for one more VM. It is put up if there is none.
    pub(crate) fn join(&self, name: &str) -> Result<Arc<Group>, StartError> {
        let found = |known: &mut Known| {
            let entry = known.groups.get_mut(name)?;
            entry.vms += 1;
            Some(Arc::clone(&entry.group))
        };
        if let Some(group) = found(&mut self.known.lock()) {
            return Ok(group);
        }
        let store = FrameStore::create(self.frames).map_err(StartError::Store)?;
        let calls = self.calls(&store)?;
        let engine = self.engine(store, Box::new(calls)).map_err(StartError::Engine)?;
        let mut known = self.known.lock();
        // Another thread may have been faster.
        if let Some(group) = found(&mut known) {
            return Ok(group);
        }
        let group = Arc::new(Group::new(name, engine));
        known.groups.insert(name.to_owned(), Entry { group: Arc::clone(&group), vms: 1 });
        Ok(group)
    }

    /// A VM is gone from its group. A group without VMs is taken down, but for the default group; that is
    /// taken down as well where it has stopped, and put up anew for the next VM.
    pub(crate) fn leave(&self, group: &Group) {
        let Known { groups, gone } = &mut *self.known.lock();
        let Some(entry) = groups.get_mut(&group.name) else { return };
        entry.vms -= 1;
        let stopped = group.engine.stopped().is_some();
        if entry.vms == 0 && (group.name != DEFAULT_GROUP || stopped) {
            gone.add_counters(&group.statistics());
            // A thread may hold on to the group for a moment.
            group.engine.ask(|engine| engine.cache.leave());
            groups.remove(&group.name);
        }
    }

    pub(crate) fn all(&self) -> Vec<Arc<Group>> {
        self.known.lock().groups.values().map(|entry| Arc::clone(&entry.group)).collect()
    }

    /// The statistics of all groups together, and of each.
    pub(crate) fn statistics(&self) -> (EngineStatistics, Vec<(String, EngineStatistics)>) {
        let mut sum = self.known.lock().gone.clone();
        let mut each = Vec::new();
        for group in self.all() {
            let statistics = group.statistics();
            sum.add(&statistics);
            each.push((group.name.clone(), statistics));
        }
        // Those of the process that has the least room.
        let tightest = self.budgets.tightest();
        (sum.mappings, sum.mappings_limit) = (tightest.used(), tightest.limit());
        (sum, each)
    }
}

impl Group {
    fn new(name: &str, engine: Engine) -> Self {
        let urgent = Arc::clone(&engine.urgent);
        Self {
            name: name.to_owned(),
            engine: EngineLock::new(engine),
            last: OnceLock::new(),
            told: AtomicBool::new(false),
            urgent,
        }
    }

    /// What `work` comes to, for somebody whom a guest waits for: a step that is under way ends early. `None`
    /// where the engine has stopped, or does so by that.
    pub(crate) fn urgently<T>(&self, work: impl FnOnce(&mut Engine) -> T) -> Option<T> {
        self.urgent.fetch_add(1, Ordering::Relaxed);
        let engine = self.engine.working();
        self.urgent.fetch_sub(1, Ordering::Relaxed);
        // A panic has stopped the engine: what it left half done is not used again.
        let mut engine = engine?;
        catch_unwind(AssertUnwindSafe(move || work(&mut engine))).ok()
    }

    /// Its statistics; those of when it stopped, if it has.
    pub(crate) fn statistics(&self) -> EngineStatistics {
        let now = || self.engine.ask(|engine| engine.statistics()).unwrap_or_default();
        if self.engine.stopped().is_none() {
            return now();
        }
        EngineStatistics { groups_stopped: 1, ..self.last.get_or_init(now).clone() }
    }

    /// Lets a VM's RAM go, which no longer runs. The engine works for others meanwhile.
    ///
    /// # Errors
    /// As [`Engine::remove`].
    pub(crate) fn remove(&self, slot: Slot) -> io::Result<()> {
        let begin = || self.engine.ask(|engine| engine.begin_removal(slot));
        // Where the metadata fails at that, the VM is forgotten by another try, which does without them.
        let Some(mut removal) = begin().or_else(begin).flatten() else { return Ok(()) };
        loop {
            removal.empty()?;
            match self.engine.ask(|engine| engine.go_on_removing(&mut removal)) {
                Some(true) => {}
                Some(false) => return Ok(()),
                None => {
                    begin();
                    return Ok(());
                }
            }
        }
    }

    /// One step of its engine; `None` where it has nothing to do at all.
    pub(crate) fn step(&self, engine: &mut Engine, now: Instant) -> Option<Step> {
        (engine.busy() && engine.works()).then(|| engine.step(now))
    }
}
