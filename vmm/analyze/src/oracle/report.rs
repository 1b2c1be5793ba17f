//! What the oracle found. All counts are of pages of [`Report::page_bytes`] bytes unless their name
//! says bytes; the JSON form has these names.

use std::ops::AddAssign;

use samepage_sharing::PAGE_SIZE;
use serde::Serialize;

/// What sharing could save, and what it would take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Size of a page, in bytes.
    pub page_bytes: u64,
    /// The VMs, in the order in which they were fed.
    pub images: Vec<ImageReport>,
    /// Sums over all VMs.
    pub total: Classes,
    /// Contents, other than zeros, that exist at least twice: frames that merging all would take.
    pub frames: u64,
    /// Pages that sharing saves, by where their likes are.
    pub saved: Saved,
    /// Sum of [`Report::saved`].
    pub saved_pages: u64,
    /// The same in bytes, before what sharing itself takes (page tables, mappings, metadata).
    pub saved_bytes: u64,
    /// Runs of consecutive guest pages that lie on consecutive frames.
    pub runs: Runs,
    /// What a budget of mappings buys, longest runs first; ends with all runs.
    pub budgets: Vec<Budget>,
    /// The same at many budgets, for drawing: starts at none, ends with all runs.
    pub curve: Vec<CurvePoint>,
}

/// One VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageReport {
    /// What it was called.
    pub name: String,
    /// Its pages.
    #[serde(flatten)]
    pub classes: Classes,
    /// What can be saved in it by itself. What it saves together with others (`between`) belongs
    /// to no single VM and is 0 here.
    pub saved: Saved,
}

/// Pages by class; each page is in one class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Classes {
    /// All pages.
    pub pages: u64,
    /// Never touched: they take no memory and save none.
    pub untouched: u64,
    /// Not looked at, such as swapped out.
    pub unread: u64,
    /// In memory, but full of zeros.
    pub zero: u64,
    /// Content that exists in at least two VMs.
    pub between: u64,
    /// Content that exists at least twice, but in one VM alone.
    pub within: u64,
    /// Content that exists once.
    pub unique: u64,
}

impl Classes {
    /// Pages with content that exists at least twice: those that would lie on frames.
    #[must_use]
    pub fn alike(&self) -> u64 {
        self.between + self.within
    }

    /// Pages that take memory, as far as they were looked at.
    #[must_use]
    pub fn in_use(&self) -> u64 {
        self.zero + self.alike() + self.unique
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
    /// Pages of zeros: they are given back and need neither frame nor mapping.
    pub zero: u64,
    /// Duplicates inside VMs: what is saved even where VMs share nothing with each other.
    pub within: u64,
    /// What sharing between VMs saves beyond that.
    pub between: u64,
}

impl Saved {
    /// Sum.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.zero + self.within + self.between
    }

    /// Sum, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE as u64
    }
}

/// Runs of consecutive guest pages on consecutive frames, where frames are handed out in guest
/// order: to the first page with each content that exists at least twice, VM after VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Runs {
    /// Number of runs.
    pub runs: u64,
    /// Pages in them: all whose content exists at least twice.
    pub pages: u64,
    /// Mappings that merging all of them costs.
    pub mappings: u64,
    /// By length, shortest first.
    pub buckets: Vec<Bucket>,
}

/// Runs of similar length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bucket {
    /// Length of the shortest, in pages.
    pub from_pages: u64,
    /// Length of the longest, in pages; none where there is no limit.
    pub to_pages: Option<u64>,
    /// Number of runs.
    pub runs: u64,
    /// Pages in them.
    pub pages: u64,
    /// Mappings they cost.
    pub mappings: u64,
}

/// What a number of mappings buys.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Budget {
    /// Mappings allowed; none where all runs are merged.
    pub limit: Option<u64>,
    /// Mappings used: two for each run merged.
    pub mappings: u64,
    /// Pages that lie on frames.
    pub pages: u64,
    /// Of all pages that could, in percent.
    pub pages_percent: f64,
    /// Pages saved: those on frames, less the frames. Pages of zeros are not in it.
    pub saved_pages: u64,
    /// The same in bytes.
    pub saved_bytes: u64,
    /// Of what all runs together save, in percent.
    pub saved_percent: f64,
}

/// A point of the curve of savings over mappings. Pages of zeros are not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CurvePoint {
    /// Mappings used.
    pub mappings: u64,
    /// Bytes saved with them.
    pub saved_bytes: u64,
}
