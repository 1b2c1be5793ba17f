//! How much memory cached blocks may take: one size for the process, of which each group has an equal share.
//!
//! A percentage of free memory follows what is free: where others need memory, the cache gives its own back.
//!
//! A group never takes more than its share, nor has less because of what others cache: otherwise a guest could
//! have the blocks of other groups dropped, and tell from its own misses what they read. Shares change when a
//! group comes or goes, which guests do not decide.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::available::Available;
use crate::memory::ram::PAGE_SIZE;

/// How long a look at what is free is good for.
pub(crate) const FRESH: Duration = Duration::from_secs(1);
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

/// Tells how many bytes there are to be had.
type Look = Box<dyn Fn() -> Option<u64> + Send + Sync>;

/// The limit, how much of it is used by all groups, and how many they are.
pub(crate) struct CacheLimit {
    size: Mutex<CacheSize>,
    available: Look,
    frames: AtomicU64,
    used: AtomicU64,
    groups: AtomicU64,
    looked: Mutex<Option<Instant>>,
}

impl fmt::Debug for CacheLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheLimit")
            .field("size", &self.size)
            .field("used", &self.used)
            .finish_non_exhaustive()
    }
}

impl CacheLimit {
    pub(crate) fn new(size: CacheSize) -> Self {
        let available = Available::new();
        Self::with(size, Box::new(move || available.bytes()))
    }

    fn with(size: CacheSize, available: Look) -> Self {
        let limit = Self {
            size: Mutex::new(size),
            available,
            frames: AtomicU64::new(0),
            used: AtomicU64::new(0),
            groups: AtomicU64::new(0),
            looked: Mutex::new(None),
        };
        limit.refresh(Instant::now());
        limit
    }

    /// Looks at what is free, unless somebody just has. Takes some file reads: not to be called where guests
    /// wait.
    pub(crate) fn refresh(&self, now: Instant) {
        let mut looked = self.looked.lock();
        if looked.is_some_and(|then| now.saturating_duration_since(then) < FRESH) {
            return;
        }
        *looked = Some(now);
        self.apply((self.available)());
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

    /// One more group caches blocks.
    pub(crate) fn join(&self) {
        self.groups.fetch_add(1, Ordering::Relaxed);
    }

    /// A group is gone.
    pub(crate) fn leave(&self) {
        self.groups.fetch_sub(1, Ordering::Relaxed);
    }

    /// Frames that cached blocks of one group may take.
    pub(crate) fn share(&self) -> u64 {
        self.frames() / self.groups.load(Ordering::Relaxed).max(1)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::blocks::{BlockRead, Image, Keep};
    use crate::engine::{Engine, Mode, Settings, Step};
    use crate::frames::store::FrameStore;
    use crate::memory::calls::Linux;
    use crate::memory::ram::Ram;
    use crate::numbers::Slot;
    use crate::policy::budget::Budgets;

    /// An engine with a VM that nobody follows, and whose cache holds this many blocks.
    fn caching(limit: CacheLimit, blocks: u32) -> (Engine, Slot) {
        let store = FrameStore::create(4096).unwrap();
        let calls = Linux::open(Arc::clone(store.file())).unwrap();
        let settings = Settings { longest_pause_ms: 3_600_000, ..Settings::default() };
        let budgets = Arc::new(Budgets::new(None));
        let limit = Arc::new(limit);
        let mut engine = Engine::with_budgets(&settings, store, Box::new(calls), budgets, limit).unwrap();
        engine.alone = true;
        let ram = Ram::reserve(64 * PAGE_SIZE).unwrap();
        ram.use_small_pages().unwrap();
        let slot = engine.add(Arc::new(ram), None, Box::new(|_| {})).unwrap();
        let targets = vec![None; blocks as usize];
        let read =
            BlockRead { keep: Keep::Inclusive, image: Image([1, 2, 3, 0]), first: 0, targets: &targets };
        let plan = engine.begin_read(engine.vm_number(slot), &read, &mut |_, _| {});
        for fetch in plan.fetches {
            assert!(engine.end_fetch(fetch.token, true, &mut |_, _| {}));
        }
        assert_eq!(engine.cache_statistics().blocks_cached, u64::from(blocks));
        (engine, slot)
    }

    #[test]
    fn the_cache_yields_where_no_change_is_followed() {
        for mode in [Some(Mode::Full), Some(Mode::Off), None] {
            let free = Arc::new(AtomicU64::new(1 << 40));
            let told = Arc::clone(&free);
            let look = Box::new(move || Some(told.load(Ordering::Relaxed)));
            let (mut engine, slot) = caching(CacheLimit::with(CacheSize::Percent(50), look), 64);
            match mode {
                Some(mode) => engine.set_mode(slot, mode),
                None => engine.remove(slot).unwrap(),
            }
            let mut now = Instant::now();
            while engine.step(now) == Step::Worked {}
            free.store(0, Ordering::Relaxed);
            // Whoever sleeps until then finds that memory has run short.
            assert!(engine.busy());
            for _ in 0..20 {
                if let Step::RestUntil(until) = engine.step(now) {
                    assert!(until <= now + 2 * FRESH, "{mode:?} sleeps for {:?}", until - now);
                    now = until;
                }
                // What is left is half of it, again and again.
                if engine.cache_statistics().blocks_cached < 10 {
                    break;
                }
            }
            assert!(
                engine.cache_statistics().blocks_cached < 10,
                "{mode:?}: {:?}",
                engine.cache_statistics()
            );
        }
    }

    #[test]
    fn a_share_of_free_memory_follows_it_and_a_size_yields_at_last() {
        let limit = CacheLimit::new(CacheSize::Percent(50));
        assert!(limit.frames() > 0, "this host tells what is free");
        limit.use_instead(0, 100);
        limit.apply(Some(300 * 4096));
        assert_eq!(limit.frames(), 200);
        limit.apply(Some(0));
        assert_eq!(limit.frames(), 50);
        assert!(limit.used() > limit.frames());
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

    #[test]
    fn what_a_group_may_take_depends_on_how_many_there_are_and_not_on_what_they_hold() {
        let limit = CacheLimit::new(CacheSize::Bytes(1000 * 4096));
        limit.apply(Some(1 << 40));
        assert_eq!(limit.share(), 1000, "nobody is there");
        (0..3).for_each(|_| limit.join());
        assert_eq!(limit.share(), 333);
        limit.use_instead(0, 900);
        limit.apply(Some((1 << 40) - 900 * 4096));
        assert_eq!(limit.share(), 333);
        *limit.size.lock() = CacheSize::Percent(25);
        // What is cached is free no more, and as much as before may be.
        limit.apply(Some(10_000 * 4096));
        let before = limit.share();
        limit.use_instead(900, 1700);
        limit.apply(Some(9200 * 4096));
        assert_eq!(limit.share(), before);
        limit.leave();
        assert_eq!(limit.share(), limit.frames() / 2);
    }
}
