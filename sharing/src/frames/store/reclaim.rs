//! What becomes of frames without owners: their memory goes back to the host, or is filled once more.

use super::{Frame, FrameStore};
use crate::memory::calls::MemoryCalls;

/// How many frames may keep their memory for the next that are filled: 4 MiB.
pub(super) const SPARE_FRAMES: u32 = 1024;
/// Runs of frames whose memory is freed at once: about half a millisecond.
pub(super) const STEP_RUNS: usize = 32;
/// Frames of the longest of them, and about as many in all.
const LONGEST_RUN: u32 = 512;

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
        done
    }

    /// Gives the memory of all dead frames back, as far as the kernel takes it.
    pub fn reclaim_all(&mut self, calls: &dyn MemoryCalls) {
        self.reclaimed = 0;
        while self.reclaim(calls) > 0 || self.reclaimed > 0 {}
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
