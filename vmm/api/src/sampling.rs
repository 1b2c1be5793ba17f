//! Statistics for many clients from few looks at the memory.
//!
//! To look at a VM takes time in proportion to its memory (the engine's books and the kernel's page map
//! are gone through), so this is done at most once in [`FRESH`], only when somebody asks, and by another
//! thread. Who asks meanwhile gets what is there unless that is older than [`STALE`]. A look takes a
//! twentieth of the time at most: where it takes long, the next one comes later. VMs that were made since the
//! last look are looked at without the wait of [`FRESH`], so that lists have no gaps.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use samepage_host::record::Record;
use samepage_host::registry::Registry;
use samepage_host::statistics::{Sample, Sampler, VmSample};

/// For how long what was seen counts as what is.
const FRESH: Duration = Duration::from_secs(1);
/// After how long nobody is given it any more.
const STALE: Duration = Duration::from_secs(5);
/// The part of the time that looks may take, as a divisor.
const SHARE: u32 = 20;
/// How long who asks for all VMs waits until those are looked at that have just been made.
const PATIENCE: Duration = Duration::from_secs(1);

/// What was seen last, and who looks.
#[derive(Debug)]
pub(super) struct Sampling {
    sampler: Sampler,
    state: Mutex<Latest>,
    seen: Notify,
}

#[derive(Debug, Default)]
struct Latest {
    seen: Option<Arc<Seen>>,
    error: Option<String>,
    is_sampling: bool,
}

/// The process at one moment.
#[derive(Debug)]
pub(super) struct Seen {
    /// What was seen, with the VMs by name.
    pub(super) sample: Sample,
    at: Instant,
    took: Duration,
}

impl Seen {
    /// What was seen of one VM.
    pub(super) fn vm(&self, name: &str) -> Option<&VmSample> {
        let vms = &self.sample.vms;
        vms.binary_search_by(|vm| vm.name.as_str().cmp(name)).ok().map(|at| &vms[at])
    }

    /// Whether it tells of these VMs, as far as they have memory.
    fn tells_of(&self, records: &[Arc<Record>]) -> bool {
        records.iter().all(|record| record.vm().is_none() || self.vm(record.name()).is_some())
    }

    /// How long it still is until there may be another look.
    fn rest(&self) -> Duration {
        (self.took * SHARE).saturating_sub(self.at.elapsed())
    }

    fn is_fresh(&self) -> bool {
        self.at.elapsed() < FRESH.max(self.took * SHARE)
    }

    fn is_stale(&self) -> bool {
        self.at.elapsed() > STALE.max(2 * SHARE * self.took)
    }
}

impl Sampling {
    /// Nothing has been seen yet.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { sampler: Sampler::new()?, state: Mutex::default(), seen: Notify::new() })
    }

    /// What was seen last, without any wait; and has it looked again where that is not fresh.
    pub(super) fn latest(self: &Arc<Self>, registry: &Arc<Registry>) -> Option<Arc<Seen>> {
        let mut state = self.state.lock();
        let fresh = state.seen.as_ref().is_some_and(|seen| seen.is_fresh());
        if !fresh {
            self.begin(&mut state, registry);
        }
        state.seen.clone()
    }

    /// Has somebody look, unless somebody does.
    fn begin(self: &Arc<Self>, state: &mut Latest, registry: &Arc<Registry>) {
        if !std::mem::replace(&mut state.is_sampling, true) {
            let (sampling, registry) = (Arc::clone(self), Arc::clone(registry));
            tokio::task::spawn_blocking(move || sampling.look(&registry));
        }
    }

    /// What was seen last. Where that is old or does not tell of VMs that have just been made, another look is waited for,
    /// as long as that does not take long.
    pub(super) async fn of(
        self: &Arc<Self>,
        records: &[Arc<Record>],
        registry: &Arc<Registry>,
    ) -> Option<Arc<Seen>> {
        let looked_at = async {
            loop {
                let seen_again = self.seen.notified();
                tokio::pin!(seen_again);
                seen_again.as_mut().enable();
                let rest = match self.latest(registry) {
                    Some(seen) if seen.tells_of(records) && !seen.is_stale() => return,
                    seen => seen.map_or(Duration::ZERO, |seen| seen.rest()),
                };
                tokio::time::sleep(rest).await;
                self.begin(&mut self.state.lock(), registry);
                seen_again.await;
                if self.state.lock().error.is_some() {
                    return;
                }
            }
        };
        // Who has waited long enough gets what there is.
        let _ = tokio::time::timeout(PATIENCE, looked_at).await;
        self.state.lock().seen.clone()
    }

    /// What was seen a short while ago.
    pub(super) async fn current(self: &Arc<Self>, registry: &Arc<Registry>) -> Result<Arc<Seen>, String> {
        loop {
            let seen_again = self.seen.notified();
            tokio::pin!(seen_again);
            seen_again.as_mut().enable();
            match self.latest(registry) {
                Some(seen) if !seen.is_stale() => return Ok(seen),
                _ => seen_again.await,
            }
            if let Some(error) = &self.state.lock().error {
                return Err(error.clone());
            }
        }
    }

    fn look(&self, registry: &Registry) {
        /// Somebody waits, whatever becomes of the look.
        struct Done<'a>(&'a Sampling);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.state.lock().is_sampling = false;
                self.0.seen.notify_waiters();
            }
        }
        let _done = Done(self);
        let started = Instant::now();
        let sample = registry.sample(&self.sampler, &registry.list());
        let mut state = self.state.lock();
        match sample {
            Ok(sample) => {
                let seen = Seen { sample, at: Instant::now(), took: started.elapsed() };
                state.seen = Some(Arc::new(seen));
                state.error = None;
            }
            Err(error) => state.error = Some(format!("look at the VMs' memory: {error}")),
        }
    }
}
