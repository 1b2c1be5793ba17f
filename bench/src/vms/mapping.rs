//! Plain memory of the process, for measuring the kernel's page faults.

#![expect(unsafe_code, reason = "maps memory and touches it by address")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use samepage_sharing::PAGE_SIZE;

/// A private mapping in pages of 4 KiB, which takes no memory until it is touched.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    pages: usize,
}

impl Mapping {
    /// Maps anonymous memory.
    ///
    /// # Errors
    /// Fails with the error of the system call.
    pub(super) fn anonymous(pages: usize) -> io::Result<Self> {
        Self::new(pages, libc::MAP_ANONYMOUS, -1)
    }

    /// Maps the first pages of a file.
    ///
    /// # Errors
    /// Fails with the error of the system call.
    pub(super) fn of_file(file: &File, pages: usize) -> io::Result<Self> {
        Self::new(pages, 0, file.as_raw_fd())
    }

    fn new(pages: usize, flags: libc::c_int, file: libc::c_int) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let bytes = pages * PAGE_SIZE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_PRIVATE | flags, file, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let mapping = Self { base, pages };
        // SAFETY: the advice concerns this value's own mapping. A kernel without huge pages returns an error,
        // which does not matter.
        unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_NOHUGEPAGE) };
        Ok(mapping)
    }

    pub(super) fn pages(&self) -> usize {
        self.pages
    }

    /// Reads from a page.
    pub(super) fn read(&self, page: usize) -> u8 {
        // SAFETY: the page belongs to this value and is readable, and nothing else writes to it.
        unsafe { self.page(page).read_volatile() }
    }

    /// Writes to a page.
    pub(super) fn write(&mut self, page: usize) {
        // SAFETY: the page belongs to this value and is writable, and there are no references into it.
        unsafe { self.page(page).write_volatile(1) }
    }

    fn page(&self, page: usize) -> *mut u8 {
        assert!(page < self.pages);
        self.base.as_ptr().wrapping_add(page * PAGE_SIZE)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and there are no addresses into it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.pages * PAGE_SIZE) };
    }
}
