//! One VM's memory, as the half of the engine sees it that has only numbers.
//!
//! The engine has two halves. One *has guests' memory*: it reads pages, write-protects, compares and remaps them,
//! and proves by the page map which pages are private. The other *has numbers*: indexes, the sharers of frames,
//! budgets, policies. All that passes between them is the plain data of this file: page numbers, digests, contents
//! as bytes, and orders for runs of pages with what became of them. So each half can be in a process of its own.
//! [`local`](crate::memory::local) is the half that is in the same process. A [log](crate::changes::ChangeLog) of what
//! was written comes with the memory.
//!
//! No answer about contents is proof but that of [`GuestMemory::remap`] and [`GuestMemory::restore`], which compare
//! under write protection. Everything else says where to look: a guest may write to its pages at any time.

#![expect(unsafe_code, reason = "states who may read the bytes of pages")]

use std::cmp;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::time::Duration;

use crate::memory::content::{Page, Snapshot};
use crate::memory::pagemap::Entry;
use crate::memory::ram::PAGE_SIZE;
use crate::numbers::{Digest, Frame};

/// The longest run handled in one window: it bounds how long a writer waits. A window of 512 pages took 3 ms,
/// one of 128 takes 0.8, and the calls cost each page as good as nothing in both.
pub const WINDOW_PAGES: u32 = 128;

/// What pages are mapped from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Consecutive frames of the store, from this number on.
    Frames(Frame),
    /// Fresh anonymous memory, which reads as zeros.
    Zeros,
}

/// Which of the pages to be mapped anew may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Those whose contents are those of the source, compared under write protection.
    Identical,
    /// All: their contents are no longer wanted.
    Any,
    /// Those that provably show the frames that they are mapped to: nobody has written to them since.
    Unwritten,
}

/// An order to map a run of pages anew.
#[derive(Clone, Copy, Debug)]
pub struct Remap {
    /// The first page.
    pub first: u32,
    /// How many pages: at most [`WINDOW_PAGES`], and not none.
    pub count: u32,
    /// What they are mapped from then.
    pub source: Source,
    /// Which of them: the first for which it holds, up to one for which it does not.
    pub rule: Rule,
    /// So many of the first pages are mapped from the source already, and only have private copies.
    pub copies: u32,
}

/// What became of an order for a run of pages.
#[derive(Debug)]
#[must_use]
pub struct Remapped {
    /// So many of the first pages have another mapping now.
    pub pages: u32,
    /// What went wrong, with these pages or with others.
    pub error: Option<SpaceError>,
}

impl Remapped {
    /// Returns how many pages have another mapping now. To be called once the metadata tells of them.
    ///
    /// # Errors
    /// Fails with what went wrong.
    pub(crate) fn end(self) -> Result<u32, SpaceError> {
        self.error.map_or(Ok(self.pages), Err)
    }
}

/// Why a run was not remapped.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    /// The kernel refused; the guest's memory is as it was.
    #[error("{doing} {count} pages at page {first}: {error}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// First page of the run.
        first: u32,
        /// Pages of the run.
        count: u32,
        /// The kernel's answer.
        #[source]
        error: io::Error,
    },
    /// The kernel unmapped the pages, refused the new mapping, and refused it again; or it left
    /// pages protected. The guest must not run on.
    #[error("guest memory was lost: {doing} {count} pages at page {first}: {error}")]
    Lost {
        /// What was being done.
        doing: &'static str,
        /// First page of the run.
        first: u32,
        /// Pages of the run.
        count: u32,
        /// The kernel's answer.
        #[source]
        error: io::Error,
    },
}

/// The bytes of consecutive pages: in a guest's memory, or in a buffer that they were sent in.
#[derive(Clone, Copy, Debug)]
pub struct Bytes<'a> {
    first: *const u8,
    pages: u32,
    lasts: PhantomData<&'a [u8]>,
}

impl Bytes<'_> {
    /// Names the bytes of so many pages.
    ///
    /// # Safety
    /// They are mapped and readable as long as the value lasts. Others may write to them meanwhile.
    #[must_use]
    pub unsafe fn new(first: *const u8, pages: u32) -> Self {
        Self { first, pages, lasts: PhantomData }
    }

    /// Names the bytes of pages that are the host's.
    pub(crate) fn of(pages: &[Snapshot]) -> Bytes<'_> {
        Bytes { first: pages.as_ptr().cast(), pages: pages.len() as u32, lasts: PhantomData }
    }

    /// Returns how many pages they are.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Returns where a page begins. The page may change while it is read, so it must not become a reference.
    #[must_use]
    pub fn page(&self, index: u32) -> *const u8 {
        debug_assert!(index < self.pages);
        self.first.wrapping_add(index as usize * PAGE_SIZE)
    }
}

/// What a run of pages is compared with, page by page.
#[derive(Clone, Copy, Debug)]
pub enum Like<'a> {
    /// Consecutive frames, from this one on. All of them are filled.
    Frames(Frame),
    /// Other pages. A page of zeros counts as different.
    Pages(Bytes<'a>),
}

/// Neighbours of a page that matched, to be compared with the neighbours of what it matched.
#[derive(Clone, Debug)]
pub struct Neighbours<'a> {
    /// The pages, in order.
    pub pages: Range<u32>,
    /// The same number of pages or frames, in order.
    pub like: Like<'a>,
    /// They lie behind the page that matched, and the comparison begins with the first. Otherwise they lie in front
    /// of it, and it begins with the last.
    pub is_ahead: bool,
    /// How far the one compared first is from the page that matched, in pages. 0 for that page itself.
    pub distance: u32,
}

