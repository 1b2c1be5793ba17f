//! One VM's RAM in this process: its pages are read where they are, and the window in which a run of pages is
//! protected, compared and remapped.

#![expect(unsafe_code, reason = "reads and compares guest pages by address")]

use std::cell::{Cell, RefCell};
use std::cmp;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::memory::calls::{MemoryCalls, Over};
use crate::memory::content::{self, Digester, Page, Snapshot};
use crate::memory::frame_view::FrameView;
use crate::memory::guest::{
    Bytes, GuestMemory, Harvest, Like, Neighbours, Remap, Remapped, Rule, Seen, Source, SpaceError,
    WINDOW_PAGES,
};
use crate::memory::pagemap::{Entry, Pagemap};
use crate::memory::ram::{HUGE_PAGES, Ram, RamRange};
use crate::memory::window::{MapError, Outcome, Window, protect};

/// Neighbours that are compared as a whole before it is taken for granted that a run goes on.
const CERTAIN: u32 = 2;

/// What all VMs of a group have in common in this process.
#[derive(Clone)]
pub struct Host {
    pub(crate) calls: Arc<dyn MemoryCalls>,
    pub(crate) pagemap: Arc<Pagemap>,
    pub(crate) frames: Arc<FrameView>,
    pub(crate) digester: Arc<Digester>,
    /// Pages that are read at once at most.
    pub(crate) batch: u32,
}

impl Host {
    /// Opens the page map of this process, and draws a key for digests. Pages go on the frames that are mapped.
    ///
    /// # Errors
    /// Fails if the page map or random numbers cannot be read.
    pub(crate) fn new(calls: Arc<dyn MemoryCalls>, frames: Arc<FrameView>, batch: u32) -> io::Result<Self> {
        Self::with(calls, frames, Arc::new(Digester::new()?), batch)
    }

    /// Opens the page map of this process. Digests are those of another process.
    ///
    /// # Errors
    /// Fails if the page map cannot be read.
    pub(crate) fn with(
        calls: Arc<dyn MemoryCalls>,
        frames: Arc<FrameView>,
        digester: Arc<Digester>,
        batch: u32,
    ) -> io::Result<Self> {
        let pagemap = Arc::new(Pagemap::open()?);
        Ok(Self { calls, pagemap, frames, digester, batch })
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("batch", &self.batch).finish_non_exhaustive()
    }
}

/// One VM's RAM.
#[derive(Debug)]
pub struct LocalMemory {
    ram: Arc<Ram>,
    host: Host,
    /// Parts that failed calls tore out: they are not this RAM's any more.
    holes: Mutex<Vec<Range<u32>>>,
    /// A part was torn out, or the VM is about to be removed.
    is_over: AtomicBool,
    /// The longest window so far, in nanoseconds.
    longest_window: AtomicU64,
}

impl LocalMemory {
    /// Takes RAM under management: all of it anonymous, as [`Ram::reserve`] made it.
    ///
    /// # Errors
    /// Fails if the kernel refuses to register it with userfaultfd.
    pub fn new(ram: Arc<Ram>, host: Host) -> io::Result<Self> {
        host.calls.register(ram.range(0, ram.pages()))?;
        let holes = Mutex::default();
        Ok(Self { ram, host, holes, is_over: AtomicBool::new(false), longest_window: AtomicU64::new(0) })
    }

