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

/// Where unmerging for better runs stands.
#[derive(Debug, Default)]
pub(crate) struct Pressure {
    /// The most that a run was worth which was denied since.
    wanted: u32,
    /// The least room at which one was denied.
    room: Option<i64>,
    /// Runs worth less are not merged: their like were unmerged.
    floor: u32,
    /// Mappings of guests when nothing was found to be unmerged for a run of this worth.
    futile: Option<(u64, u32)>,
    pub(crate) work: Work,
}

#[derive(Debug, Default)]
pub(crate) enum Work {
    #[default]
    None,
    /// Adds up the mappings that runs of each class of value need, from this slot and page on.
    /// Of runs worth less than `below` only.
    Counting { slot: Slot, page: u32, below: u32, classes: [i64; CLASSES] },
    /// Unmerges runs below a value, from this slot and page on.
    Unmerging { slot: Slot, page: u32, below: u32 },
}

/// What is done once the mappings of each class were added up: `missing` are to be found among runs worth less than
/// `limit`.
pub(crate) fn after_counting(limit: u32, classes: &[i64; CLASSES], missing: i64) -> Work {
    let mut found = 0;
    let mut below = 0;
    for (class, &mappings) in classes.iter().enumerate() {
        let end = 1_u32 << class;
        if found >= missing || end / 2 >= limit {
            break;
        }
        if mappings > 0 {
            found += mappings;
            below = end.min(limit);
        }
    }
    if below == 0 { Work::None } else { Work::Unmerging { slot: Slot::default(), page: 0, below } }
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

    /// Begins to look for runs to be unmerged, if runs were denied since and it may help. `mappings` is how many all
    /// guests have. Returns whether there is work now.
    pub(crate) fn begin(&mut self, mappings: u64) -> bool {
        let wanted = std::mem::take(&mut self.wanted);
        let is_futile = self
            .futile
            .is_some_and(|(then, value)| wanted <= value && mappings.abs_diff(then) < 64 + mappings / 64);
        if wanted == 0 || is_futile {
            return false;
        }
        self.futile = Some((mappings, wanted));
        // What is unmerged is worth half of what is wanted at most, or it would not be worth the work.
        let below = (wanted / 2).max(1);
        self.work = Work::Counting { slot: Slot::default(), page: 0, below, classes: [0; CLASSES] };
        true
    }

    /// Runs worth less than this are unmerged, and their like are not merged again.
    pub(crate) fn unmerging_below(&mut self, below: u32) {
        self.floor = self.floor.max(below);
        self.futile = None;
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
