//! How much memory cached blocks may take: one size for the process, whatever the number of groups.
//!
//! A share of free memory follows what is free: where others need memory, the cache gives its own back.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::ram::PAGE_SIZE;

/// How long a look at what is free is good for.
const FRESH: Duration = Duration::from_secs(1);
/// A fixed size is not held on to when so much memory is free no more, in percent of what is free or
/// cached blocks hold.
const MOST_PERCENT: u64 = 75;

/// The size of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheSize {
    /// Of what is free and what cached blocks hold, in percent.
    Percent(u8),
    /// In bytes.
    Bytes(u64),
}

impl Default for CacheSize {
    fn default() -> Self {
        Self::Percent(25)
    }
}

/// The limit, and how much of it is used by all groups.
#[derive(Debug)]
pub(crate) struct CacheLimit {
    size: Mutex<CacheSize>,
    frames: AtomicU64,
    used: AtomicU64,
    looked: Mutex<Option<Instant>>,
}

impl CacheLimit {
    pub(crate) fn new(size: CacheSize) -> Self {
        let limit = Self {
            size: Mutex::new(size),
            frames: AtomicU64::new(0),
            used: AtomicU64::new(0),
            looked: Mutex::new(None),
        };
        limit.refresh(Instant::now());
        limit
    }

    /// Looks at what is free, unless somebody just has.
    pub(crate) fn refresh(&self, now: Instant) {
        let mut looked = self.looked.lock();
        if looked.is_some_and(|then| now.saturating_duration_since(then) < FRESH) {
            return;
        }
        *looked = Some(now);
        self.apply(available_bytes());
    }

    fn apply(&self, available: Option<u64>) {
        let size = *self.size.lock();
        let frames = |bytes: u64| bytes / PAGE_SIZE as u64;
        // Where nobody tells what is free, a share of it is none.
        let within = available.map(|bytes| frames(bytes) + self.used());
        let limit = match size {
            CacheSize::Percent(percent) => within.unwrap_or(0) / 100 * u64::from(percent.min(100)),
            CacheSize::Bytes(bytes) => {
                within.map_or(u64::MAX, |within| within / 100 * MOST_PERCENT).min(frames(bytes))
            }
        };
        self.frames.store(limit, Ordering::Relaxed);
    }

    /// Changes the size. It is in force with the next block that is cached, or the next interval.
    pub(crate) fn set_size(&self, size: CacheSize) {
        *self.size.lock() = size;
        *self.looked.lock() = None;
        self.refresh(Instant::now());
    }

    /// One group's use has changed.
    pub(crate) fn use_instead(&self, before: u64, after: u64) {
        self.used.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
    }

    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Frames that cached blocks may take.
    pub(crate) fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    pub(crate) fn exceeded(&self) -> bool {
        self.used() > self.frames()
    }
}

/// Memory that could be had without swapping, in bytes.
fn available_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_free_memory_follows_it_and_a_size_yields_at_last() {
        let limit = CacheLimit::new(CacheSize::Percent(50));
        assert!(limit.frames() > 0, "this host tells what is free");
        limit.use_instead(0, 100);
        limit.apply(Some(300 * 4096));
        assert_eq!(limit.frames(), 200);
        limit.apply(Some(0));
        assert_eq!(limit.frames(), 50);
        assert!(limit.exceeded());
        limit.apply(None);
        assert_eq!(limit.frames(), 0);
        *limit.size.lock() = CacheSize::Bytes(1000 * 4096);
        limit.apply(None);
        assert_eq!(limit.frames(), 1000);
        limit.apply(Some(1 << 40));
        assert_eq!(limit.frames(), 1000);
        limit.apply(Some(300 * 4096));
        assert_eq!(limit.frames(), 300);
        limit.use_instead(100, 20);
        assert_eq!(limit.used(), 20);
    }
}
