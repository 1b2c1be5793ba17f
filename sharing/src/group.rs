//! Groups: VMs share memory only within theirs. Each has an engine of its own, with its own frames,
//! indexes and key; mappings and CPU time are budgets of the process.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::budget::Budget;
use crate::calls::{Linux, MemoryCalls};
use crate::engine::{Engine, Settings, Step};
use crate::service::{DEFAULT_GROUP, StartError};
use crate::statistics::EngineStatistics;
use crate::store::FrameStore;

/// One group.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) name: String,
    pub(crate) engine: Mutex<Engine>,
}

/// All groups of the process.
#[derive(Debug)]
pub(crate) struct Groups {
    settings: Settings,
    frames: u32,
    budget: Arc<Budget>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    groups: BTreeMap<String, Arc<Group>>,
    /// What was counted in groups that are gone.
    gone: EngineStatistics,
}

impl Groups {
    pub(crate) fn new(settings: Settings, frames: u32) -> Self {
        let budget = Arc::new(Budget::new(settings.mappings_limit));
        Self { settings, frames, budget, known: Mutex::default() }
    }

    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Puts a group up that uses a store and calls of the caller's.
    pub(crate) fn found(&self, name: &str, store: FrameStore, calls: Box<dyn MemoryCalls>) -> io::Result<()> {
        let engine = Engine::with_budget(&self.settings, store, calls, Arc::clone(&self.budget))?;
        let group = Group { name: name.to_owned(), engine: Mutex::new(engine) };
        self.known.lock().groups.insert(name.to_owned(), Arc::new(group));
        Ok(())
    }

    /// The group of this name, which is put up if there is none.
    pub(crate) fn join(&self, name: &str) -> Result<Arc<Group>, StartError> {
        if let Some(group) = self.known.lock().groups.get(name) {
            return Ok(Arc::clone(group));
        }
        let store = FrameStore::create(self.frames).map_err(StartError::Store)?;
        let calls = Linux::open(Arc::clone(store.file()))?;
        let engine = Engine::with_budget(&self.settings, store, Box::new(calls), Arc::clone(&self.budget))
            .map_err(StartError::Engine)?;
        let group = Arc::new(Group { name: name.to_owned(), engine: Mutex::new(engine) });
        // Another thread may have been faster.
        Ok(Arc::clone(self.known.lock().groups.entry(name.to_owned()).or_insert(group)))
    }

    /// Takes groups down that nobody is in or about to join, but for the default group.
    pub(crate) fn prune(&self) {
        let Known { groups, gone } = &mut *self.known.lock();
        groups.retain(|name, group| {
            if name == DEFAULT_GROUP {
                return true;
            }
            // Whoever joins holds the group.
            let Some(engine) = (Arc::strong_count(group) == 1).then(|| group.engine.lock()) else {
                return true;
            };
            let used = engine.members.count() > 0;
            if !used {
                gone.add_counters(&engine.statistics());
            }
            used
        });
    }

    pub(crate) fn all(&self) -> Vec<Arc<Group>> {
        self.known.lock().groups.values().cloned().collect()
    }

    /// The statistics of all groups together, and of each.
    pub(crate) fn statistics(&self) -> (EngineStatistics, Vec<(String, EngineStatistics)>) {
        let mut sum = self.known.lock().gone.clone();
        let mut each = Vec::new();
        for group in self.all() {
            let statistics = group.engine.lock().statistics();
            sum.add(&statistics);
            each.push((group.name.clone(), statistics));
        }
        sum.mappings = self.budget.used();
        sum.mappings_limit = self.budget.limit();
        (sum, each)
    }
}

impl Group {
    /// One step of its engine; `None` where it has nothing to do at all.
    pub(crate) fn step(&self, engine: &mut Engine, now: Instant) -> Option<Step> {
        (engine.members.count() > 0).then(|| engine.step(now))
    }
}
