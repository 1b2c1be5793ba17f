//! A picture of a VM's memory: runs of pages, each summed up.

use std::io;
use std::ops::Range;

use serde::Serialize;

use crate::engine::Engine;
use crate::engine::members::{Flags, Member};
use crate::frames::page_types::TYPES;
use crate::inspect::survey::{PageCount, Survey};
use crate::numbers::Slot;

/// A run of pages of a VM, summed up.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MapCell {
    /// Number of its first page.
    pub first_page: u64,
    /// How many there are.
    pub pages: u32,
    /// How many are on frames, have memory of their own, were freed, or none of these: never touched.
    pub states: [u32; 4],
    /// How many the guest says are of each type, in the order of [`samepage_hole::PageType::ALL`].
    pub types: [u32; TYPES],
}

impl Engine {
    /// A VM's memory in at most `cells` cells of the same size, but for the last; `None` for a slot without
    /// a VM.
    ///
    /// # Errors
    /// Fails if the page map cannot be read.
    pub fn map(&self, slot: Slot, cells: u32) -> io::Result<Option<Vec<MapCell>>> {
        Survey::new(slot, Picture::new(cells)).all(self)
    }
}

/// A picture that is made cell by cell.
pub(crate) struct Picture {
    most: u32,
    cells: Vec<MapCell>,
}

impl Picture {
    /// Of at most so many cells.
    pub(crate) fn new(most: u32) -> Self {
        Self { most: most.max(1), cells: Vec::new() }
    }
}

impl PageCount for Picture {
    type Sum = Vec<MapCell>;
    const NAME: &'static str = "picture of a VM";

    fn count(
        &mut self,
        _: &Engine,
        member: &Member,
        pages: Range<u32>,
        runs: &[Range<u32>],
    ) -> io::Result<()> {
        let space = &member.space;
        let all = space.pages();
        let size = all.div_ceil(self.most).max(1);
        let mut private = runs.iter().cloned().flatten().peekable();
        let census = space.backing().census();
        for page in pages {
            if page.is_multiple_of(size) {
                let pages = size.min(all - page);
                self.cells.push(MapCell { first_page: page.into(), pages, ..MapCell::default() });
            }
            let Some(cell) = self.cells.last_mut() else { continue };
            // A page that has just left its frame is still in the metadata.
            let own = private.next_if_eq(&page).is_some();
            let zero = member.flags[page as usize].contains(Flags::ZERO);
            let state = match (own, space.attached(page), zero) {
                (true, ..) => 1,
                (_, true, _) => 0,
                (_, _, true) => 2,
                _ => 3,
            };
            cell.states[state] += 1;
            let kind = census.map_or(0, |census| census.claim(page).page_type() as usize);
            cell.types[kind] += 1;
        }
        Ok(())
    }

    fn end(self, _: &Member) -> Vec<MapCell> {
        self.cells
    }
}