    fn range(&self, pages: &Range<u32>) -> RamRange<'_> {
        self.ram.range(pages.start, pages.end - pages.start)
    }

    fn page(&self, page: u32) -> *const u8 {
        self.ram.range(page, 1).page(0)
    }

    /// The window: protects the pages, finds the prefix for which `holds` is true, and maps the source over it.
    fn replace(&self, remap: &Remap, holds: impl Fn(*const u8, u32) -> bool) -> Remapped {
        let &Remap { first, count, source, copies, .. } = remap;
        let calls = &*self.host.calls;
        let pages = self.ram.range(first, count);
        let refused = |doing, error| SpaceError::Refused { doing, first, count, error };

        let opened = Instant::now();
        let mut window = Window::new(calls, pages);
        let protected = match protect(pages, calls) {
            Ok(protected) => protected,
            Err(error) => {
                let closed = window.close();
                let error = refused("write-protecting", error);
                let error = closed.map_or_else(|error| self.lose("unprotecting", pages, error), |()| error);
                return Remapped { pages: 0, error: Some(error) };
            }
        };
        let found = (0..protected).take_while(|&index| holds(pages.page(index), index)).count() as u32;
        let part = pages.part(0, found);
        // What was compared may be zeros in the place of a page that is gone.
        let outcome = if found == 0 || self.ram.lost() {
            Ok(Outcome::Nothing)
        } else if found <= copies {
            calls.discard(part).map(|()| Outcome::Discarded).map_err(MapError::Refused)
        } else {
            window.map(part, source)
        };
        let closed = window.close();
        self.note_window(opened);
        let replaced = match &outcome {
            Ok(Outcome::Discarded | Outcome::Mapped) => found,
            Ok(Outcome::Nothing) | Err(_) => 0,
        };
        if matches!(outcome, Ok(Outcome::Mapped)) {
            // Where this fails the next window tries again; only the neighbours cannot become
            // one mapping with it.
            let _ = calls.register(part);
        }
        let error = match (outcome, closed) {
            (Ok(_), Ok(())) => None,
            (Ok(_) | Err(MapError::Refused(_)), Err(error)) => Some(self.lose("unprotecting", pages, error)),
            (Err(MapError::Refused(error)), Ok(())) => Some(refused("remapping", error)),
            (Err(MapError::Lost(error)), _) => Some(self.tear("remapping", part, error)),
        };
        Remapped { pages: replaced, error }
    }

    /// Maps pages anew that provably show the frames that they are mapped to.
    fn replace_unwritten(&self, remap: &Remap) -> Remapped {
        let pages = self.ram.range(remap.first, remap.count);
        let entries = RefCell::new([Entry::default(); WINDOW_PAGES as usize]);
        let known = Cell::new(false);
        self.replace(remap, |_, index| {
            let mut entries = entries.borrow_mut();
            if index == 0 {
                for index in 0..remap.count {
                    // A page that is nowhere in memory shows what it is now.
                    // SAFETY: guest RAM is mapped readable; the byte is not used.
                    unsafe { pages.page(index).read_volatile() };
                }
                let entries = &mut entries[..remap.count as usize];
                known.set(self.host.pagemap.read(pages.address(), entries).is_ok());
            }
            let entry = entries[index as usize];
            known.get() && entry.present() && entry.file()
        })
    }

    fn note_window(&self, opened: Instant) {
        let nanoseconds = u64::try_from(opened.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.longest_window.fetch_max(nanoseconds, Ordering::Relaxed);
    }

    /// Notes that pages are gone: nothing is done to this RAM from now on.
    fn tear(&self, doing: &'static str, pages: RamRange<'_>, error: io::Error) -> SpaceError {
        let (first, count) = (pages.first(), pages.count());
        // Where nothing else is there by now, threads that still reach for these pages find zeros.
        if !self.ram.fill_hole(first, count) {
            self.ram.tear();
            self.holes.lock().push(first..first + count);
        }
        self.is_over.store(true, Ordering::Release);
        self.lose(doing, pages, error)
    }

    /// Notes that pages are gone, or there and blocked for good: nothing is done to this RAM from now on.
    fn lose(&self, doing: &'static str, pages: RamRange<'_>, error: io::Error) -> SpaceError {
        // Nobody opens another window here, whose wake would find who was missed.
        let _ = self.host.calls.wake(self.ram.range(0, self.ram.pages()));
        self.ram.lose(pages.first());
        SpaceError::Lost { doing, first: pages.first(), count: pages.count(), error }
    }

    fn empty_part(&self, part: Range<u32>, mapped: bool) -> io::Result<()> {
        let calls = &*self.host.calls;
        let pages = self.range(&part);
        // Threads that map or fault go on while pages are discarded, which they do not while a mapping is replaced.
        // But a page without its private copy shows the frame that it is mapped to, and had perhaps left. That frame
        // is another's by now, or takes memory for whoever looks.
        let discarded = !mapped && calls.discard(pages).is_ok();
        if !discarded && let Err(error) = calls.map(pages, Source::Zeros, Over::Pages) {
            match calls.map(pages, Source::Zeros, Over::Hole) {
                Ok(()) => {}
                // They are there, as they were.
                Err(there) if there.raw_os_error() == Some(libc::EEXIST) => return Err(error),
                // They are not mapped to frames, but may be somebody else's by now.
                Err(_) => {
                    if !self.ram.fill_hole(part.start, part.end - part.start) {
                        self.ram.tear();
                        self.holes.lock().push(part);
                        return Ok(());
                    }
                }
            }
        }
        // A device that still writes is not to wait for a window that nobody opens any more.
        calls.wake(pages)
    }
}