/// What a page held when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Zeros.
    Zero,
    /// Content with this digest.
    Digest(Digest),
    /// Other content than zeros, of which no digest was asked for.
    Content,
}

/// A batch of pages to be read, and what was read. Reused from batch to batch.
#[derive(Default)]
pub struct Harvest {
    wanted: Vec<(u32, bool)>,
    seen: Vec<Seen>,
    contents: Vec<Snapshot>,
}

impl fmt::Debug for Harvest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harvest").field("wanted", &self.wanted).field("seen", &self.seen).finish()
    }
}

impl Harvest {
    /// Forgets what is in it.
    pub(crate) fn clear(&mut self) {
        self.wanted.clear();
        self.seen.clear();
    }

    /// Asks for a page, and its digest unless it holds zeros.
    pub(crate) fn want(&mut self, page: u32, digest: bool) {
        self.wanted.push((page, digest));
    }

    /// Returns the pages that were asked for, and whether their digests were.
    pub(crate) fn wanted(&self) -> &[(u32, bool)] {
        &self.wanted
    }

    /// Returns how many pages it has.
    pub(crate) fn len(&self) -> usize {
        self.wanted.len()
    }

    /// Returns a page, what it held, and its content.
    pub(crate) fn get(&self, index: usize) -> (u32, Seen, &Page) {
        (self.wanted[index].0, self.seen[index], &self.contents[index])
    }

    /// Notes what each page held. `read` copies a page, and says what it is.
    pub(crate) fn fill(&mut self, mut read: impl FnMut(u32, bool, &mut Snapshot) -> Seen) {
        if self.contents.len() < self.wanted.len() {
            self.contents.resize_with(self.wanted.len(), Snapshot::default);
        }
        self.seen.clear();
        for (&(page, digest), content) in self.wanted.iter().zip(&mut self.contents) {
            self.seen.push(read(page, digest, content));
        }
    }
}

/// One VM's memory. Page numbers count from the start of its RAM, and come from the engine, never from a guest:
/// numbers beyond the end panic.
pub trait GuestMemory: Send + Sync + fmt::Debug {
    /// Returns how many pages it has.
    fn pages(&self) -> u32;

    /// Returns where its first page is, in the address space of the process that has it mapped.
    fn address(&self) -> usize;

    /// Returns the number of the process that has it mapped.
    fn process(&self) -> u32 {
        std::process::id()
    }

    /// Whether a question takes as long as some ten pages: it goes to another process.
    fn is_far(&self) -> bool {
        false
    }

    /// Whether a part of it was lost, by a call that failed or because the host could not supply it, or its VM is
    /// about to be removed. What was read from it is nobody's content then.
    fn lost(&self) -> bool;

    /// Its VM no longer runs: nothing more is done to the memory, but that it is [emptied](Self::empty).
    fn leave(&self);

    /// Appends to `runs` the runs of `pages` that are private and hold more than the kernel's page of zeros.
    ///
    /// # Errors
    /// Fails if the page map cannot be read. `runs` may then have a part of the answer.
    fn private(&self, pages: Range<u32>, runs: &mut Vec<Range<u32>>) -> io::Result<()>;

    /// Reads the words of the page map for `pages`.
    ///
    /// # Errors
    /// Fails if the page map cannot be read.
    fn entries(&self, pages: Range<u32>, entries: &mut [Entry]) -> io::Result<()>;

    /// Whether [`huge`](Self::huge) has an answer on this kernel.
    fn tells_huge(&self) -> bool;

    /// Appends to `runs` the runs of `pages` that are private and parts of huge pages.
    ///
    /// # Errors
    /// As [`private`](Self::private).
    fn huge(&self, pages: Range<u32>, runs: &mut Vec<Range<u32>>) -> io::Result<()>;

    /// Has the kernel break up the huge page that begins with a page. Returns whether none is there any more.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    fn split(&self, first: u32) -> io::Result<bool>;

    /// Returns how many pages it is worth to harvest at once, before it is known whether the first of them match.
    fn batch(&self) -> u32;

    /// Reads pages.
    fn harvest(&self, harvest: &mut Harvest);

    /// Copies a page.
    fn read(&self, page: u32) -> Box<Snapshot>;

    /// Compares a page with the content of a page of the memory: as `content.cmp(page)`.
    fn order(&self, content: &Page, page: u32) -> cmp::Ordering;

    /// Returns how many of the pages from the first on hold zeros alone, up to one that does not.
    fn zeros(&self, pages: Range<u32>) -> u32;

    /// Returns how many neighbours match, up to one that does not. Of those that are far from the page that matched
    /// only some places are compared.
    fn matching(&self, neighbours: Neighbours<'_>) -> u32;

    /// Calls `take` once with the bytes of `pages`.
    fn contents(&self, pages: Range<u32>, take: &mut dyn FnMut(Bytes<'_>));

    /// Maps pages anew.
    fn remap(&self, remap: Remap) -> Remapped;

    /// Makes `pages`, at most [`WINDOW_PAGES`], anonymous memory of the VM's own, with the content that they have.
    /// They are one mapping with the anonymous memory around them. It is done to all of them, or to none.
    fn restore(&self, pages: Range<u32>) -> Remapped;

    /// Makes pages of a VM that has [left](Self::leave) untouched memory. `mapped` says whether some of them are
    /// mapped to frames.
    ///
    /// # Errors
    /// Fails if the kernel refuses. The call can be repeated.
    fn empty(&self, pages: Range<u32>, mapped: bool) -> io::Result<()>;

    /// Returns the longest time for which writers to a run were made to wait.
    fn longest_window(&self) -> Duration;
}
