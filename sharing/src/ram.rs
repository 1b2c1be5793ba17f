//! Guest RAM as the host holds it: one reservation of private anonymous memory for each VM.
//!
//! The engine replaces parts of the reservation by mappings of its frame store while guests run,
//! so the reservation is addressed by page index, never through references.

#![expect(unsafe_code, reason = "reserves and releases address space")]

use std::io;
use std::ptr::NonNull;

/// Size of a page and of a frame, in bytes.
pub const PAGE_SIZE: usize = 4096;

/// Address space of one VM's RAM: `pages` pages of private anonymous memory, filled with zeros,
/// that occupy nothing until they are touched. Unmapped when dropped.
#[derive(Debug)]
pub struct Ram {
    base: NonNull<u8>,
    pages: usize,
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
    /// `EINVAL` for a length of zero or one that is no multiple of the page size.
    pub fn reserve(bytes: usize) -> io::Result<Self> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { base, pages: bytes / PAGE_SIZE })
    }

    /// Address of the first byte in this process.
    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.pages * PAGE_SIZE
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the range was reserved by `reserve` and belongs to this value alone; whoever
        // held addresses into it has given them up with their share of ownership.
        let failed = unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes()) } != 0;
        debug_assert!(!failed, "unmapping guest RAM: {}", io::Error::last_os_error());
    }
}
