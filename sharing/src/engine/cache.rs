//! How frames come to hold blocks of disks, and are given up.

#![expect(unsafe_code, reason = "reads frames by address")]

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::blocks::block_index::{BlockKey, HeldBlock, Keep};
use crate::blocks::copies::Proof;
use crate::blocks::limit::{CacheSize, FRESH};
use crate::blocks::replace::{History, Replacement};
use crate::blocks::state::{Image, narrow};
use crate::blocks::statistics::CacheStatistics;
use crate::blocks::working_set::Curve;
use crate::engine::Engine;
use crate::engine::holds::Since;
use crate::frames::store::Frame;
use crate::memory::content::Page;
use crate::numbers::Slot;

/// How long memory is kept for reads from disks while none comes.
const SPARE_FOR: Duration = Duration::from_secs(1);
/// Blocks forgotten in one step: some hundred microseconds.
const STEP_FORGOTTEN: u32 = 512;

/// Blocks dropped in one step.
const STEP_EVICTIONS: u32 = 1024;

/// Blocks that are about to change, and of which some may be known.
#[doc(hidden)]
#[derive(Clone, Debug)]
pub struct Forgetting {
    image: u32,
    blocks: Range<u32>,
}

impl Engine {
    /// The proof of a frame's content.
    pub(crate) fn proof_of(&self, frame: Frame) -> Proof {
        // SAFETY: the frame is live, and its content no longer changes.
        self.cache.prover.proof(unsafe { &*self.store.content(frame).cast::<Page>() })
    }

    /// A frame holds a block, which no frame is known to hold. Returns whether that was noted.
    pub(crate) fn index_block(&mut self, frame: Frame, key: BlockKey, keep: Keep, history: History) -> bool {
        let first = self.cache.index.of(frame).is_none();
        let named = self.cache.index.add(frame, HeldBlock { key, keep, history });
        if named && first {
            self.store.keep(frame);
        }
        named
    }

    /// Pages that were copied from the disk have become frames: these hold the blocks, where they prove to.
    pub(crate) fn index_copies(&mut self, first: Frame, count: u32, runs: [(Slot, u32); 2]) {
        if self.cache.copies.is_empty() {
            return;
        }
        for index in 0..count {
            let frame = first + index;
            for (slot, page) in runs.map(|(slot, page)| (slot, page + index)) {
                let global = self.members.at(slot).global_page(page);
                let Some(&record) = self.cache.copies.get(global) else { continue };
                if !self.store.is_filled(frame) || !self.members.at(slot).space.attached(page) {
                    continue;
                }
                // From now on the frame tells which block the page holds.
                self.cache.copies.remove(global);
                let known =
                    self.cache.index.frame(record.key).is_some() || self.cache.being_written(record.key);
                if known {
                    continue;
                }
                if self.proof_of(frame) == record.proof {
                    self.index_block(frame, record.key, Keep::Exclusive, record.history);
                } else {
                    self.cache.counters.refuted += 1;
                }
            }
        }
    }

    /// A frame holds no block any more. Where no guest refers to it, it is given up.
    pub(crate) fn drop_block(&mut self, frame: Frame) {
        if let Some(named) = self.cache.index.remove_frame(frame) {
            self.cache.order.remove(named.key);
            self.let_go(frame);
        }
    }

    fn let_go(&mut self, frame: Frame) {
        if self.store.let_go(frame) {
            self.stable.remove(frame, &mut self.store);
        }
    }

    /// A block is not what it was: no frame holds it.
    fn forget_block(&mut self, key: BlockKey) {
        let Some(removed) = self.cache.index.remove(key) else { return };
        self.cache.counters.overwritten += 1;
        let ordered = self.cache.order.remove(key);
        match removed.next {
            None => self.let_go(removed.frame),
            Some(next) if ordered => {
                self.cache.order.insert(next, removed.was.history);
            }
            Some(_) => {}
        }
    }

    /// Blocks are about to change: nobody has them any more.
    pub fn begin_write(&mut self, image: Image, blocks: &Range<u64>) {
        let mut rest = self.announce_write(image, blocks);
        while self.forget_next(&mut rest) {}
    }

    /// Blocks are about to change: from now on none comes to be known. Those that are known are forgotten by
    /// [`forget_next`](Self::forget_next), before the first of them changes.
    #[doc(hidden)]
    pub fn announce_write(&mut self, image: Image, blocks: &Range<u64>) -> Forgetting {
        let since = Since::now();
        let image = self.cache.image(image);
        let blocks = narrow(blocks);
        for fetch in self.cache.fetches.values_mut().filter(|fetch| fetch.key.image == image) {
            for (block, stale) in (fetch.key.block..).zip(&mut fetch.stale) {
                *stale |= blocks.contains(&block);
            }
        }
        self.cache.writing.push((image, blocks.clone()));
        self.holds.note("beginning of a write", since);
        Forgetting { image, blocks }
    }

