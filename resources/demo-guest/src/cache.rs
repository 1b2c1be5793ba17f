//! The page cache of the disk's client: the block in each page, and the order of eviction (exact LRU).
//!
//! [`ClientLayout`] defines the place of its tables and pages. Places are counted from 1; place 0 is both
//! ends of the list.

use crate::demo::client::{ClientLayout, ClientPlan, stride};

/// The state of a page.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    /// The place that was used next after this one.
    newer: u32,
    /// The place that was used last before this one.
    older: u32,
    block: u32,
    state: u32,
}

/// The page holds no block.
const EMPTY: u32 = 0;
/// The page holds its block.
const HELD: u32 = 1;
/// The disk has the page.
const BUSY: u32 = 2;

const _: () = assert!(size_of::<Place>() as u64 == ClientLayout::PLACE);

/// Pages, and the blocks in them.
pub(crate) struct Cache {
    blocks: usize,
    places: usize,
    base: u64,
    layout: ClientLayout,
    plan: ClientPlan,
    /// Distance between the pages of consecutive places, in pages.
    stride: u32,
    /// Number of pages that hold a block.
    pub(crate) held: u32,
}

impl Cache {
    /// Returns an empty cache in the memory at `base`.
    ///
    /// # Safety
    /// The memory of `layout`, of this `plan`, must be mapped, unused by others and zero.
    pub(crate) unsafe fn new(plan: &ClientPlan, layout: &ClientLayout, base: u64) -> Self {
        let at = |offset: u64| (base + offset) as usize;
        let cache = Self {
            blocks: at(layout.blocks),
            places: at(layout.places),
            base,
            layout: *layout,
            plan: *plan,
            stride: if plan.scatter { stride(plan.pages) } else { 1 },
            held: 0,
        };
        for place in 0..=plan.pages {
            let newer = if place == plan.pages { 0 } else { place + 1 };
            let older = place.checked_sub(1).unwrap_or(plan.pages);
            cache.set(place, Place { newer, older, block: 0, state: EMPTY });
        }
        cache
    }

    /// Returns the place of a block, if the block is present or being read.
    pub(crate) fn find(&self, block: u32) -> Option<u32> {
        // SAFETY: the caller of `new` guarantees the table, which has an entry for each block of the plan.
        let place = unsafe { self.block_entry(block).read() };
        (place != 0).then_some(place)
    }

    /// Returns how often a block has been written.
    pub(crate) fn version(&self, block: u32) -> u32 {
        // SAFETY: as for `find`; the version follows the place.
        unsafe { self.block_entry(block).add(1).read() }
    }

    /// Counts a write of a block.
    pub(crate) fn next_version(&mut self, block: u32) {
        let next = self.version(block).checked_add(1).unwrap_or(1);
        // SAFETY: as for `version`.
        unsafe { self.block_entry(block).add(1).write(next) };
    }

    /// Returns the least recently used place.
    pub(crate) fn oldest(&self) -> u32 {
        self.get(0).newer
    }

    /// Returns whether the disk has a place's page.
    pub(crate) fn busy(&self, place: u32) -> bool {
        self.get(place).state == BUSY
    }

    /// Records that the disk has the page of a place, or has returned it.
    pub(crate) fn set_busy(&mut self, place: u32, busy: bool) {
        self.set(place, Place { state: if busy { BUSY } else { HELD }, ..self.get(place) });
    }

    /// Assigns a place, which must not be busy, to this block.
    pub(crate) fn assign(&mut self, place: u32, block: u32) {
        let old = self.get(place);
        if old.state == EMPTY {
            self.held += 1;
        } else {
            // SAFETY: as for `find`.
            unsafe { self.block_entry(old.block).write(0) };
        }
        // SAFETY: as for `find`.
        unsafe { self.block_entry(block).write(place) };
        self.set(place, Place { block, state: HELD, ..old });
        self.touch(place);
    }

    /// Records a use of a place.
    pub(crate) fn touch(&mut self, place: u32) {
        let Place { newer, older, .. } = self.get(place);
        self.set(newer, Place { older, ..self.get(newer) });
        self.set(older, Place { newer, ..self.get(older) });
        let newest = self.get(0).older;
        self.set(place, Place { newer: 0, older: newest, ..self.get(place) });
        self.set(newest, Place { newer: place, ..self.get(newest) });
        self.set(0, Place { older: place, ..self.get(0) });
    }

    /// Returns the address of a place's page.
    pub(crate) fn page(&self, place: u32) -> u64 {
        self.base + self.layout.page_at(&self.plan, place, self.stride)
    }

    fn block_entry(&self, block: u32) -> *mut u32 {
        core::ptr::with_exposed_provenance_mut::<u32>(self.blocks).wrapping_add(2 * block as usize)
    }

    fn place(&self, place: u32) -> *mut Place {
        core::ptr::with_exposed_provenance_mut::<Place>(self.places).wrapping_add(place as usize)
    }

    fn get(&self, place: u32) -> Place {
        // SAFETY: the caller of `new` guarantees the table, and places come from it.
        unsafe { self.place(place).read() }
    }

    fn set(&self, place: u32, to: Place) {
        // SAFETY: as for reads.
        unsafe { self.place(place).write(to) }
    }
}