impl GuestMemory for LocalMemory {
    fn pages(&self) -> u32 {
        self.ram.pages()
    }

    fn address(&self) -> usize {
        self.ram.base().as_ptr().addr()
    }

    fn lost(&self) -> bool {
        self.is_over.load(Ordering::Acquire) || self.ram.lost()
    }

    fn leave(&self) {
        self.is_over.store(true, Ordering::Release);
    }

    fn private(&self, pages: Range<u32>, runs: &mut Vec<Range<u32>>) -> io::Result<()> {
        self.host.pagemap.private(self.range(&pages), runs)
    }

    fn entries(&self, pages: Range<u32>, entries: &mut [Entry]) -> io::Result<()> {
        self.host.pagemap.read(self.range(&pages).address(), entries)
    }

    fn tells_huge(&self) -> bool {
        self.host.pagemap.tells_huge()
    }

    fn huge(&self, pages: Range<u32>, runs: &mut Vec<Range<u32>>) -> io::Result<()> {
        self.host.pagemap.huge(self.range(&pages), runs)
    }

    fn split(&self, first: u32) -> io::Result<bool> {
        let pages = self.ram.range(first, HUGE_PAGES);
        self.host.calls.split(pages)?;
        let mut left = Vec::new();
        // Somebody in the kernel may hold on to it; that passes.
        let is_whole =
            self.tells_huge() && (self.host.pagemap.huge(pages, &mut left).is_err() || !left.is_empty());
        Ok(!is_whole)
    }

    fn batch(&self) -> u32 {
        self.host.batch
    }

    fn harvest(&self, harvest: &mut Harvest) {
        harvest.fill(|page, digest, content| {
            // SAFETY: guest RAM is mapped.
            unsafe { content.retake(self.page(page)) };
            if content.is_zero() {
                Seen::Zero
            } else if digest {
                Seen::Digest(self.host.digester.digest(content))
            } else {
                Seen::Content
            }
        });
    }

    fn read(&self, page: u32) -> Box<Snapshot> {
        // SAFETY: guest RAM is mapped.
        Box::new(unsafe { Snapshot::take(self.page(page)) })
    }

    fn order(&self, content: &Page, page: u32) -> cmp::Ordering {
        // SAFETY: guest RAM is mapped.
        unsafe { content::order(content.as_ptr(), self.page(page)) }
    }

    fn zeros(&self, pages: Range<u32>) -> u32 {
        // SAFETY: guest RAM is mapped.
        pages.take_while(|&page| unsafe { content::zero(self.page(page)) }).count() as u32
    }

    fn matching(&self, neighbours: Neighbours<'_>) -> u32 {
        let Neighbours { pages, like, is_ahead, distance } = neighbours;
        let count = pages.end - pages.start;
        let matches = |&nth: &u32| {
            let index = if is_ahead { nth } else { count - 1 - nth };
            let page = self.page(pages.start + index);
            let other = match like {
                Like::Frames(frame) => self.host.frames.frame(frame + index).cast_const(),
                Like::Pages(bytes) => bytes.page(index),
            };
            // In a run that has gone on for a while a glance is enough: all of it is compared under protection.
            // SAFETY: guest RAM is mapped, and so are filled frames and what is named as bytes.
            unsafe {
                let is_alike = if distance + nth <= CERTAIN {
                    content::equal(page, other)
                } else {
                    content::probably_equal(page, other)
                };
                is_alike && (matches!(like, Like::Frames(_)) || !content::zero(other))
            }
        };
        (0..count).take_while(matches).count() as u32
    }

