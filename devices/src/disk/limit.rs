//! Limits for a disk: bytes and operations per second.
//!
//! Each limit is a token bucket. A full bucket holds the tokens of [`BURST`]. A request takes its tokens when
//! it begins, provided that the bucket has no debt. The request may leave a debt, so that requests of any
//! size pass and the average rate holds. The next request waits until the debt is paid.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use samepage_spec::RateLimits;

use super::wakers::Wakers;

/// The time whose share of a rate may be used at once.
pub const BURST: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Bucket {
    /// Tokens per second.
    rate: f64,
    /// Negative while the bucket has a debt.
    tokens: f64,
    filled: Duration,
}

impl Bucket {
    fn new(rate: u64, now: Duration) -> Self {
        let rate = rate.max(1) as f64;
        Self { rate, tokens: rate * BURST.as_secs_f64(), filled: now }
    }

    /// Returns the time until the debt is paid.
    fn wait(&mut self, now: Duration) -> Duration {
        let passed = now.saturating_sub(self.filled).as_secs_f64();
        self.filled = self.filled.max(now);
        self.tokens = (self.tokens + passed * self.rate).min(self.rate * BURST.as_secs_f64());
        if self.tokens >= 0.0 {
            return Duration::ZERO;
        }
        // Round up, and never return zero: the wait must not end before the debt.
        Duration::try_from_secs_f64(-self.tokens / self.rate)
            .unwrap_or(Duration::MAX)
            .max(Duration::from_micros(1))
    }
}

#[derive(Debug)]
struct State {
    limits: RateLimits,
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

/// The clock of a limiter: time since some moment in the past.
type Clock = Box<dyn Fn() -> Duration + Send + Sync>;

/// The limits of one disk, over all its queues. May be changed at any time from any thread.
pub struct RateLimiter {
    state: Mutex<State>,
    clock: Clock,
    wakers: Arc<Wakers>,
}

impl fmt::Debug for RateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimiter").field("limits", &self.limits()).finish_non_exhaustive()
    }
}

impl RateLimiter {
    /// Returns a limiter that uses the host's clock. When the limits change, it wakes waiting workers through
    /// `wakers`.
    pub(crate) fn new(limits: RateLimits, wakers: Arc<Wakers>) -> Self {
        let start = Instant::now();
        Self::with_clock(limits, wakers, Box::new(move || start.elapsed()))
    }

    fn with_clock(limits: RateLimits, wakers: Arc<Wakers>, clock: Clock) -> Self {
        let state = State { limits: RateLimits::default(), bytes: None, operations: None };
        let limiter = Self { state: Mutex::new(state), clock, wakers };
        limiter.set(limits);
        limiter
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the present limits.
    pub fn limits(&self) -> RateLimits {
        self.state().limits
    }

    /// Changes the limits, from the next request on. Cancels debts. A limit of 0 counts as 1.
    pub fn set(&self, limits: RateLimits) {
        let now = (self.clock)();
        *self.state() = State {
            limits,
            bytes: limits.rate.map(|rate| Bucket::new(rate.0, now)),
            operations: limits.iops.map(|rate| Bucket::new(rate, now)),
        };
        self.wakers.wake();
    }

    /// Lets a request of `bytes` bytes begin, or returns the least time that it must wait.
    pub(crate) fn begin(&self, bytes: u64) -> Result<(), Duration> {
        let mut state = self.state();
        if state.bytes.is_none() && state.operations.is_none() {
            return Ok(());
        }
        let now = (self.clock)();
        let State { bytes: byte_bucket, operations, .. } = &mut *state;
        let wait =
            [&mut *byte_bucket, &mut *operations].into_iter().flatten().map(|bucket| bucket.wait(now)).max();
        match wait {
            Some(wait) if !wait.is_zero() => Err(wait),
            _ => {
                if let Some(bucket) = byte_bucket {
                    bucket.tokens -= bytes as f64;
                }
                if let Some(bucket) = operations {
                    bucket.tokens -= 1.0;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;
    use samepage_spec::Size;

    use super::*;

    /// A limiter and its clock, in microseconds.
    fn limiter(rate: Option<u64>, iops: Option<u64>) -> (RateLimiter, Arc<AtomicU64>) {
        let time = Arc::new(AtomicU64::new(0));
        let clock = {
            let time = time.clone();
            move || Duration::from_micros(time.load(Ordering::Relaxed))
        };
        let limits = RateLimits { rate: rate.map(Size), iops };
        (RateLimiter::with_clock(limits, Arc::default(), Box::new(clock)), time)
    }

    #[test]
    fn without_limits_nothing_waits() {
        let (limiter, _) = limiter(None, None);
        assert!((0..1000).all(|_| limiter.begin(u64::MAX) == Ok(())));
    }

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let (limiter, time) = limiter(None, Some(100));
        // The requests of a tenth of a second, and the one that leaves the debt.
        assert_eq!((0..20).take_while(|_| limiter.begin(0).is_ok()).count(), 11);
        let wait = limiter.begin(0).unwrap_err();
        assert_eq!(wait, Duration::from_millis(10));
        time.fetch_add(wait.as_micros() as u64, Ordering::Relaxed);
        assert_eq!(limiter.begin(0), Ok(()));
        assert!(limiter.begin(0).is_err());
    }

    #[test]
    fn a_request_of_any_size_passes_and_is_paid_for() {
        let (limiter, time) = limiter(Some(1000), Some(1_000_000));
        assert_eq!(limiter.begin(5100), Ok(()));
        assert_eq!(limiter.begin(1), Err(Duration::from_secs(5)));
        time.store(4_999_000, Ordering::Relaxed);
        assert!(limiter.begin(1).is_err());
        time.store(5_000_000, Ordering::Relaxed);
        assert_eq!(limiter.begin(1), Ok(()));
        // A new limit holds at once, and so does none.
        limiter.set(RateLimits { rate: Some(Size(0)), iops: None });
        assert_eq!((limiter.begin(10), limiter.begin(0).is_err()), (Ok(()), true));
        limiter.set(RateLimits::default());
        assert_eq!(limiter.begin(u64::MAX), Ok(()));
    }

    proptest! {
        #[test]
        fn the_rate_is_kept_on_average(
            rate in 1u64..100_000,
            requests in prop::collection::vec((0u64..10_000, 0u64..1_000_000), 1..200),
        ) {
            let (limiter, time) = limiter(Some(rate), None);
            let (mut passed, mut last) = (0, 0);
            for (bytes, pause) in requests {
                time.fetch_add(pause, Ordering::Relaxed);
                if let Err(wait) = limiter.begin(bytes) {
                    time.fetch_add(wait.as_micros() as u64 + 1, Ordering::Relaxed);
                    prop_assert_eq!(limiter.begin(bytes), Ok(()), "after the wait it passes");
                }
                (passed, last) = (passed + bytes, bytes);
            }
            let seconds = time.load(Ordering::Relaxed) as f64 / 1e6;
            let allowed = rate as f64 * (seconds + BURST.as_secs_f64()) + 1.0;
            prop_assert!((passed - last) as f64 <= allowed, "{passed} bytes in {seconds} s at {rate}");
        }
    }
}
