//! One VM's RAM as the engine rearranges it: which frame each page's mapping refers to, and the
//! window in which a run of pages is protected, compared and remapped.
//!
//! The states of a page are those of [`backing`](crate::memory::backing). The frame that a page has provably
//! left may hold another content by now, so nothing may drop the private copy but a new mapping.

#![expect(unsafe_code, reason = "compares guest pages by address")]

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::memory::backing::Backing;
use crate::memory::calls::{MemoryCalls, Source};
use crate::memory::content;
use crate::memory::page_types::Census;
use crate::memory::pagemap::{Entry, Pagemap};
use crate::memory::ram::{Ram, RamRange};
use crate::memory::store::{Frame, FrameStore};
use crate::memory::window::{MapError, Remapped, Window, protect};

/// The longest run handled in one window: it bounds how long a writer waits. A window of 512 pages took 3 ms,
/// one of 128 takes 0.8, and the calls cost each page as good as nothing in both.
pub const WINDOW_PAGES: u32 = 128;

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
        /// Fails if the kernel refuses.
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
        /// Fails if the kernel refuses.
        #[source]
        error: io::Error,
    },
}

/// Pages that have another mapping now, and what went wrong after that.
#[must_use]
struct Replaced {
    pages: u32,
    lost: Option<SpaceError>,
}

impl Replaced {
    /// To be called once the metadata tells of the pages.
    fn end(self) -> Result<u32, SpaceError> {
        self.lost.map_or(Ok(self.pages), Err)
    }
}

/// What is called, once, when a part of a VM's memory was lost: the VM must not run on.
pub type LostHandler = Box<dyn Fn(&SpaceError) + Send>;

/// One VM's RAM and what its pages are mapped from.
#[derive(Debug)]
pub struct Space {
    ram: Arc<Ram>,
    backing: Backing,
    /// Parts that failed calls tore out.
    holes: Vec<Range<u32>>,
    /// The VM is about to be removed.
    leaving: bool,
    /// The longest window so far.
    longest_window: Duration,
}

impl Space {
    /// Takes RAM under management: all of it anonymous, as [`Ram::reserve`] made it.
    ///
    /// # Errors
    /// Fails if the kernel refuses to register it with userfaultfd.
    pub fn new(ram: Arc<Ram>, calls: &dyn MemoryCalls) -> io::Result<Self> {
        let pages = ram.pages();
        calls.register(ram.range(0, pages))?;
        Ok(Self {
            backing: Backing::new(pages),
            holes: Vec::new(),
            leaving: false,
            longest_window: Duration::ZERO,
            ram,
        })
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.ram.pages()
    }

    /// The RAM itself.
    #[must_use]
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Where a page can be read.
    #[must_use]
    pub fn page(&self, page: u32) -> *const u8 {
        self.ram.range(page, 1).page(0)
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

    /// Whether a part of this RAM was lost, by a call that failed or because the host could not supply it, or
    /// its VM is about to be removed. What was read from it is nobody's content then.
    #[must_use]
    pub fn lost(&self) -> bool {
        self.leaving || !self.holes.is_empty() || self.ram.lost()
    }

    /// Bytes that the metadata takes.
    #[must_use]
    pub fn metadata_bytes(&self) -> usize {
        self.backing.bytes()
    }

    /// Appends to `runs` the runs of `pages` that are private and worth looking at.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn private(
        &self,
        pages: Range<u32>,
        pagemap: &Pagemap,
        runs: &mut Vec<Range<u32>>,
    ) -> io::Result<()> {
        pagemap.private(self.ram.range(pages.start, pages.end - pages.start), runs)
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
        calls: &dyn MemoryCalls,
    ) -> Result<u32, SpaceError> {
        debug_assert!((first..first + count).all(|page| !self.attached(page)));
        let merged = self.replace(first, count, Source::Frames(frame), calls, |page, index| {
            // SAFETY: guest RAM is mapped, and so is the store; the page is protected.
            unsafe { content::equal(page, store.content(frame + index)) && !store.lost() }
        })?;
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
        calls: &dyn MemoryCalls,
        dead: &mut Vec<Frame>,
    ) -> Result<u32, SpaceError> {
        debug_assert!((first..first + count).all(|page| self.attached(page)));
        let before: Vec<_> = (first..first + count).filter_map(|page| self.refers(page)).collect();
        let moved = self.replace(first, count, Source::Frames(frame), calls, |page, index| {
            // SAFETY: guest RAM is mapped, and so is the store; the page is protected.
            unsafe { content::equal(page, store.content(frame + index)) && !store.lost() }
        })?;
        for (index, before) in (0..moved.pages).zip(before) {
            store.attach(frame + index);
            if store.detach(before) {
                dead.push(before);
            }
        }
        moved.end()
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
        calls: &dyn MemoryCalls,
        dead: &mut Vec<Frame>,
    ) -> Result<u32, SpaceError> {
        let attached = |page: u32| self.refers(page).filter(|_| self.attached(page));
        let before: Vec<_> = (first..first + count).map(attached).collect();
        let delivered = self.replace(first, count, Source::Frames(frame), calls, |_, _| true)?;
        for (frame, before) in frame.run(delivered.pages).zip(before) {
            store.attach(frame);
            dead.extend(before.filter(|&before| store.detach(before)));
        }
        delivered.end()
    }

