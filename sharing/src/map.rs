//! A picture of a VM's memory: runs of pages, each summed up.

use std::io;

use serde::Serialize;

use crate::by_type::TYPES;
use crate::engine::Engine;
use crate::members::Flags;

/// A run of pages of a VM, summed up.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MapCell {
    /// Number of its first page.
    pub first_page: u64,
    /// How many there are.
    pub pages: u32,
    /// How many are on frames, have memory of their own, were given back, or none of these: never touched.
    pub states: [u32; 4],
    /// How many the guest says are of each type, in the order of [`samepage_hole::PageType::ALL`].
    pub types: [u32; TYPES],
}

impl Engine {
    /// A VM's memory in at most `cells` cells of the same size, but for the last; `None` for a slot without
    /// a VM.
    ///
    /// # Errors
    /// Where the page map cannot be read.
    pub fn map(&self, slot: usize, cells: u32) -> io::Result<Option<Vec<MapCell>>> {
        let Some(member) = self.members.get(slot) else { return Ok(None) };
        let space = &member.space;
        let pages = space.pages();
        let size = pages.div_ceil(cells.max(1)).max(1);
        let mut runs = Vec::new();
        if !space.lost() {
            space.private(0..pages, &self.pagemap, &mut runs)?;
        }
        let mut private = runs.into_iter().flatten().peekable();
        let census = space.backing().census();
        let cell = |first: u32| {
            let end = pages.min(first.saturating_add(size));
            let mut cell = MapCell { first_page: first.into(), pages: end - first, ..MapCell::default() };
            for page in first..end {
                // A page that has just left its frame is still on the books.
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
            cell
        };
        Ok(Some((0..pages).step_by(size as usize).map(cell).collect()))
    }
}
