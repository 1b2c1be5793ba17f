//! For how long the engine was kept from others, by what it did: nobody else gets at an engine meanwhile, not
//! even a guest that waits for its disk.

#![expect(unsafe_code, reason = "reads the CPU clock of a thread")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

/// How long one kind of work took in one go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Hold {
    /// The longest.
    pub longest: Duration,
    /// The most CPU time that one took: less than the longest where the thread lost its processor or waited for
    /// the kernel.
    pub cpu: Duration,
    /// How often it was done.
    pub times: u64,
}

/// When work began, by the clock and by the thread's CPU time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Since(Instant, Duration);

impl Since {
    pub(crate) fn now() -> Self {
        Self(Instant::now(), thread_cpu())
    }
}

/// All kinds of work, by name.
#[derive(Debug, Default)]
pub(crate) struct Holds(Mutex<BTreeMap<&'static str, Hold>>);

impl Holds {
    /// Work of a kind that began at `since` has ended.
    pub(crate) fn note(&self, what: &'static str, since: Since) {
        let (took, cpu) = (since.0.elapsed(), thread_cpu().saturating_sub(since.1));
        let mut holds = self.0.lock();
        let hold = holds.entry(what).or_default();
        hold.longest = hold.longest.max(took);
        hold.cpu = hold.cpu.max(cpu);
        hold.times += 1;
    }

    /// What was noted since the last call.
    pub(crate) fn take(&self) -> BTreeMap<&'static str, Hold> {
        std::mem::take(&mut *self.0.lock())
    }
}

/// CPU time that this thread has used.
pub(crate) fn thread_cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec that is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