    fn contents(&self, pages: Range<u32>, take: &mut dyn FnMut(Bytes<'_>)) {
        // SAFETY: guest RAM is mapped as long as this value is there.
        take(unsafe { Bytes::new(self.range(&pages).page(0), pages.end - pages.start) });
    }

    fn remap(&self, remap: Remap) -> Remapped {
        assert!(remap.count > 0 && remap.count <= WINDOW_PAGES, "{remap:?}");
        match (remap.rule, remap.source) {
            (Rule::Any, _) => self.replace(&remap, |_, _| true),
            (Rule::Unwritten, _) => self.replace_unwritten(&remap),
            (Rule::Identical, Source::Zeros) => self.replace(&remap, |page, _| {
                // SAFETY: guest RAM is mapped; the page is protected.
                unsafe { content::zero(page) }
            }),
            (Rule::Identical, Source::Frames(frame)) => self.replace(&remap, |page, index| {
                let frames = &self.host.frames;
                // SAFETY: guest RAM is mapped, and so is the store; the page is protected.
                unsafe { content::equal(page, frames.frame(frame + index)) && !frames.lost() }
            }),
        }
    }

    fn restore(&self, pages: Range<u32>) -> Remapped {
        const DOING: &str = "taking off their frames";
        let (first, count) = (pages.start, pages.end - pages.start);
        assert!(count > 0 && count <= WINDOW_PAGES, "{pages:?}");
        let calls = &*self.host.calls;
        let pages = self.range(&pages);

        let opened = Instant::now();
        let mut window = Window::new(calls, pages);
        let moved = match protect(pages, calls) {
            Ok(protected) if protected == count => calls
                .stage(pages)
                .map_err(MapError::Refused)
                .and_then(|()| {
                    // SAFETY: guest RAM is mapped and protected, and its shadow was just written.
                    let same = |index| unsafe { content::equal(pages.page(index), pages.shadow(index)) };
                    let whole = (0..count).all(same) && !self.ram.lost();
                    whole.then_some(()).ok_or_else(|| MapError::Refused(io::ErrorKind::InvalidData.into()))
                })
                .and_then(|()| window.restore(pages)),
            Ok(_) => Err(MapError::Refused(io::ErrorKind::Unsupported.into())),
            Err(error) => Err(MapError::Refused(error)),
        };
        let closed = window.close();
        self.note_window(opened);
        // What is left of the copy where this fails is replaced by the next.
        let _ = calls.unstage(pages);
        let restored = if moved.is_ok() { count } else { 0 };
        if moved.is_ok() {
            // Where this fails the next window tries again.
            let _ = calls.register(pages);
        }
        let error = match (moved, closed) {
            (Ok(()), Ok(())) => None,
            (Err(MapError::Refused(error)), Ok(())) => {
                Some(SpaceError::Refused { doing: DOING, first, count, error })
            }
            (Err(MapError::Lost(error)), _) => Some(self.tear(DOING, pages, error)),
            (_, Err(error)) => Some(self.lose("unprotecting", pages, error)),
        };
        Remapped { pages: restored, error }
    }

    fn empty(&self, pages: Range<u32>, mapped: bool) -> io::Result<()> {
        let mut start = pages.start;
        while start < pages.end {
            let holes = self.holes.lock();
            if let Some(hole) = holes.iter().find(|hole| hole.contains(&start)) {
                start = hole.end;
                continue;
            }
            let next = holes.iter().filter(|hole| hole.start > start).map(|hole| hole.start).min();
            drop(holes);
            let end = next.unwrap_or(u32::MAX).min(pages.end);
            self.empty_part(start..end, mapped)?;
            start = end;
        }
        Ok(())
    }

    fn longest_window(&self) -> Duration {
        Duration::from_nanos(self.longest_window.load(Ordering::Relaxed))
    }
}
