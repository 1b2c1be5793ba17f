//! The guest's end of a memory hole, without a guest.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use samepage_hole::{
    BLOCK_PAGES, FrameRange, GuestHeader, Hole, HostHeader, MAX_RANGES, PUBLISHED, bytes_for, flags,
};
use samepage_sharing::Slot;
use samepage_sharing::claims::ClaimSource;
use samepage_sharing::engine::Engine;

pub(crate) const FREE: u32 = PUBLISHED | flags::BUDDY;
pub(crate) const ANON: u32 = PUBLISHED | flags::ANON | flags::LRU | flags::SWAP_BACKED;
pub(crate) const FILE: u32 = PUBLISHED | flags::LRU | flags::MAPPED_TO_DISK;
pub(crate) const SLAB: u32 = PUBLISHED | flags::SLAB;

/// The memory of a hole; page frames are the pages, but for a gap of `GAP` behind the first half.
#[derive(Debug)]
pub(crate) struct Words {
    pub(crate) words: Vec<AtomicU32>,
    ranges: [FrameRange; 2],
    frames: u32,
}

const GAP: u32 = 1500;

impl ClaimSource for Words {
    fn hole(&self) -> Hole<'_> {
        Hole::new(&self.words, self.frames).unwrap()
    }

    fn ranges(&self) -> &[FrameRange] {
        &self.ranges
    }
}

/// An agent, as the engine knows it.
pub(crate) struct Agent {
    pub(crate) source: Arc<Words>,
    pub(crate) bell: Arc<AtomicBool>,
    pub(crate) header: GuestHeader,
    half: u32,
}

impl Agent {
    pub(crate) fn start(engine: &mut Engine, slot: Slot, pages: u32) -> Self {
        let half = pages / 2;
        let (low, high) =
            (FrameRange { first: 0, count: half }, FrameRange { first: half + GAP, count: pages - half });
        let frames = pages + GAP;
        let words = (0..bytes_for(frames) / 4).map(|_| AtomicU32::new(0)).collect();
        let source = Arc::new(Words { words, ranges: [low, high], frames });
        let mut ranges = [FrameRange::default(); MAX_RANGES];
        ranges[..2].copy_from_slice(&source.ranges);
        source.hole().set_host_header(&HostHeader { frames, ranges, ..HostHeader::default() });
        let bell = Arc::new(AtomicBool::new(false));
        engine.listen(slot, source.clone(), bell.clone());
        Self { source, bell, header: GuestHeader { next_ms: 2000, ..GuestHeader::default() }, half }
    }

    pub(crate) fn requested(&self) -> u32 {
        self.source.hole().host_header().unwrap().requested
    }

    /// Says something of pages.
    pub(crate) fn say(&self, pages: impl IntoIterator<Item = u32>, word: u32) {
        let hole = self.source.hole();
        for page in pages {
            let frame = if page < self.half { page } else { page + GAP };
            if hole.flags()[frame as usize].swap(word, Ordering::Relaxed) != word {
                hole.count(frame / BLOCK_PAGES);
            }
        }
    }

    /// Ends a pass that began after the request with this number.
    pub(crate) fn end_pass(&mut self, answered: u32) {
        self.header.generation += 1;
        self.header.answered = answered;
        self.source.hole().set_guest_header(&self.header);
        self.bell.store(true, Ordering::Release);
    }

    /// Takes everything back that was said.
    pub(crate) fn take_away(&self) {
        self.source.hole().clear_guest_header();
        self.bell.store(true, Ordering::Release);
    }

    /// Says the same of all as before, in a pass that answers what is asked now.
    pub(crate) fn pass(&mut self) {
        self.end_pass(self.requested());
    }
}
