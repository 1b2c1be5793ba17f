//! Where the repair of a frame store with holes stands, and when it is worth its work.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::frames::store::{Frame, FrameStore, Hold};
use crate::numbers::Slot;

/// A frame that is under way.
#[derive(Debug)]
pub(crate) struct Move {
    pub(crate) old: Hold,
    pub(crate) new: Hold,
}

/// What is done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Nothing is under way.
    None,
    /// Frames from `last` on are copied to places before, in the order of the pages on them, from this slot
    /// and page on.
    Copying { last: Frame, slot: Slot, page: u32 },
    /// Frames from `last` on that no page is on are moved, from this frame on.
    MovingIdle { last: Frame, next: Frame },
    /// Pages change over to the copies, from this slot and page on.
    Changing { slot: Slot, page: u32 },
    /// What was held is given up.
    Ending,
}

/// Where the repair stands.
#[derive(Debug)]
pub(crate) struct Compaction {
    pub(crate) work: Work,
    /// Frames under way, by their old places.
    pub(crate) moves: BTreeMap<Frame, Move>,
    pub(crate) places_before: u32,
    /// Frames of which nothing has stayed in their old places.
    pub(crate) moved: usize,
    pub(crate) due: Instant,
    /// Places beyond those in use that do not count as holes.
    pub(crate) few: u32,
    /// Windows that one step takes.
    pub(crate) windows: u32,
}

impl Compaction {
    /// `few` free places never count as holes; a step takes so many windows at most.
    pub(crate) fn new(few: u32, windows: u32) -> Self {
        Self {
            work: Work::None,
            moves: BTreeMap::new(),
            places_before: 0,
            moved: 0,
            due: Instant::now(),
            few,
            windows,
        }
    }

    /// Whether the store is more than half holes.
    pub(crate) fn wanted(&self, store: &FrameStore) -> bool {
        store.places() > self.few.saturating_add(2 * store.live())
    }

    /// Frames that are held.
    pub(crate) fn held(&self) -> u32 {
        2 * self.moves.len() as u32
    }
}
