//! Guest RAM as the host holds it: one reservation of private anonymous memory for each VM.
//!
//! The engine replaces parts of the reservation by mappings of its frame store while guests run,
//! so the reservation is addressed by page index, never through references.

#![expect(unsafe_code, reason = "reserves and releases address space")]

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

/// Size of a page and of a frame, in bytes.
pub const PAGE_SIZE: usize = 4096;

/// Address space that is left without access behind each VM's RAM: the kernel cannot make one mapping
/// of two VMs' RAM, and an access beyond the end reaches nobody's.
const GUARD_BYTES: usize = PAGE_SIZE;

/// Address space of one VM's RAM: `pages` pages of private anonymous memory, filled with zeros,
/// that occupy nothing until they are touched. Unmapped when dropped.
#[derive(Debug)]
pub struct Ram {
    base: NonNull<u8>,
    pages: u32,
    /// A part was unmapped and may be somebody else's by now: the address space is not ours to
    /// unmap as a whole.
    torn: AtomicBool,
}

// SAFETY: the struct is an address and a length; who reads or writes the memory behind it answers
// for that access.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    /// Reserves `bytes` of RAM, a multiple of [`PAGE_SIZE`].
    ///
    /// # Errors
    /// What mmap said: `ENOMEM` where address space, the commit limit or mappings ran out;
    /// `EINVAL` for a length of zero, one that is no multiple of the page size, or 16 TiB and more.
    pub fn reserve(bytes: usize) -> io::Result<Self> {
        let pages = match u32::try_from(bytes / PAGE_SIZE) {
            Ok(pages) if pages > 0 && bytes.is_multiple_of(PAGE_SIZE) => pages,
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes + GUARD_BYTES,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let ram = Self { base, pages, torn: AtomicBool::new(false) };
        // SAFETY: the range was reserved above and nothing refers to it yet.
        let failed =
            unsafe { libc::mprotect(base.as_ptr().cast(), bytes, libc::PROT_READ | libc::PROT_WRITE) } != 0;
        if failed { Err(io::Error::last_os_error()) } else { Ok(ram) }
    }

    /// Keeps the kernel from backing this RAM with huge pages: of a huge page that is partly
    /// replaced by frames nothing becomes free. To be called before the memory is first touched.
    ///
    /// # Errors
    /// What madvise said. A kernel without huge pages has nothing to switch off: no error.
    pub fn use_small_pages(&self) -> io::Result<()> {
        self.range(0, self.pages()).use_small_pages()
    }

    /// From now on the address space is left to the process when this value goes: a failed call
    /// tore a hole into it, where the kernel may have placed another mapping since.
    pub(crate) fn tear(&self) {
        self.torn.store(true, Ordering::Release);
    }

    /// The pages `first..first + count`.
    ///
    /// # Panics
    /// Where the RAM has no such pages: page numbers come from the host, never from a guest.
    #[must_use]
    pub fn range(&self, first: u32, count: u32) -> RamRange<'_> {
        assert!(
            first.checked_add(count).is_some_and(|end| end <= self.pages),
            "pages {first}+{count} of {}",
            self.pages
        );
        RamRange { ram: self, first, count }
    }

    /// Address of the first byte in this process.
    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.pages as usize * PAGE_SIZE
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        if *self.torn.get_mut() {
            return;
        }
        // SAFETY: the range was reserved by `reserve` and belongs to this value alone; whoever
        // held addresses into it has given them up with their share of ownership.
        let failed = unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes() + GUARD_BYTES) } != 0;
        debug_assert!(!failed, "unmapping guest RAM: {}", io::Error::last_os_error());
    }
}

/// Some consecutive pages of a [`Ram`]: what the calls that rearrange guest memory work on, so
/// that they can reach no other memory.
#[derive(Clone, Copy, Debug)]
pub struct RamRange<'a> {
    ram: &'a Ram,
    first: u32,
    count: u32,
}

impl<'a> RamRange<'a> {
    /// Index of the first page in its RAM.
    #[must_use]
    pub fn first(&self) -> u32 {
        self.first
    }

    /// Number of pages.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Address of the first byte in this process.
    #[must_use]
    pub fn address(&self) -> usize {
        self.page(0).addr()
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.count as usize * PAGE_SIZE
    }

    /// Where page `index` of this range is. Guests and devices may write to it at any time unless
    /// it is write-protected, so it must not become a reference.
    #[must_use]
    pub fn page(&self, index: u32) -> *const u8 {
        debug_assert!(index <= self.count);
        self.ram.base.as_ptr().wrapping_add((self.first as usize + index as usize) * PAGE_SIZE)
    }

    /// The part from page `from` of this range on, of `count` pages.
    #[must_use]
    pub fn part(&self, from: u32, count: u32) -> RamRange<'a> {
        assert!(from + count <= self.count, "pages {from}+{count} of {}", self.count);
        RamRange { ram: self.ram, first: self.first + from, count }
    }

    /// See [`Ram::use_small_pages`].
    pub(crate) fn use_small_pages(&self) -> io::Result<()> {
        // SAFETY: advice about the size of pages changes no content, and the range is RAM's own.
        let failed = unsafe {
            libc::madvise(self.address() as *mut libc::c_void, self.bytes(), libc::MADV_NOHUGEPAGE)
        } != 0;
        match failed.then(io::Error::last_os_error) {
            Some(error) if error.raw_os_error() != Some(libc::EINVAL) => Err(error),
            _ => Ok(()),
        }
    }
}
