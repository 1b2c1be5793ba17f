//! The page cache of the disk's client: which block is in which page, and which goes first (exact LRU).
//!
//! Its tables and pages lie where [`ClientLayout`] says. Places are counted from 1; place 0 is both ends of
//! the list.

use crate::demo::client::{ClientLayout, ClientPlan, stride};

/// What is known of a page.
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

/// It holds no block.
const EMPTY: u32 = 0;
/// It holds its block.
const HELD: u32 = 1;
/// The disk has its page.
const BUSY: u32 = 2;

const _: () = assert!(size_of::<Place>() as u64 == ClientLayout::PLACE);

/// Pages, and the blocks in them.
pub(crate) struct Cache {
    blocks: usize,
    places: usize,
    base: u64,
    layout: ClientLayout,
    plan: ClientPlan,
    /// Pages of consecutive places are so many apart.
    stride: u32,
    /// Pages that hold a block.
    pub(crate) held: u32,
}

impl Cache {
    /// An empty cache in the memory at `base`.
    ///
    /// # Safety
    /// The memory of `layout`, of this `plan`, must be mapped, used by nothing else and zero.
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

    /// The place of a block, if it is there or on its way.
    pub(crate) fn find(&self, block: u32) -> Option<u32> {
        // SAFETY: `new`'s caller vouches for the table, which has an entry for each block of the plan.
        let place = unsafe { self.block_entry(block).read() };
        (place != 0).then_some(place)
    }

    /// How often a block has been written.
    pub(crate) fn version(&self, block: u32) -> u32 {
        // SAFETY: as for `find`; the version follows the place.
        unsafe { self.block_entry(block).add(1).read() }
    }

    /// Count a write of a block.
    pub(crate) fn next_version(&mut self, block: u32) {
        let next = self.version(block).checked_add(1).unwrap_or(1);
        // SAFETY: as for `version`.
        unsafe { self.block_entry(block).add(1).write(next) };
    }

    /// The place that was not used for the longest time.
    pub(crate) fn oldest(&self) -> u32 {
        self.get(0).newer
    }

    /// Whether the disk has a place's page.
    pub(crate) fn busy(&self, place: u32) -> bool {
        self.get(place).state == BUSY
    }

    /// Give the disk the page of a place, or take it back.
    pub(crate) fn set_busy(&mut self, place: u32, busy: bool) {
        self.set(place, Place { state: if busy { BUSY } else { HELD }, ..self.get(place) });
    }

    /// A place, which is not busy, is for this block now.
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

    /// A place has been used.
    pub(crate) fn touch(&mut self, place: u32) {
        let Place { newer, older, .. } = self.get(place);
        self.set(newer, Place { older, ..self.get(newer) });
        self.set(older, Place { newer, ..self.get(older) });
        let newest = self.get(0).older;
        self.set(place, Place { newer: 0, older: newest, ..self.get(place) });
        self.set(newest, Place { newer: place, ..self.get(newest) });
        self.set(0, Place { older: place, ..self.get(0) });
    }

    /// Address of a place's page.
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
        // SAFETY: `new`'s caller vouches for the table, and places come from it.
        unsafe { self.place(place).read() }
    }

    fn set(&self, place: u32, to: Place) {
        // SAFETY: as for reads.
        unsafe { self.place(place).write(to) }
    }
}
