//! What runs are worth, and which of them are unmerged for better ones when mappings run out.
//!
//! The *value* of a run is the pages that it saves for the mappings that it needs. Runs that guests
//! have written to since have lost theirs and go first.

use crate::numbers::Slot;

/// How many classes of value there are; the first is that of runs without any.
pub(crate) const CLASSES: usize = 16;

/// What a run is worth: half pages for each mapping, so that a single page that needs two mappings is
/// worth 1, and a run of n pages n.
pub(crate) fn value(pages: u32, mappings: i64) -> u32 {
    match u32::try_from(mappings) {
        Ok(mappings @ 1..) => 2 * pages / mappings,
        _ => u32::MAX,
    }
}

/// Where undoing stands.
#[derive(Debug, Default)]
pub(crate) struct Pressure {
    /// The most that a run was worth which was denied since.
    pub(crate) wanted: u32,
    /// The least room at which one was denied.
    pub(crate) room: Option<i64>,
    /// Runs worth less are not merged: their like was undone.
    pub(crate) floor: u32,
    /// Mappings of guests when nothing was found to be undone for a run of this worth.
    pub(crate) futile: Option<(u64, u32)>,
    pub(crate) work: Work,
}

#[derive(Debug, Default)]
pub(crate) enum Work {
    #[default]
    None,
    /// Adds up the mappings that runs of each class of value need, from this slot and page on.
    /// Of runs worth less than `below` only.
    Counting { slot: Slot, page: u32, below: u32, classes: [i64; CLASSES] },
    /// Undoes runs below a value, from this slot and page on.
    Undoing { slot: Slot, page: u32, below: u32 },
}

/// The class of a value: 0 for none, then by powers of two.
pub(crate) fn class(value: u32) -> usize {
    (u32::BITS - value.leading_zeros()) as usize
}

impl Pressure {
    /// The least that a run must be worth.
    pub(crate) fn floor(&self) -> u32 {
        self.floor
    }

    /// A run of this value was denied for want of mappings.
    pub(crate) fn denied(&mut self, value: u32, room: i64) {
        self.wanted = self.wanted.max(value);
        self.room = Some(self.room.map_or(room, |least| least.min(room)));
    }

    /// Whether there is more room than when runs were denied, by a good part of what is `ample`.
    pub(crate) fn eased(&mut self, room: i64, ample: i64) -> bool {
        if room > 2 * ample {
            self.floor = 0;
        }
        let eased = self.room.is_some_and(|least| room > least + ample / 4);
        if eased {
            self.room = None;
        }
        eased
    }
}
