//! The upper limit for the savings of sharing, computed from the contents of several VMs' memory. The
//! engine's results are measured against this offline oracle.
//!
//! Pages of 4 KiB are fed VM by VM in guest order. The oracle keeps only a keyed 64-bit digest of each page.
//! Different contents with the same digest count as one. For 64 GiB of distinct pages, the probability of
//! even one such collision is below 1 in 100,000. Without the key, no guest can prepare collisions. This
//! suffices for an estimate. The engine acts on its findings, so it always compares contents.
//!
//! ```
//! use samepage_analyze::oracle::{Oracle, PAGE_SIZE};
//!
//! let mut oracle = Oracle::new()?;
//! for name in ["one", "two"] {
//!     let mut image = oracle.image(name);
//!     image.page(&[7; PAGE_SIZE])?;
//!     image.page(&[0; PAGE_SIZE])?;
//!     image.untouched(30);
//! }
//! let report = oracle.report();
//! assert_eq!((report.saved.zero, report.saved.between), (2, 1));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Memory: 17 to 22 bytes for each page that is neither untouched nor zero, and 28 bytes while the table of
//! contents grows. For 64 GiB, this is below 450 MiB.

mod report;
mod runs;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};
use std::ops::AddAssign;

use hashbrown::HashTable;
use thiserror::Error;
use twox_hash::xxhash3_64;

pub use report::{Bucket, Budget, Classes, CurvePoint, ImageReport, Report, Runs, Saved};
pub use samepage_sharing::PAGE_SIZE;

/// Length of the key, which is XXH3's secret, in bytes.
const KEY_BYTES: usize = 192;
/// Limit for pages that are neither untouched nor zero: their numbers have 32 bits.
const MOST_PAGES: usize = u32::MAX as usize;

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// There are more pages than 32-bit page numbers allow.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("there are more than 16 TiB of pages that are not zero, the most that can be counted at a time")]
pub struct TooManyPages;

/// Collects pages; see the [module](self).
pub struct Oracle {
    key: [u8; KEY_BYTES],
    /// All pages that are neither untouched nor zero, in the order of feeding. The first page with a content
    /// has the content's digest here. Each other page has the number of that first page.
    pages: Vec<u64>,
    /// A mark for each of these pages.
    marks: Vec<Mark>,
    /// The first page with each content, by digest.
    contents: HashTable<u32>,
    /// Ranges of pages without gaps.
    stretches: Vec<Stretch>,
    images: Vec<ImageReport>,
    saved: Saved,
}

/// Facts about a page, and in the first page with a content, about the content.
#[derive(Clone, Copy)]
struct Mark(u32);

impl Mark {
    /// An earlier page has the same content.
    const REPEAT: u32 = 1 << 31;
    /// At least two pages have the content.
    const DUPLICATED: u32 = 1 << 30;
    /// At least two VMs have the content.
    const BETWEEN: u32 = 1 << 29;
    /// The other bits: the last VM with the content.
    const IMAGE: u32 = Self::BETWEEN - 1;

    fn has(self, flag: u32) -> bool {
        self.0 & flag != 0
    }
}

/// Consecutive guest pages of one VM that are neither untouched nor zero.
#[derive(Clone, Copy)]
struct Stretch {
    image: u32,
    /// Index of the first page in [`Oracle::pages`]. The stretch ends where the next one begins, or at the
    /// end.
    first: u32,
}

impl std::fmt::Debug for Oracle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key must not appear in logs.
        f.debug_struct("Oracle").field("images", &self.images.len()).finish_non_exhaustive()
    }
}

impl Oracle {
    /// Returns an empty oracle with a fresh random key.
    ///
    /// # Errors
    /// Fails if the kernel's random numbers cannot be read.
    pub fn new() -> io::Result<Self> {
        let mut key = [0; KEY_BYTES];
        File::open("/dev/urandom")?.read_exact(&mut key)?;
        Ok(Self {
            key,
            pages: Vec::new(),
            marks: Vec::new(),
            contents: HashTable::new(),
            stretches: Vec::new(),
            images: Vec::new(),
            saved: Saved::default(),
        })
    }

