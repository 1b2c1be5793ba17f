//! Memory with known content, which can be verified later.
//!
//! Pages of content are aligned to pages of the machine, so two guests with the same seed have the same
//! content in the same number of page frames. Positions count in pages of [`PAGE_SIZE`] bytes.

use crate::content::{self, PAGE_SIZE};
use std::hint::black_box;

#[repr(C, align(4096))]
#[derive(Clone, Copy)]
struct Page([u8; PAGE_SIZE]);

/// The source of content: page `index` of the stream of `seed`.
#[derive(Clone, Copy)]
struct Origin {
    seed: u64,
    index: u64,
}

/// All filled memory, with the source of each page.
#[derive(Default)]
pub struct Memory {
    // One allocation for each fill, because growing a vector would copy and free the earlier pages.
    fills: Vec<Vec<Page>>,
    origins: Vec<Vec<Origin>>,
}

/// A page has other content than was written.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "page {page} of fill {fill} (seed {seed}) differs at byte {offset}: expected {expected:#04x}, found {found:#04x}"
)]
pub struct Mismatch {
    /// The fill that the page belongs to, counted from 0.
    pub fill: usize,
    /// The page's number within its fill.
    pub page: usize,
    /// The seed of the content.
    pub seed: u64,
    /// The first different byte of the page.
    pub offset: usize,
    /// The written byte.
    pub expected: u8,
    /// The present byte.
    pub found: u8,
}

impl Memory {
    /// Allocates `pages` pages and fills them from the start of the stream of `seed`. Every page is written,
    /// even with zeros.
    pub fn fill(&mut self, pages: usize, seed: u64) {
        let mut fill: Vec<Page> = Vec::with_capacity(pages);
        for index in 0..pages as u64 {
            fill.push(Page([0; PAGE_SIZE]));
            if let Some(page) = fill.last_mut() {
                content::fill(seed, index, &mut page.0);
                black_box(&page.0);
            }
        }
        self.fills.push(fill);
        self.origins.push((0..pages as u64).map(|index| Origin { seed, index }).collect());
    }

    /// Overwrites the first of every `every` pages with the same page of the stream of `seed`. Returns the
    /// number of overwritten pages. An `every` of 0 counts as 1.
    pub fn change(&mut self, every: usize, seed: u64) -> usize {
        let mut changed = 0;
        for (fill, origins) in self.fills.iter_mut().zip(&mut self.origins) {
            for (page, origin) in fill.iter_mut().zip(origins).step_by(every.max(1)) {
                origin.seed = seed;
                content::fill(seed, origin.index, &mut page.0);
                black_box(&page.0);
                changed += 1;
            }
        }
        changed
    }

    /// Frees all memory, and returns the number of pages.
    pub fn release(&mut self) -> usize {
        let pages = self.fills.iter().map(Vec::len).sum();
        *self = Self::default();
        pages
    }

    /// Compares every page with the last written content, and returns the number of pages.
    ///
    /// # Errors
    /// Fails with the first page that differs.
    pub fn verify(&self) -> Result<usize, Mismatch> {
        let mut expected = Page([0; PAGE_SIZE]);
        let mut pages = 0;
        for (fill, (contents, origins)) in self.fills.iter().zip(&self.origins).enumerate() {
            for (page, (content, origin)) in contents.iter().zip(origins).enumerate() {
                content::fill(origin.seed, origin.index, &mut expected.0);
                // Prevents the compiler from using what it knows about the writes.
                let found = black_box(&content.0);
                if *found != expected.0 {
                    let offset = found.iter().zip(&expected.0).position(|(a, b)| a != b).unwrap_or(0);
                    return Err(Mismatch {
                        fill,
                        page,
                        seed: origin.seed,
                        offset,
                        expected: expected.0[offset],
                        found: found[offset],
                    });
                }
                pages += 1;
            }
        }
        Ok(pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_is_found_again() {
        let mut memory = Memory::default();
        assert_eq!(memory.verify(), Ok(0));
        memory.fill(3, 7);
        memory.fill(2, 0);
        assert_eq!(memory.verify(), Ok(5));
    }

    #[test]
    fn changed_pages_are_expected_to_have_changed() {
        let mut memory = Memory::default();
        memory.fill(10, 7);
        let before = memory.fills[0][3].0;
        assert_eq!(memory.change(3, 8), 4);
        assert_ne!(memory.fills[0][3].0, before);
        assert_eq!(memory.verify(), Ok(10));
        assert_eq!(memory.change(0, 7), 10);
        assert_eq!(memory.fills[0][3].0, before);
    }

    #[test]
    fn nothing_is_left_of_released_memory() {
        let mut memory = Memory::default();
        memory.fill(3, 7);
        memory.fill(2, 0);
        assert_eq!((memory.release(), memory.verify()), (5, Ok(0)));
    }

    #[test]
    fn a_wrong_byte_is_named() {
        let mut memory = Memory::default();
        memory.fill(1, 7);
        memory.fill(2, 0);
        memory.fills[1][1].0[4095] = 1;
        assert_eq!(
            memory.verify(),
            Err(Mismatch { fill: 1, page: 1, seed: 0, offset: 4095, expected: 0, found: 1 })
        );
    }

    #[test]
    fn pages_lie_on_pages() {
        let mut memory = Memory::default();
        memory.fill(2, 7);
        assert!(memory.fills[0].iter().all(|page| (&raw const *page).addr().is_multiple_of(PAGE_SIZE)));
    }
}