    /// Gives the memory of pages back that hold zeros alone, as far as they do. Returns how many.
    ///
    /// None of the pages may be attached, and `count` is at most [`WINDOW_PAGES`].
    ///
    /// # Errors
    /// See [`SpaceError`].
    pub fn discard_zeros(
        &mut self,
        first: u32,
        count: u32,
        calls: &dyn MemoryCalls,
    ) -> Result<u32, SpaceError> {
        debug_assert!((first..first + count).all(|page| !self.attached(page)));
        self.replace(first, count, Source::Zeros, calls, |page, _| {
            // SAFETY: guest RAM is mapped; the page is protected.
            unsafe { content::zero(page) }
        })?
        .end()
    }

    /// Gives the memory of pages back whose content nobody wants, as far as they provably still show the
    /// frames that they are attached to: nobody has written to them since. Returns how many of the first
    /// these are; they are anonymous memory then, and read as zeros. Appends to `left` their frames, and to
    /// `dead` those whose last sharers left.
    ///
    /// All of the pages must be attached, and `count` is at most [`WINDOW_PAGES`].
    ///
    /// # Errors
    /// See [`SpaceError`].
    #[expect(clippy::too_many_arguments, reason = "the two lists are the caller's, to be used again")]
    pub(crate) fn discard_unwritten(
        &mut self,
        first: u32,
        count: u32,
        pagemap: &Pagemap,
        store: &mut FrameStore,
        calls: &dyn MemoryCalls,
        left: &mut Vec<Frame>,
        dead: &mut Vec<Frame>,
    ) -> Result<u32, SpaceError> {
        debug_assert!((first..first + count).all(|page| self.attached(page)));
        let frames: Vec<_> = (first..first + count).filter_map(|page| self.refers(page)).collect();
        let ram = Arc::clone(&self.ram);
        let pages = ram.range(first, count);
        let entries = RefCell::new([Entry::default(); WINDOW_PAGES as usize]);
        let known = Cell::new(false);
        let discarded = self.replace(first, count, Source::Zeros, calls, |_, index| {
            let mut entries = entries.borrow_mut();
            if index == 0 {
                for index in 0..count {
                    // A page that is nowhere in memory shows what it is now.
                    // SAFETY: guest RAM is mapped readable; the byte is not used.
                    unsafe { pages.page(index).read_volatile() };
                }
                known.set(pagemap.read(pages.address(), &mut entries[..count as usize]).is_ok());
            }
            let entry = entries[index as usize];
            known.get() && entry.present() && entry.file()
        })?;
        for frame in frames.into_iter().take(discarded.pages as usize) {
            left.push(frame);
            if store.detach(frame) {
                dead.push(frame);
            }
        }
        discarded.end()
    }