    /// Starts the next VM. Its pages must be fed in guest order.
    ///
    /// # Panics
    /// Panics above 500 million VMs.
    pub fn image(&mut self, name: impl Into<String>) -> Image<'_> {
        let index = self.images.len() as u32;
        assert!(index < Mark::IMAGE, "too many VMs");
        self.images.push(ImageReport {
            name: name.into(),
            classes: Classes::default(),
            saved: Saved::default(),
        });
        Image { index, adjacent: false, oracle: self }
    }

    /// Counts all pages. To be called after the last page.
    #[must_use]
    pub fn report(self) -> Report {
        let Self { mut pages, marks, contents, stretches, mut images, mut saved, key: _ } = self;
        // The following steps need this memory.
        drop(contents);
        let mut runs = runs::Collector::default();
        let mut frames: u32 = 0;
        for (index, stretch) in stretches.iter().enumerate() {
            let end = stretches.get(index + 1).map_or(pages.len(), |next| next.first as usize);
            let classes = &mut images[stretch.image as usize].classes;
            for page in stretch.first as usize..end {
                let repeat = marks[page].has(Mark::REPEAT);
                let first = if repeat { pages[page] as usize } else { page };
                if !marks[first].has(Mark::DUPLICATED) {
                    classes.unique += 1;
                    runs.end();
                    continue;
                }
                if marks[first].has(Mark::BETWEEN) {
                    classes.between += 1;
                } else {
                    classes.within += 1;
                }
                // From here on, the first page has its frame in place of its digest.
                if !repeat {
                    pages[page] = frames.into();
                    frames += 1;
                }
                runs.page(pages[first] as u32);
            }
            runs.end();
        }
        drop((pages, marks));

        let mut total = Classes::default();
        for image in &images {
            total += image.classes;
            saved.zero += image.saved.zero;
            saved.within += image.saved.within;
        }
        let (runs, budgets, curve) = runs.summarise(frames);
        Report {
            page_bytes: PAGE_SIZE as u64,
            saved_pages: saved.pages(),
            saved_bytes: saved.bytes(),
            images,
            total,
            frames: frames.into(),
            saved,
            runs,
            budgets,
            curve,
        }
    }

    /// Records a page's digest.
    fn note(&mut self, digest: u64, image: u32, adjacent: bool) -> Result<(), TooManyPages> {
        let Self { pages, marks, contents, stretches, images, saved, .. } = self;
        let page =
            u32::try_from(pages.len()).ok().filter(|_| pages.len() < MOST_PAGES).ok_or(TooManyPages)?;
        if !adjacent {
            stretches.push(Stretch { image, first: page });
        }
        match contents.find(digest, |&first| pages[first as usize] == digest) {
            Some(&first) => {
                let mark = &mut marks[first as usize];
                if mark.0 & Mark::IMAGE == image {
                    images[image as usize].saved.within += 1;
                } else {
                    saved.between += 1;
                    mark.0 = (mark.0 & !Mark::IMAGE) | Mark::BETWEEN | image;
                }
                mark.0 |= Mark::DUPLICATED;
                pages.push(first.into());
                marks.push(Mark(Mark::REPEAT));
            }
            None => {
                pages.push(digest);
                marks.push(Mark(image));
                contents.insert_unique(digest, page, |&first| pages[first as usize]);
            }
        }
        Ok(())
    }
}

/// One VM's memory, while it is fed to an [`Oracle`].
#[derive(Debug)]
pub struct Image<'a> {
    oracle: &'a mut Oracle,
    index: u32,
    /// Whether the previous page was fed and was neither untouched nor zero.
    adjacent: bool,
}

impl Image<'_> {
    /// Feeds the next page.
    ///
    /// # Errors
    /// Fails if there are too many pages.
    pub fn page(&mut self, page: &[u8; PAGE_SIZE]) -> Result<(), TooManyPages> {
        let index = self.index as usize;
        if *page == ZEROS {
            self.adjacent = false;
            let image = &mut self.oracle.images[index];
            image.classes.zero += 1;
            image.saved.zero += 1;
            image.classes.pages += 1;
            return Ok(());
        }
        let digest = xxhash3_64::Hasher::oneshot_with_secret(&self.oracle.key, page)
            .expect("the key is longer than the 136 bytes XXH3 asks for");
        self.oracle.note(digest, self.index, self.adjacent)?;
        self.oracle.images[index].classes.pages += 1;
        self.adjacent = true;
        Ok(())
    }

    /// Skips pages that were never touched. They read as zeros and take no memory.
    pub fn untouched(&mut self, pages: u64) {
        self.add(pages, Classes { pages, untouched: pages, ..Classes::default() });
    }

    /// Skips pages that exist but were not read. Their content is unknown.
    pub fn unread(&mut self, pages: u64) {
        self.add(pages, Classes { pages, unread: pages, ..Classes::default() });
    }

    /// Records that the next page is not adjacent to the previous one in guest memory.
    pub fn gap(&mut self) {
        self.adjacent = false;
    }

    fn add(&mut self, pages: u64, classes: Classes) {
        if pages > 0 {
            self.adjacent = false;
            self.oracle.images[self.index as usize].classes.add_assign(classes);
        }
    }
}
