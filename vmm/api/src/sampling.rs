//! Statistics for many clients from few samples.
//!
//! The time for a sample is proportional to the VMs' memory, because it reads the engine's metadata and the
//! kernel's page map. So another thread takes a sample on request, at most once in [`FRESH`]. Requests
//! meanwhile get the previous sample, unless it is older than [`STALE`]. Sampling takes at most a twentieth
//! of the time: after a slow sample, the next one comes later. If VMs have been created since the last
//! sample, the next one does not wait for [`FRESH`], so lists have no gaps.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use samepage_host::record::Record;
use samepage_host::registry::Registry;
use samepage_host::statistics::{Sample, Sampler, VmSample};

/// The time during which a sample counts as present.
const FRESH: Duration = Duration::from_secs(1);
/// The age from which a sample is not used any more.
const STALE: Duration = Duration::from_secs(5);
/// The limit for the share of time that sampling may take, as a divisor.
const SHARE: u32 = 20;
/// The longest time that a request for all VMs waits for a sample that covers new VMs.
const SAMPLE_TIMEOUT: Duration = Duration::from_secs(1);

/// The last sample, and the state of sampling.
#[derive(Debug)]
pub(super) struct Sampling {
    sampler: Sampler,
    state: Mutex<Latest>,
    seen: Notify,
}

#[derive(Debug, Default)]
struct Latest {
    seen: Option<Arc<CachedSample>>,
    error: Option<String>,
    is_sampling: bool,
}

/// A sample of the process at one moment.
#[derive(Debug)]
pub(super) struct CachedSample {
    /// The sample, with the VMs by name.
    pub(super) sample: Sample,
    at: Instant,
    took: Duration,
}

impl CachedSample {
    /// Returns the sample of one VM.
    pub(super) fn vm(&self, name: &str) -> Option<&VmSample> {
        let vms = &self.sample.vms;
        vms.binary_search_by(|vm| vm.name.as_str().cmp(name)).ok().map(|at| &vms[at])
    }

    /// Returns whether the sample covers those of these VMs that have memory.
    fn covers(&self, records: &[Arc<Record>]) -> bool {
        records.iter().all(|record| record.vm().is_none() || self.vm(record.name()).is_some())
    }

    /// Returns the time until the next sample may be taken.
    fn time_to_next(&self) -> Duration {
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
    /// Returns an object without a sample.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { sampler: Sampler::new()?, state: Mutex::default(), seen: Notify::new() })
    }

    /// Returns the last sample without waiting. Starts another one if that is not fresh.
    pub(super) fn latest(self: &Arc<Self>, registry: &Arc<Registry>) -> Option<Arc<CachedSample>> {
        let mut state = self.state.lock();
        let fresh = state.seen.as_ref().is_some_and(|seen| seen.is_fresh());
        if !fresh {
            self.begin(&mut state, registry);
        }
        state.seen.clone()
    }

    /// Starts a sample, unless one is in progress.
    fn begin(self: &Arc<Self>, state: &mut Latest, registry: &Arc<Registry>) {
        if !std::mem::replace(&mut state.is_sampling, true) {
            let (sampling, registry) = (Arc::clone(self), Arc::clone(registry));
            tokio::task::spawn_blocking(move || sampling.take_sample(&registry));
        }
    }

    /// Returns the last sample. If that is old or does not cover new VMs, waits for another one, but not
    /// longer than [`SAMPLE_TIMEOUT`].
    pub(super) async fn of(
        self: &Arc<Self>,
        records: &[Arc<Record>],
        registry: &Arc<Registry>,
    ) -> Option<Arc<CachedSample>> {
        let sampled = async {
            loop {
                let next_sample = self.seen.notified();
                tokio::pin!(next_sample);
                next_sample.as_mut().enable();
                let time_to_next = match self.latest(registry) {
                    Some(seen) if seen.covers(records) && !seen.is_stale() => return,
                    seen => seen.map_or(Duration::ZERO, |seen| seen.time_to_next()),
                };
                tokio::time::sleep(time_to_next).await;
                self.begin(&mut self.state.lock(), registry);
                next_sample.await;
                if self.state.lock().error.is_some() {
                    return;
                }
            }
        };
        // After the timeout, use the available sample.
        let _ = tokio::time::timeout(SAMPLE_TIMEOUT, sampled).await;
        self.state.lock().seen.clone()
    }

    /// Returns a recent sample.
    pub(super) async fn current(
        self: &Arc<Self>,
        registry: &Arc<Registry>,
    ) -> Result<Arc<CachedSample>, String> {
        loop {
            let next_sample = self.seen.notified();
            tokio::pin!(next_sample);
            next_sample.as_mut().enable();
            match self.latest(registry) {
                Some(seen) if !seen.is_stale() => return Ok(seen),
                _ => next_sample.await,
            }
            if let Some(error) = &self.state.lock().error {
                return Err(error.clone());
            }
        }
    }

    fn take_sample(&self, registry: &Registry) {
        /// Wakes the waiting requests, whether the sample succeeds or not.
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
                let seen = CachedSample { sample, at: Instant::now(), took: started.elapsed() };
                state.seen = Some(Arc::new(seen));
                state.error = None;
            }
            Err(error) => state.error = Some(format!("sample the VMs' memory: {error}")),
        }
    }
}