    /// Forgets the next blocks that are about to change. Returns whether there may be more.
    #[doc(hidden)]
    pub fn forget_next(&mut self, rest: &mut Forgetting) -> bool {
        let since = Since::now();
        let mut more = true;
        for _ in 0..STEP_FORGOTTEN {
            let Forgetting { image, blocks } = rest.clone();
            let named = self.cache.index.first_within(image, blocks.clone());
            let noted = self.cache.copies.first_within(image, blocks);
            let Some(key) = named.into_iter().chain(noted).min() else {
                more = false;
                break;
            };
            self.forget_block(key);
            self.cache.copies.forget_block(key);
            rest.blocks.start = key.block + 1;
        }
        self.update_cache();
        self.holds.note("blocks that are written", since);
        more
    }

    /// The change is over.
    pub fn end_write(&mut self, image: Image, blocks: &Range<u64>) {
        let Some(image) = self.cache.known_image(image) else { return };
        let blocks = narrow(blocks);
        let found = self.cache.writing.iter().position(|entry| *entry == (image, blocks.clone()));
        if let Some(index) = found {
            self.cache.writing.swap_remove(index);
        }
    }

    /// Frames that their last guests left become cached blocks, others are dropped as the limit asks for.
    pub fn update_cache(&mut self) {
        if self.store.any_left() {
            for frame in self.store.take_left() {
                let Some(&named) = self.cache.index.of(frame) else { continue };
                if named.keep == Keep::Exclusive {
                    self.cache.counters.demoted_mapped += 1;
                    self.cache.order.insert(named.key, named.history);
                } else {
                    self.drop_block(frame);
                }
            }
        }
        self.report_idle();
        if self.exceeded() {
            self.evict();
        }
        if self.cache.filled {
            self.store.recycle(&*self.host.calls);
        } else {
            self.store.reclaim(&*self.host.calls);
        }
    }

    /// Gives back the memory that was kept for reads from disks, where none came for a while. Returns whether
    /// there was any.
    pub(crate) fn rest_cache(&mut self, now: Instant) -> bool {
        if std::mem::take(&mut self.cache.filled) {
            self.cache.asked = now;
        }
        let rested = now.saturating_duration_since(self.cache.asked) >= SPARE_FOR && self.store.spare() > 0;
        if rested {
            self.store.drop_spare(&*self.host.calls);
        }
        rested
    }

    /// Whether the group caches more than its share.
    fn exceeded(&self) -> bool {
        u64::from(self.store.idle()) > self.cache.limit.share()
    }

    fn report_idle(&mut self) {
        let idle = self.store.idle().into();
        self.cache.limit.use_instead(self.cache.published, idle);
        self.cache.published = idle;
    }

    /// Goes on with dropping blocks, where there are too many. Returns whether there were any to drop.
    pub(crate) fn shrink_cache(&mut self) -> bool {
        let any = self.exceeded() && !self.cache.order.is_empty();
        if any {
            self.update_cache();
        }
        any
    }

    fn evict(&mut self) {
        for _ in 0..STEP_EVICTIONS {
            if !self.exceeded() {
                return;
            }
            let Some(key) = self.cache.order.evict() else { return };
            let Some(frame) = self.cache.index.frame(key) else { continue };
            // Frames that guests came back to are in no order.
            if self.store.sharers(frame) == 0 {
                self.cache.counters.evicted += 1;
                self.drop_block(frame);
                self.report_idle();
            }
        }
    }

    /// Changes how much memory cached blocks may take. Those beyond are dropped step by step.
    pub fn set_cache_size(&self, size: CacheSize) {
        self.cache.limit.set_size(size);
    }

    /// Follows what is free, where cached blocks could be given up for it and nobody has just done so. Returns
    /// whether that was due.
    pub(crate) fn follow_limit(&mut self, now: Instant) -> bool {
        let due = self.limit_due().is_some_and(|due| due <= now);
        if due {
            self.cache.followed = now;
            if self.alone {
                self.cache.limit.refresh(now);
            }
            self.update_cache();
        }
        due
    }

    fn limit_due(&self) -> Option<Instant> {
        (self.store.idle() > 0).then(|| self.cache.followed + FRESH)
    }

    /// When the cache has something to give back, or looks whether it has.
    pub(crate) fn cache_due(&self) -> Option<Instant> {
        let spare = (self.store.spare() > 0).then(|| self.cache.asked + SPARE_FOR);
        spare.into_iter().chain(self.limit_due()).min()
    }

    /// When the cache has a turn of its own. Where intervals end, it has one with them.
    pub(crate) fn cache_turn_due(&self) -> Option<Instant> {
        let none_ends = self.members.iter().all(|member| !member.active() || member.follower.is_none());
        none_ends.then(|| self.cache_due()).flatten()
    }

    /// What more memory would bring a VM; `None` where it has read nothing through the cache.
    #[must_use]
    pub fn working_set(&self, slot: Slot) -> Option<Curve> {
        self.members.get(slot)?.working_set.as_ref().map(|working_set| working_set.curve())
    }

    /// The statistics of the cache.
    #[must_use]
    pub fn cache_statistics(&self) -> CacheStatistics {
        CacheStatistics {
            blocks_cached: self.store.idle().into(),
            blocks_limit: self.cache.limit.frames(),
            blocks_in_guests: self.cache.index.frames() as u64 - u64::from(self.store.idle()),
            blocks_noted: self.cache.copies.len() as u64,
            metadata_bytes: self.cache.bytes() as u64,
            ..self.cache.counters.clone()
        }
    }
}
