//! Memory that the engine and a worker have in common, for what is too long for a message. The other side may write
//! to it at any time, so nothing in it is ever referred to but as atomic words, or copied as guest pages are.

#![expect(unsafe_code, reason = "maps memory in common with another process")]

use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::memory::content::{self, Page};
use crate::memory::guest::{Bytes, WINDOW_PAGES};
use crate::memory::ram::PAGE_SIZE;

/// Pages of the buffer.
pub(crate) const PAGES: u32 = WINDOW_PAGES;
/// Size of the buffer, in bytes. Only what is used takes memory.
const BYTES: usize = PAGES as usize * PAGE_SIZE;
/// Words of the buffer.
pub(crate) const WORDS: usize = BYTES / size_of::<u64>();

/// The buffer, mapped.
#[derive(Debug)]
pub(crate) struct Buffer {
    base: NonNull<u8>,
    pages: u32,
}

// SAFETY: memory of this value's own, tied to no thread.
unsafe impl Send for Buffer {}
// SAFETY: it is reached by atomic words and by copies that may race.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Creates a buffer for questions. Returns the file that the other side maps.
    ///
    /// # Errors
    /// Fails if the kernel refuses the memory file or the mapping.
    pub(crate) fn create() -> io::Result<(OwnedFd, Self)> {
        Self::create_pages(PAGES)
    }

    /// The same for so many pages.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub(crate) fn create_pages(pages: u32) -> io::Result<(OwnedFd, Self)> {
        let file = memfd_create("samepage-buffer", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, u64::from(pages) * PAGE_SIZE as u64)?;
        // A file that the other side could cut off would end this process.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let buffer = Self::map_pages(&file, pages)?;
        Ok((file, buffer))
    }

    /// Maps a buffer for questions that the other side has created.
    ///
    /// # Errors
    /// Fails if it has another size, or the kernel refuses the mapping.
    pub(crate) fn map(file: &OwnedFd) -> io::Result<Self> {
        Self::map_pages(file, PAGES)
    }

    /// The same for so many pages.
    ///
    /// # Errors
    /// As [`map`](Self::map).
    pub(crate) fn map_pages(file: &OwnedFd, pages: u32) -> io::Result<Self> {
        let bytes = pages as usize * PAGE_SIZE;
        if fstat(file)?.st_size != bytes as i64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the buffer has another size"));
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, which replaces nothing.
        let base = unsafe { mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, file, 0) }?;
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { base, pages })
    }

    /// The buffer as words.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        assert!(self.pages >= PAGES, "the buffer has no room for words");
        // SAFETY: the mapping has as many words, aligned, as long as this value lasts. This process and the other one
        // reach them by atomic accesses, or by copies that the compiler cannot look into.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), WORDS) }
    }

    /// Puts words in from a place on.
    pub(crate) fn put_words(&self, at: usize, words: impl IntoIterator<Item = u64>) {
        for (place, word) in self.words()[at..].iter().zip(words) {
            place.store(word, Ordering::Relaxed);
        }
    }

    /// Reads the first words.
    pub(crate) fn take_words(&self, count: usize) -> impl Iterator<Item = u64> + '_ {
        self.words()[..count.min(WORDS)].iter().map(|word| word.load(Ordering::Relaxed))
    }

    fn page(&self, index: u32) -> *mut u8 {
        assert!(index < self.pages, "the buffer has no page {index}");
        self.base.as_ptr().wrapping_add(index as usize * PAGE_SIZE)
    }

    /// Copies pages in.
    pub(crate) fn put_pages(&self, pages: Bytes<'_>) {
        for index in 0..pages.pages() {
            // SAFETY: what is named as bytes is mapped, and the page of the buffer is.
            unsafe { content::copy_bytes(pages.page(index), self.page(index)) };
        }
    }

    /// Copies a page in.
    pub(crate) fn put(&self, index: u32, page: &Page) {
        // SAFETY: both are mapped.
        unsafe { content::copy_bytes(page.as_ptr(), self.page(index)) };
    }

    /// Copies a page out.
    pub(crate) fn take(&self, index: u32, page: &mut Page) {
        // SAFETY: the page of the buffer is mapped.
        unsafe { content::copy(self.page(index), page) };
    }

    /// The first pages as bytes, which the other side may change.
    pub(crate) fn bytes(&self, pages: u32) -> Bytes<'_> {
        assert!(pages <= self.pages, "the buffer has no {pages} pages");
        // SAFETY: they are mapped as long as this value lasts.
        unsafe { Bytes::new(self.page(0), pages) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing refers to it any more.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.pages as usize * PAGE_SIZE) };
    }
}
