//! One VM's pages and the frames that they are on: what each page's mapping refers to, with the orders to its
//! [memory](GuestMemory) that change it.
//!
//! The states of a page are those of [`backing`](crate::frames::backing). The frame that a page has provably
//! left may hold another content by now, so nothing may drop the private copy but a new mapping.

use std::ops::Range;
use std::sync::Arc;

use crate::frames::backing::Backing;
use crate::frames::page_types::Census;
use crate::frames::store::FrameStore;
use crate::memory::guest::{GuestMemory, Remap, Remapped, Rule, Source};
pub use crate::memory::guest::{SpaceError, WINDOW_PAGES};
use crate::numbers::Frame;

/// What is called, once, when a part of a VM's memory was lost: the VM must not run on.
pub type LostHandler = Box<dyn Fn(&SpaceError) + Send>;

/// One VM's pages and what they are mapped from.
#[derive(Debug)]
pub struct Space {
    memory: Arc<dyn GuestMemory>,
    backing: Backing,
}

impl Space {
    /// Pages of memory, all of it anonymous.
    #[must_use]
    pub fn new(memory: Arc<dyn GuestMemory>) -> Self {
        Self { backing: Backing::new(memory.pages()), memory }
    }

    /// The memory that the pages are in.
    #[must_use]
    pub fn memory(&self) -> &Arc<dyn GuestMemory> {
        &self.memory
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.backing.pages()
    }

    /// The frame that the page's mapping refers to, whether or not the page has left it.
    #[must_use]
    pub fn refers(&self, page: u32) -> Option<Frame> {
        self.backing.refers(page)
    }

    /// What each page is mapped from.
    pub(crate) fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Has it noted from now on what the guest says of its pages.
    pub(crate) fn take_census(&mut self) {
        self.backing.take_census();
    }

    /// What the guest says of its pages, where it does.
    pub(crate) fn census_mut(&mut self) -> Option<&mut Census> {
        self.backing.census_mut()
    }

    /// Makes the note of a page that is not attached.
    pub(crate) fn set_note(&mut self, page: u32, note: u32) {
        self.backing.set_note(page, note);
    }

    /// Whether the page is counted among the sharers of the frame it refers to.
    #[must_use]
    pub fn attached(&self, page: u32) -> bool {
        self.backing.attached(page)
    }

    /// Pages that are attached to frames.
    #[must_use]
    pub fn attached_count(&self) -> u32 {
        self.backing.attached_count()
    }

    /// How many mappings the kernel needs for this RAM.
    #[must_use]
    pub fn mappings(&self) -> u32 {
        self.backing.mappings()
    }

    /// Whether nothing is done to the memory any more: see [`GuestMemory::lost`].
    #[must_use]
    pub fn lost(&self) -> bool {
        self.memory.lost()
    }

    /// Bytes that the metadata takes.
    #[must_use]
    pub fn metadata_bytes(&self) -> usize {
        self.backing.bytes()
    }

    /// Gives up the frame of a page that provably has a private copy. Returns the frame if this
    /// page was its last sharer.
    pub fn detach(&mut self, page: u32, store: &mut FrameStore) -> Option<Frame> {
        let frame = self.backing.leave(page);
        store.detach(frame).then_some(frame)
    }

    /// How many more mappings the kernel will need once the pages are mapped from `source`.
    #[must_use]
    pub fn mappings_added(&self, first: u32, count: u32, source: Source) -> i64 {
        self.backing.mappings_added(first, count, source)
    }

    /// Maps the frames `frame..frame + count` over the pages from `first` on, as far as their
    /// contents are equal, and attaches those pages. Returns how many they are.
    ///
    /// None of the pages may be attached, all of the frames must be live, and `count` is at most
    /// [`WINDOW_PAGES`].
    ///
    /// # Errors
    /// See [`SpaceError`].
    pub fn merge(
        &mut self,
        first: u32,
        frame: Frame,
        count: u32,
        store: &mut FrameStore,
    ) -> Result<u32, SpaceError> {
        debug_assert!((first..first + count).all(|page| !self.attached(page)));
        let merged = self.remap(first, count, Source::Frames(frame), Rule::Identical);
        frame.run(merged.pages).for_each(|frame| store.attach(frame));
        merged.end()
    }

    /// Maps the frames `frame..frame + count` over pages that are attached to others, as far as their
    /// contents are equal, and attaches the pages to them. Returns how many they are, and appends to
    /// `dead` the frames whose last sharers left.
    ///
    /// All of the pages must be attached, all of the frames live, and `count` is at most
    /// [`WINDOW_PAGES`].
    ///
    /// # Errors
    /// See [`SpaceError`].
    pub(crate) fn change_frames(
        &mut self,
        first: u32,
        frame: Frame,
        count: u32,
        store: &mut FrameStore,
        dead: &mut Vec<Frame>,
    ) -> Result<u32, SpaceError> {
        debug_assert!((first..first + count).all(|page| self.attached(page)));
        self.map_over(first, frame, count, Rule::Identical, store, dead)
    }

    /// Maps the frames `frame..frame + count` over pages whose content is no longer wanted, and attaches
    /// the pages to them. Returns how many of the first these are: all, but for kernels that cannot
    /// protect unpopulated pages. Appends to `dead` the frames whose last sharers left.
    ///
    /// All of the frames must be live, and `count` is at most [`WINDOW_PAGES`].
    ///
    /// # Errors
    /// See [`SpaceError`].
    pub(crate) fn deliver(
        &mut self,
        first: u32,
        frame: Frame,
        count: u32,
        store: &mut FrameStore,
        dead: &mut Vec<Frame>,
    ) -> Result<u32, SpaceError> {
        self.map_over(first, frame, count, Rule::Any, store, dead)
    }