    /// The longest time for which writers to a run of this RAM were made to wait.
    #[must_use]
    pub fn longest_window(&self) -> Duration {
        self.longest_window
    }

    /// Makes pages the VM's own again: anonymous memory with the content that they have, one mapping
    /// with the anonymous memory around them. Appends to `dead` the frames whose last sharers left.
    ///
    /// `count` is at most [`WINDOW_PAGES`].
    ///
    /// # Errors
    /// See [`SpaceError`].
    pub fn restore(
        &mut self,
        first: u32,
        count: u32,
        store: &mut FrameStore,
        calls: &dyn MemoryCalls,
        dead: &mut Vec<Frame>,
    ) -> Result<(), SpaceError> {
        assert!(count > 0 && count <= WINDOW_PAGES);
        let ram = Arc::clone(&self.ram);
        let pages = ram.range(first, count);
        let refused = |doing, error| SpaceError::Refused { doing, first, count, error };

        let opened = Instant::now();
        let mut window = Window::new(calls, pages);
        let moved = match protect(pages, calls) {
            Ok(protected) if protected == count => calls
                .stage(pages)
                .map_err(MapError::Refused)
                .and_then(|()| {
                    // SAFETY: guest RAM is mapped and protected, and its shadow was just written.
                    let same = |index| unsafe { content::equal(pages.page(index), pages.shadow(index)) };
                    let whole = (0..count).all(same) && !ram.lost();
                    whole.then_some(()).ok_or_else(|| MapError::Refused(io::ErrorKind::InvalidData.into()))
                })
                .and_then(|()| window.restore(pages)),
            Ok(_) => Err(MapError::Refused(io::ErrorKind::Unsupported.into())),
            Err(error) => Err(MapError::Refused(error)),
        };
        let closed = window.close();
        self.longest_window = self.longest_window.max(opened.elapsed());
        // What is left of the copy where this fails is replaced by the next.
        let _ = calls.unstage(pages);
        if moved.is_ok() {
            // Where this fails the next window tries again.
            let _ = calls.register(pages);
            // They show no frames any more, whether or not they can be written.
            for page in first..first + count {
                if self.attached(page) {
                    dead.extend(self.detach(page, store));
                }
            }
            self.backing.make_anonymous(first, count);
        }
        match (moved, closed) {
            (Ok(()), Ok(())) => Ok(()),
            (Err(MapError::Refused(error)), Ok(())) => Err(refused("taking off their frames", error)),
            (Err(MapError::Lost(error)), _) => Err(self.tear("taking off their frames", pages, error, calls)),
            (_, Err(error)) => Err(self.lose("unprotecting", pages, error, calls)),
        }
    }

