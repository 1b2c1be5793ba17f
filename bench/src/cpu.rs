//! CPU time.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Returns the CPU time of this thread so far.
pub(super) fn of_this_thread() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Returns the CPU time of this process so far.
pub(super) fn of_this_process() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Returns the CPU time of a piece of work on this thread.
pub(super) fn of<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let before = of_this_thread();
    let result = work();
    (result, of_this_thread().saturating_sub(before))
}

/// Returns a time divided by a number of things, in microseconds.
pub(super) fn micros_each(time: Duration, things: u64) -> f64 {
    time.as_secs_f64() * 1e6 / things.max(1) as f64
}