    fn map_over(
        &mut self,
        first: u32,
        frame: Frame,
        count: u32,
        rule: Rule,
        store: &mut FrameStore,
        dead: &mut Vec<Frame>,
    ) -> Result<u32, SpaceError> {
        let attached = |page: u32| self.refers(page).filter(|_| self.attached(page));
        let before: Vec<_> = (first..first + count).map(attached).collect();
        let mapped = self.remap(first, count, Source::Frames(frame), rule);
        for (frame, before) in frame.run(mapped.pages).zip(before) {
            store.attach(frame);
            dead.extend(before.filter(|&before| store.detach(before)));
        }
        mapped.end()
    }

    /// Frees the memory of pages that hold zeros alone, as far as they do. Returns how many.
    ///
    /// None of the pages may be attached, and `count` is at most [`WINDOW_PAGES`].
    ///
    /// # Errors
    /// See [`SpaceError`].
    pub fn discard_zeros(&mut self, first: u32, count: u32) -> Result<u32, SpaceError> {
        debug_assert!((first..first + count).all(|page| !self.attached(page)));
        self.remap(first, count, Source::Zeros, Rule::Identical).end()
    }

    /// Frees the memory of pages whose content nobody wants, as far as they provably still show the
    /// frames that they are attached to: nobody has written to them since. Returns how many of the first
    /// these are; they are anonymous memory then, and read as zeros. Appends to `left` their frames, and to
    /// `dead` those whose last sharers left.
    ///
    /// All of the pages must be attached, and `count` is at most [`WINDOW_PAGES`].
    ///
    /// # Errors
    /// See [`SpaceError`].
    pub(crate) fn discard_unwritten(
        &mut self,
        first: u32,
        count: u32,
        store: &mut FrameStore,
        left: &mut Vec<Frame>,
        dead: &mut Vec<Frame>,
    ) -> Result<u32, SpaceError> {
        debug_assert!((first..first + count).all(|page| self.attached(page)));
        let frames: Vec<_> = self.backing.frames(first..first + count).collect();
        let discarded = self.remap(first, count, Source::Zeros, Rule::Unwritten);
        for frame in frames.into_iter().take(discarded.pages as usize) {
            left.push(frame);
            if store.detach(frame) {
                dead.push(frame);
            }
        }
        discarded.end()
    }

    /// Frees the memory of pages whose content nobody wants, whatever they are mapped to. Returns how many of the
    /// first these are: all, but for kernels that cannot protect unpopulated pages. They are untouched memory then.
    /// Appends to `dead` the frames whose last sharers left.
    ///
    /// `count` is at most [`WINDOW_PAGES`].
    ///
    /// # Errors
    /// See [`SpaceError`].
    pub(crate) fn discard(
        &mut self,
        first: u32,
        count: u32,
        store: &mut FrameStore,
        dead: &mut Vec<Frame>,
    ) -> Result<u32, SpaceError> {
        let attached = |page: u32| self.refers(page).filter(|_| self.attached(page));
        let before: Vec<_> = (first..first + count).map(attached).collect();
        let discarded = self.remap(first, count, Source::Zeros, Rule::Any);
        for frame in before.into_iter().take(discarded.pages as usize).flatten() {
            if store.detach(frame) {
                dead.push(frame);
            }
        }
        discarded.end()
    }

    /// Makes pages the VM's own again: anonymous memory with the content that they have, one mapping
    /// with the anonymous memory around them. Appends to `dead` the frames whose last sharers left.
    ///
    /// `count` is at most [`WINDOW_PAGES`].
    ///
    /// # Errors
    /// See [`SpaceError`].
    pub(crate) fn restore(
        &mut self,
        first: u32,
        count: u32,
        store: &mut FrameStore,
        dead: &mut Vec<Frame>,
    ) -> Result<(), SpaceError> {
        let restored = self.memory.restore(first..first + count);
        for page in first..first + restored.pages {
            if self.attached(page) {
                dead.extend(self.detach(page, store));
            }
        }
        if restored.pages > 0 {
            self.backing.make_anonymous(first, restored.pages);
        }
        restored.end().map(drop)
    }

    /// Gives an order, and notes what has become of the pages: they show `source` from now on, whether or not they
    /// can be written.
    fn remap(&mut self, first: u32, count: u32, source: Source, rule: Rule) -> Remapped {
        let copies = self.copies(first, count, source);
        let remapped = self.memory.remap(Remap { first, count, source, rule, copies });
        match source {
            _ if remapped.pages == 0 => {}
            Source::Frames(frame) => self.backing.attach(first, frame, remapped.pages),
            Source::Zeros => {
                for page in first..first + remapped.pages {
                    if self.attached(page) {
                        self.backing.leave(page);
                    }
                }
                self.backing.make_anonymous(first, remapped.pages);
            }
        }
        remapped
    }

    /// How many of the first pages show exactly `source` again once their private copies are dropped.
    fn copies(&self, first: u32, count: u32, source: Source) -> u32 {
        let shows = |&index: &u32| match source {
            Source::Frames(frame) => self.refers(first + index) == Some(frame + index),
            Source::Zeros => self.refers(first + index).is_none(),
        };
        (0..count).take_while(shows).count() as u32
    }

    /// Pages, none of which are attached, are anonymous memory again, with nothing in it.
    pub(crate) fn emptied(&mut self, pages: Range<u32>) {
        self.backing.make_anonymous(pages.start, pages.end - pages.start);
    }
}