    /// The window: protects the pages, finds the prefix for which `same` holds, and maps `source`
    /// over it.
    fn replace(
        &mut self,
        first: u32,
        count: u32,
        source: Source,
        calls: &dyn MemoryCalls,
        same: impl Fn(*const u8, u32) -> bool,
    ) -> Result<Replaced, SpaceError> {
        assert!(count > 0 && count <= WINDOW_PAGES);
        let ram = Arc::clone(&self.ram);
        let pages = ram.range(first, count);
        let refused = |doing, error| SpaceError::Refused { doing, first, count, error };

        let opened = Instant::now();
        let mut window = Window::new(calls, pages);
        let protected = match protect(pages, calls) {
            Ok(protected) => protected,
            Err(error) => {
                let closed = window.close();
                let error = refused("write-protecting", error);
                return Err(
                    closed.map_or_else(|error| self.lose("unprotecting", pages, error, calls), |()| error)
                );
            }
        };
        let equal = (0..protected).take_while(|&index| same(pages.page(index), index)).count() as u32;
        let part = pages.part(0, equal);
        // What was compared may be zeros in the place of a page that is gone.
        let outcome = if equal == 0 || self.ram.lost() {
            Ok(Remapped::Nothing)
        } else if self.shows_again(first, equal, source) {
            calls.discard(part).map(|()| Remapped::Discarded).map_err(MapError::Refused)
        } else {
            window.map(part, source)
        };
        let closed = window.close();
        self.longest_window = self.longest_window.max(opened.elapsed());
        let replaced = match &outcome {
            Ok(Remapped::Discarded | Remapped::Mapped) => equal,
            Ok(Remapped::Nothing) | Err(_) => 0,
        };
        if matches!(outcome, Ok(Remapped::Mapped)) {
            // Where this fails the next window tries again; only the neighbours cannot become
            // one mapping with it.
            let _ = calls.register(part);
        }
        if replaced > 0 {
            // They show `source` from now on, whether or not they can be written.
            self.note_mapping(first, replaced, source);
        }
        match (outcome, closed) {
            (Ok(_), Ok(())) => Ok(Replaced { pages: replaced, lost: None }),
            (Ok(_), Err(error)) => {
                let lost = self.lose("unprotecting", pages, error, calls);
                Ok(Replaced { pages: replaced, lost: Some(lost) })
            }
            (Err(MapError::Refused(error)), Ok(())) => Err(refused("remapping", error)),
            (Err(MapError::Lost(error)), _) => Err(self.tear("remapping", part, error, calls)),
            (Err(MapError::Refused(_)), Err(error)) => Err(self.lose("unprotecting", pages, error, calls)),
        }
    }

    /// Notes that pages are gone: nothing is done to this RAM from now on.
    fn tear(
        &mut self,
        doing: &'static str,
        pages: RamRange<'_>,
        error: io::Error,
        calls: &dyn MemoryCalls,
    ) -> SpaceError {
        let (first, count) = (pages.first(), pages.count());
        // Where nothing else is there by now, threads that still reach for these pages find zeros.
        if self.ram.fill_hole(first, count) {
            self.holes.push(first..first);
        } else {
            self.ram.tear();
            self.holes.push(first..first + count);
        }
        self.lose(doing, pages, error, calls)
    }

    /// Notes that pages are gone, or there and blocked for good: nothing is done to this RAM from now on.
    fn lose(
        &mut self,
        doing: &'static str,
        pages: RamRange<'_>,
        error: io::Error,
        calls: &dyn MemoryCalls,
    ) -> SpaceError {
        // Nobody opens another window here, whose wake would find who was missed.
        let _ = calls.wake(self.ram.range(0, self.pages()));
        self.ram.lose(pages.first());
        SpaceError::Lost { doing, first: pages.first(), count: pages.count(), error }
    }

    /// Whether dropping the private copies makes exactly `source` show again.
    fn shows_again(&self, first: u32, count: u32, source: Source) -> bool {
        let shows = |index: u32| match source {
            Source::Frames(frame) => self.refers(first + index) == Some(frame + index),
            Source::Zeros => self.refers(first + index).is_none(),
        };
        (0..count).all(shows)
    }

    fn note_mapping(&mut self, first: u32, count: u32, source: Source) {
        match source {
            Source::Frames(frame) => self.backing.attach(first, frame, count),
            Source::Zeros => {
                for page in first..first + count {
                    if self.attached(page) {
                        self.backing.leave(page);
                    }
                }
                self.backing.make_anonymous(first, count);
            }
        }
    }

    /// The VM no longer runs: nothing more is done to this RAM, but that it is emptied.
    pub(crate) fn leave(&mut self) {
        self.leaving = true;
    }

    /// The parts that are not this RAM's any more.
    pub(crate) fn holes(&self) -> &[Range<u32>] {
        &self.holes
    }

    /// There are more of them.
    pub(crate) fn set_holes(&mut self, holes: Vec<Range<u32>>) {
        self.holes = holes;
    }

    /// Pages, none of which are attached, are anonymous memory again, with nothing in it.
    pub(crate) fn emptied(&mut self, pages: Range<u32>) {
        self.backing.make_anonymous(pages.start, pages.end - pages.start);
    }
}
