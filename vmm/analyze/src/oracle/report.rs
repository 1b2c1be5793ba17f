//! The oracle's result. All counts are in pages of [`Report::page_bytes`] bytes, unless their name says
//! bytes. The JSON form uses these names.

use std::ops::AddAssign;

use samepage_sharing::PAGE_SIZE;
use serde::Serialize;

/// The possible savings of sharing, and their cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Size of a page in bytes.
    pub page_bytes: u64,
    /// The VMs in the order of feeding.
    pub images: Vec<ImageReport>,
    /// Sums over all VMs.
    pub total: Classes,
    /// Contents other than zeros that at least two pages have: the number of frames if all pages are merged.
    pub frames: u64,
    /// Pages that sharing saves, by the place of the identical pages.
    pub saved: Saved,
    /// Sum of [`Report::saved`].
    pub saved_pages: u64,
    /// The same in bytes, without the overhead of sharing (page tables, mappings, metadata).
    pub saved_bytes: u64,
    /// Runs of consecutive guest pages that lie on consecutive frames.
    pub runs: Runs,
    /// Savings for some budgets of mappings, longest runs first; ends with all runs.
    pub budgets: Vec<Budget>,
    /// Savings for many budgets, for drawing; starts at zero mappings and ends with all runs.
    pub curve: Vec<CurvePoint>,
}

/// One VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageReport {
    /// The name.
    pub name: String,
    /// The pages.
    #[serde(flatten)]
    pub classes: Classes,
    /// Savings within this VM. Savings together with other VMs (`between`) belong to no single VM and are 0
    /// here.
    pub saved: Saved,
}

/// Pages by class. Each page is in one class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Classes {
    /// All pages.
    pub pages: u64,
    /// Never touched: these pages take no memory and save none.
    pub untouched: u64,
    /// Not read, for example because they are swapped out.
    pub unread: u64,
    /// Full of zeros, and in memory.
    pub zero: u64,
    /// With content that at least two VMs have.
    pub between: u64,
    /// With content that at least two pages of only one VM have.
    pub within: u64,
    /// With unique content.
    pub unique: u64,
}

impl Classes {
    /// Returns the number of pages with content that at least two pages have. They would be mapped to frames.
    #[must_use]
    pub fn duplicated(&self) -> u64 {
        self.between + self.within
    }

    /// Returns the number of pages that take memory, as far as they were read.
    #[must_use]
    pub fn in_use(&self) -> u64 {
        self.zero + self.duplicated() + self.unique
    }
}

impl AddAssign for Classes {
    fn add_assign(&mut self, other: Self) {
        let Self { pages, untouched, unread, zero, between, within, unique } = other;
        self.pages = self.pages.saturating_add(pages);
        self.untouched = self.untouched.saturating_add(untouched);
        self.unread = self.unread.saturating_add(unread);
        self.zero += zero;
        self.between += between;
        self.within += within;
        self.unique += unique;
    }
}

/// Pages that sharing saves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Saved {
    /// Pages of zeros: they are freed and need neither frame nor mapping.
    pub zero: u64,
    /// Duplicates within VMs: the savings if VMs share nothing with each other.
    pub within: u64,
    /// The additional savings of sharing between VMs.
    pub between: u64,
}

impl Saved {
    /// Returns the sum in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.zero + self.within + self.between
    }

    /// Returns the sum in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE as u64
    }
}

/// Runs of consecutive guest pages on consecutive frames. Frames are assigned in guest order, VM after VM, to
/// the first page with each content that at least two pages have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Runs {
    /// Number of runs.
    pub runs: u64,
    /// Pages in runs: all pages with content that at least two pages have.
    pub pages: u64,
    /// Mappings for merging all runs.
    pub mappings: u64,
    /// Runs by length, shortest first.
    pub buckets: Vec<Bucket>,
}

/// Runs of similar length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bucket {
    /// Length of the shortest run, in pages.
    pub from_pages: u64,
    /// Length of the longest run, in pages; `None` without a limit.
    pub to_pages: Option<u64>,
    /// Number of runs.
    pub runs: u64,
    /// Pages in these runs.
    pub pages: u64,
    /// Mappings for these runs.
    pub mappings: u64,
}

/// The savings for a number of mappings.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Budget {
    /// Allowed mappings; `None` if all runs are merged.
    pub limit: Option<u64>,
    /// Used mappings: two for each merged run.
    pub mappings: u64,
    /// Pages on frames.
    pub pages: u64,
    /// Percentage of all pages that could be on frames.
    pub pages_percent: f64,
    /// Saved pages: pages on frames minus the frames, without pages of zeros.
    pub saved_pages: u64,
    /// The same in bytes.
    pub saved_bytes: u64,
    /// Percentage of the savings of all runs.
    pub saved_percent: f64,
}

/// A point of the curve of savings over mappings, without pages of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CurvePoint {
    /// Used mappings.
    pub mappings: u64,
    /// Saved bytes.
    pub saved_bytes: u64,
}
