//! The system calls that rearrange guest memory, behind one trait, so that each of them can be
//! made to fail in tests.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::memory::content;
use crate::memory::guest::Source;

use crate::memory::pagemap::Pagemap;
use crate::memory::ram::{PAGE_SIZE, RamRange, move_pages};
use crate::memory::uffd::{UffdError, Userfaultfd};
use crate::memory::wakes::Watch;
use crate::numbers::Frame;

/// What a new mapping may take the place of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// The pages that are there.
    Pages,
    /// Nothing: the pages were unmapped by a call that failed.
    Hole,
}

/// What the merge path asks of the kernel. All ranges are guest RAM; nothing else is changed.
///
/// A guest sees no change of content from any of these but [`map`](Self::map), [`restore`](Self::restore) and
/// [`discard`](Self::discard), whose callers have compared the contents under protection.
pub trait MemoryCalls: Send + Sync {
    /// Registers pages with userfaultfd, so that they can be protected.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    fn register(&self, pages: RamRange<'_>) -> io::Result<()>;

    /// Blocks writes to the pages. Returns how many of the first pages are known to be protected:
    /// all, but for kernels that cannot protect unpopulated pages.
    ///
    /// # Errors
    /// What the kernel said; a part may be protected.
    fn protect(&self, pages: RamRange<'_>) -> io::Result<u32>;

    /// Lifts the protection and wakes blocked writers.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    fn unprotect(&self, pages: RamRange<'_>) -> io::Result<()>;

    /// Wakes writers that were blocked.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    fn wake(&self, pages: RamRange<'_>) -> io::Result<()>;

    /// Wakes all writers that wait, if pages were protected since the last call. To be called while no pages are
    /// protected: whoever waits then was missed by the wake of its window. A call that fails is made up for by
    /// [`wakes`](crate::memory::wakes).
    fn wake_latecomers(&self) {}

    /// Maps the pages anew, privately: from frames of the store or from fresh memory.
    ///
    /// # Errors
    /// What the kernel said. With [`Over::Pages`], kernels before 6.12 may have unmapped the pages
    /// all the same; with [`Over::Hole`], `EEXIST` where anything is mapped there.
    fn map(&self, pages: RamRange<'_>, source: Source, over: Over) -> io::Result<()>;

    /// Drops the private copies of the pages: what they are mapped from shows again.
    ///
    /// # Errors
    /// What the kernel said; the pages are as they were.
    fn discard(&self, pages: RamRange<'_>) -> io::Result<()>;

    /// Makes a copy of the pages in their RAM's shadow.
    ///
    /// # Errors
    /// What the kernel said; the pages are as they were.
    fn stage(&self, pages: RamRange<'_>) -> io::Result<()>;

    /// Makes the pages' shadow untouched memory, whatever an earlier copy left there.
    ///
    /// # Errors
    /// What the kernel said; the pages are as they were.
    fn clean(&self, pages: RamRange<'_>) -> io::Result<()>;

    /// Moves what [`stage`](Self::stage) or [`clean`](Self::clean) made over the pages, which are anonymous
    /// memory then.
    ///
    /// # Errors
    /// What the kernel said. With [`Over::Pages`] the pages may have been unmapped all the same;
    /// with [`Over::Hole`], `EEXIST` where anything is mapped there.
    fn restore(&self, pages: RamRange<'_>, over: Over) -> io::Result<()>;

    /// Makes the pages' shadow empty again, whether or not the copy was moved away.
    ///
    /// # Errors
    /// What the kernel said: some of the copy may be left, which the next one replaces.
    fn unstage(&self, pages: RamRange<'_>) -> io::Result<()>;

    /// Breaks up the huge page that backs these pages, which are all of it, so that each of them becomes
    /// free alone. Where no huge page backs them nothing happens.
    ///
    /// # Errors
    /// Fails if the kernel refuses. It may also leave the huge page as it is without saying so.
    fn split(&self, pages: RamRange<'_>) -> io::Result<()>;

    /// Gives the memory of `count` frames back.
    ///
    /// # Errors
    /// What the kernel said; the frames keep their memory.
    fn punch(&self, frame: Frame, count: u32) -> io::Result<()>;
}

/// The calls of the running kernel.
#[derive(Debug)]
pub struct Linux {
    uffd: Arc<Userfaultfd>,
    /// Pages were protected since latecomers were last woken.
    protected: AtomicBool,
    _watch: Arc<Watch>,
    pagemap: Pagemap,
    store: Arc<OwnedFd>,
}

impl Linux {
    /// Opens userfaultfd and the page map; `store` is the memory file of the frames.
    ///
    /// # Errors
    /// See [`UffdError`].
    pub fn open(store: Arc<OwnedFd>) -> Result<Self, UffdError> {
        // What is refused for want of permission is to be said first.
        let uffd = Userfaultfd::open()?;
        let watch = Arc::new(Watch::start().map_err(UffdError::Setup)?);
        Self::with(uffd, store, watch)
    }

    /// As [`Linux::open`], with a thread that wakes writers in common with others.
    ///
    /// # Errors
    /// See [`UffdError`].
    pub fn open_watched(store: Arc<OwnedFd>, watch: Arc<Watch>) -> Result<Self, UffdError> {
        Self::with(Userfaultfd::open()?, store, watch)
    }

    fn with(uffd: Userfaultfd, store: Arc<OwnedFd>, watch: Arc<Watch>) -> Result<Self, UffdError> {
        let uffd = Arc::new(uffd);
        watch.watch(&uffd).map_err(UffdError::Setup)?;
        let pagemap = Pagemap::open().map_err(UffdError::Setup)?;
        Ok(Self { uffd, protected: AtomicBool::new(false), _watch: watch, pagemap, store })
    }
}

impl MemoryCalls for Linux {
    fn register(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.uffd.register(pages)
    }

    fn protect(&self, pages: RamRange<'_>) -> io::Result<u32> {
        self.protected.store(true, Ordering::Relaxed);
        if self.uffd.protects_unpopulated() {
            return self.uffd.protect(pages).map(|()| pages.count());
        }
        for page in 0..pages.count() {
            // SAFETY: guest RAM is mapped readable; the byte is not used.
            unsafe { pages.page(page).read_volatile() };
        }
        self.uffd.protect(pages)?;
        self.pagemap.protected_prefix(pages)
    }

    fn unprotect(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.uffd.unprotect(pages)
    }

    fn wake(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.uffd.wake(pages)
    }

    fn wake_latecomers(&self) {
        if self.protected.swap(false, Ordering::Relaxed) {
            let _ = self.uffd.wake_all();
        }
    }

    fn map(&self, pages: RamRange<'_>, source: Source, over: Over) -> io::Result<()> {
        let (flags, fd, offset) = match source {
            Source::Frames(frame) => {
                (0, self.store.as_raw_fd(), i64::from(frame.number()) * PAGE_SIZE as i64)
            }
            Source::Zeros => (libc::MAP_ANONYMOUS, -1, 0),
        };
        let fixed = match over {
            Over::Pages => libc::MAP_FIXED,
            Over::Hole => libc::MAP_FIXED_NOREPLACE,
        };
        // SAFETY: the range is guest RAM, reserved by this process and referred to by address
        // alone; a new mapping over it leaves it readable and writable.
        let mapped = unsafe {
            libc::mmap(
                pages.address() as *mut libc::c_void,
                pages.bytes(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE | fixed | flags,
                fd,
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        if source == Source::Zeros {
            // The same advice as around it, so that the kernel makes one mapping of it all.
            // Without the advice the pages are as good.
            let _ = pages.advise();
        }
        Ok(())
    }

    fn discard(&self, pages: RamRange<'_>) -> io::Result<()> {
        // SAFETY: the range is guest RAM, referred to by address alone.
        let failed = unsafe {
            libc::madvise(pages.address() as *mut libc::c_void, pages.bytes(), libc::MADV_DONTNEED)
        } != 0;
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn stage(&self, pages: RamRange<'_>) -> io::Result<()> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the shadow of the range belongs to this RAM, and nobody else uses it.
        if unsafe { libc::mprotect(pages.shadow(0).cast(), pages.bytes(), access) } != 0 {
            return Err(io::Error::last_os_error());
        }
        for index in 0..pages.count() {
            // SAFETY: guest RAM is readable, and its shadow was just made writable.
            unsafe { content::copy_bytes(pages.page(index), pages.shadow(index)) };
        }
        Ok(())
    }

    fn clean(&self, pages: RamRange<'_>) -> io::Result<()> {
        let shadow = pages.shadow(0).cast();
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the shadow of the range belongs to this RAM, and nobody else uses it.
        let failed = unsafe {
            libc::madvise(shadow, pages.bytes(), libc::MADV_DONTNEED) != 0
                || libc::mprotect(shadow, pages.bytes(), access) != 0
        };
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn restore(&self, pages: RamRange<'_>, over: Over) -> io::Result<()> {
        let address = pages.address() as *mut libc::c_void;
        if over == Over::Hole {
            // Moving cannot be told to replace nothing, so the hole becomes ours first.
            let flags =
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
            // SAFETY: nothing is replaced.
            let mapped = unsafe { libc::mmap(address, pages.bytes(), libc::PROT_NONE, flags, -1, 0) };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: the source is the shadow of this range, which nobody else uses; the target is guest
        // RAM, referred to by address alone, and stays readable and writable.
        unsafe { move_pages(pages.shadow(0).cast(), address, pages.bytes()) }
    }

    fn unstage(&self, pages: RamRange<'_>) -> io::Result<()> {
        let shadow = pages.shadow(0).cast();
        // SAFETY: the shadow of the range belongs to this RAM, and nobody else uses it.
        let failed = unsafe {
            libc::madvise(shadow, pages.bytes(), libc::MADV_DONTNEED) != 0
                || libc::mprotect(shadow, pages.bytes(), libc::PROT_NONE) != 0
        };
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn split(&self, pages: RamRange<'_>) -> io::Result<()> {
        // Advice to page out a part of a huge page later makes the kernel split it at once
        // (`madvise_cold_or_pageout_pte_range` in mm/madvise.c): the only such call that leaves the
        // contents where they are and needs no privilege. One page of 512 then counts as idle.
        let part = pages.part(0, 1);
        // SAFETY: the range is guest RAM; the advice changes no content.
        let failed =
            unsafe { libc::madvise(part.address() as *mut libc::c_void, part.bytes(), libc::MADV_COLD) } != 0;
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn punch(&self, frame: Frame, count: u32) -> io::Result<()> {
        // SAFETY: the file is the store's own; the store punches frames that nobody maps.
        let failed = unsafe {
            libc::fallocate(
                self.store.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                i64::from(frame.number()) * PAGE_SIZE as i64,
                i64::from(count) * PAGE_SIZE as i64,
            )
        } != 0;
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::store::FrameStore;
    use crate::memory::ram::Ram;

    #[test]
    fn fresh_memory_is_empty_whatever_an_earlier_copy_left() {
        let store = FrameStore::create(16).unwrap();
        let linux = Linux::open(Arc::clone(store.file())).unwrap();
        let ram = Ram::reserve(8 * PAGE_SIZE).unwrap();
        ram.use_small_pages().unwrap();
        let pages = ram.range(2, 3);
        let word = pages.page(1).cast::<u64>().cast_mut();
        // SAFETY: the page is reserved, writable and this test's own.
        unsafe { word.write_volatile(7) };
        // A copy that nobody ends.
        linux.stage(pages).unwrap();
        linux.clean(pages).unwrap();
        linux.restore(pages, Over::Pages).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { word.read_volatile() }, 0);
    }
}
