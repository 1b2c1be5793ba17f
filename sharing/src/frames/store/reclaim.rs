//! What becomes of frames without owners: their memory goes back to the host, or is filled once more.

use super::{Frame, FrameStore};
use crate::memory::calls::MemoryCalls;
use crate::memory::ram::PAGE_SIZE;

/// How many frames may keep their memory for the next that are filled: 4 MiB.
pub(super) const SPARE_FRAMES: u32 = 1024;
/// Runs of frames whose memory is freed at once: about half a millisecond.
pub(super) const STEP_RUNS: usize = 32;
/// Frames of the longest of them, and about as many in all.
const LONGEST_RUN: u32 = 512;
/// Extents of free frames that are searched at once for memory: about half a millisecond.
const SEARCHED_EXTENTS: usize = 256;

impl FrameStore {
    /// Gives the memory of some dead frames back and makes them free: a bounded piece of work. Frames whose
    /// memory the kernel would not take stay dead and are tried again. Returns how many it took.
    pub fn reclaim(&mut self, calls: &dyn MemoryCalls) -> u32 {
        let mut refused = Vec::new();
        let mut done = 0;
        self.records.trim();
        let mut frames = 0;
        for _ in 0..STEP_RUNS {
            if frames >= LONGEST_RUN {
                break;
            }
            let next = self.dead.take_next(self.reclaimed, LONGEST_RUN);
            let next = next.or_else(|| self.unseen.take_next(0, LONGEST_RUN));
            let Some((first, count)) = next else {
                self.reclaimed = 0;
                break;
            };
            self.reclaimed = first + count;
            frames += count;
            // Who still looks one up would find another's content.
            let free = Frame::new(first).run(count).all(|frame| !self.indexed(frame));
            debug_assert!(free, "a dead frame is in the index");
            if free && calls.punch(Frame::new(first), count).is_ok() {
                done += count;
                self.set_free(first, count);
            } else {
                refused.push((first, count));
            }
        }
        for (first, count) in refused {
            self.dead.add(first, count);
        }
        if done == 0 && self.dead() == 0 {
            self.take_back(calls);
        }
        done
    }

    /// Gives memory back that free frames have taken again: a bounded piece of work. Returns whether there is more
    /// to do.
    ///
    /// A read of a page may be under way in the kernel when another thread writes to the page, so that the page
    /// leaves its frame, and the frame's memory goes. The read then finds a hole, fills it with zeros, and finds that
    /// the page has another content by now.
    fn take_back(&mut self, calls: &dyn MemoryCalls) -> bool {
        let excess = self.excess();
        if excess <= self.unexplained {
            (self.unexplained, self.searched) = (excess, 0);
            return false;
        }
        let places = self.records.len();
        let beyond = (places, self.capacity - places);
        for (first, count) in self.free.from(self.searched).chain([beyond]).take(SEARCHED_EXTENTS) {
            self.searched = first + count;
            if self.data_from(first).is_some_and(|data| data < first + count) {
                // Where this fails the next search finds it again.
                let _ = calls.punch(Frame::new(first), count);
            }
        }
        if self.searched < self.capacity {
            return true;
        }
        // What the kernel takes beyond what is used, as with huge pages, is not searched for again and again.
        (self.unexplained, self.searched) = (self.excess(), 0);
        false
    }

    /// Bytes that the kernel charges for the store beyond those of frames that may have memory.
    fn excess(&self) -> u64 {
        let known = u64::from(self.live) + u64::from(self.spare.frames()) + u64::from(self.dead());
        self.charged_bytes().unwrap_or(0).saturating_sub(known * PAGE_SIZE as u64)
    }

    /// The first place from this one on that has memory.
    fn data_from(&self, place: u32) -> Option<u32> {
        let data = self.seek(u64::from(place) * PAGE_SIZE as u64, libc::SEEK_DATA)?;
        u32::try_from(data / PAGE_SIZE as u64).ok()
    }

    /// Gives the memory of all dead frames back, as far as the kernel takes it.
    pub fn reclaim_all(&mut self, calls: &dyn MemoryCalls) {
        self.reclaimed = 0;
        while self.reclaim(calls) > 0 || self.reclaimed > 0 {}
        (self.searched, self.unexplained) = (0, 0);
        while self.take_back(calls) {}
        while self.records.trim() {}
    }

    /// Makes dead frames free that keep their memory, as far as there is room for such: who fills frames
    /// again and again is spared giving memory back and taking it again. Only what no guest has mapped is kept:
    /// who had the page may have a disk read from it still. The others are [reclaimed](Self::reclaim).
    pub fn recycle(&mut self, calls: &dyn MemoryCalls) {
        while self.spare.frames() < SPARE_FRAMES
            && let Some((first, count)) = self.unseen.take_next(0, SPARE_FRAMES - self.spare.frames())
        {
            // Who still looks one up would find another's content.
            let free = Frame::new(first).run(count).all(|frame| !self.indexed(frame));
            if free { &mut self.spare } else { &mut self.dead }.add(first, count);
        }
        self.reclaim(calls);
    }

    /// Gives the memory of all free frames back.
    pub fn drop_spare(&mut self, calls: &dyn MemoryCalls) {
        while let Some((first, count)) = self.spare.take_next(0, u32::MAX) {
            self.unseen.add(first, count);
        }
        self.reclaim_all(calls);
    }

    /// Free frames that have kept their memory.
    #[must_use]
    pub fn spare(&self) -> u32 {
        self.spare.frames()
    }

    fn set_free(&mut self, first: u32, count: u32) {
        let (first, count) = self.free.add(first, count);
        if first + count == self.records.len() {
            self.free.take(first, count);
            self.records.shrink(first);
        }
    }
}
