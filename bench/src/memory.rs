//! Memory of synthetic VMs: the host writes it in place of guests.

#![expect(
    unsafe_code,
    reason = "plays the guests: writes to and reads from their memory; asks KSM to merge it"
)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use samepage_resources::demo::content::mix;
use samepage_sharing::blocks::FetchRun;
use samepage_sharing::changes::{ChangeLog, PageSet};
use samepage_sharing::{PAGE_SIZE, Ram};
use twox_hash::XxHash3_64;

use super::layout::{ALTERED, Content, Layout};

/// Number of words in a page.
const WORDS: usize = PAGE_SIZE / 8;
const LAST: usize = WORDS - 1;

/// One VM's memory: plain anonymous memory in small pages, for both sides.
#[derive(Debug)]
pub(super) struct Memory {
    ram: Arc<Ram>,
    log: Log,
    touched: Box<[AtomicU64]>,
}

impl Memory {
    /// Returns untouched memory.
    pub(super) fn new(pages: u32) -> Result<Self> {
        let ram = Ram::reserve(pages as usize * PAGE_SIZE).context("reserve memory")?;
        ram.use_small_pages().context("use small pages")?;
        let touched = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { ram: Arc::new(ram), log: Log::new(pages), touched })
    }

    /// Returns the filled memory of all VMs of a layout.
    pub(super) fn filled(layout: &Layout) -> Result<Vec<Self>> {
        let fill = |contents: &Vec<Option<Content>>| {
            let memory = Self::new(contents.len() as u32)?;
            for (page, content) in (0..).zip(contents) {
                content.iter().for_each(|&content| memory.write(page, content));
            }
            Ok(memory)
        };
        layout.vms.iter().map(fill).collect()
    }

    pub(super) fn ram(&self) -> Arc<Ram> {
        Arc::clone(&self.ram)
    }

    /// Returns the log of the writes through this value.
    pub(super) fn log(&self) -> Log {
        self.log.clone()
    }

    pub(super) fn pages(&self) -> u32 {
        self.ram.pages()
    }

    /// Writes a whole page.
    pub(super) fn write(&self, page: u32, content: Content) {
        self.write_words(page, &words(content));
    }

    /// Writes a whole page.
    pub(super) fn write_words(&self, page: u32, words: &[u64; WORDS]) {
        let address = self.address(page);
        // SAFETY: the page is reserved and writable, and there are no references to it.
        unsafe { address.copy_from_nonoverlapping(words.as_ptr(), WORDS) };
        self.note(page);
    }

    /// Writes one word of a page.
    pub(super) fn write_word(&self, page: u32, index: usize, word: u64) {
        assert!(index < WORDS);
        // SAFETY: as above; the index is within the page.
        unsafe { self.address(page).add(index).write_volatile(word) };
        self.note(page);
    }

    /// Writes a page if its content differs.
    pub(super) fn become_like(&self, page: u32, content: &[u8; PAGE_SIZE]) {
        let address = self.address(page).cast::<u8>();
        // SAFETY: the page is reserved, and has the length of the content.
        let same = unsafe { libc::memcmp(address.cast(), content.as_ptr().cast(), PAGE_SIZE) } == 0;
        if !same {
            // SAFETY: as above. The page is writable, and there are no references to it.
            unsafe { address.copy_from_nonoverlapping(content.as_ptr(), PAGE_SIZE) };
            self.note(page);
        }
    }

    /// Copies a block to a page, like a disk.
    pub(super) fn fill(&self, page: u32, content: &[u8; PAGE_SIZE]) {
        let address = self.address(page).cast::<u8>();
        // SAFETY: the page is reserved and writable, and there are no references to it.
        unsafe { address.copy_from_nonoverlapping(content.as_ptr(), PAGE_SIZE) };
        self.note(page);
    }

    /// Fills the memory of a fetch with unique blocks, in place of a disk.
    pub(super) fn land(&self, fetch: &FetchRun, content: u64) {
        for block in 0..fetch.blocks as usize {
            let words = words(content + block as u64 + 1);
            // SAFETY: nothing else accesses the memory of a fetch until it has ended.
            unsafe {
                let to = fetch.landing.as_ptr().add(block * PAGE_SIZE).cast::<u64>();
                to.copy_from_nonoverlapping(words.as_ptr(), WORDS);
            }
        }
    }

    /// Returns a digest of a page's content.
    pub(super) fn digest(&self, page: u32) -> u64 {
        let mut content = [0; PAGE_SIZE];
        // SAFETY: the page is reserved and readable.
        unsafe { samepage_sharing::content::copy(self.address(page).cast(), &mut content) };
        XxHash3_64::oneshot(&content)
    }

    /// Returns the pages that were ever written.
    pub(super) fn touched(&self) -> impl Iterator<Item = u32> + '_ {
        let bit = |page: &u32| 1 << (page % 64);
        let word = |page: &u32| self.touched[*page as usize / 64].load(Ordering::Relaxed);
        (0..self.pages()).filter(move |page| word(page) & bit(page) != 0)
    }

    /// Reads the last word of a page.
    pub(super) fn read(&self, page: u32) -> u64 {
        // SAFETY: the page is reserved and readable.
        unsafe { self.address(page).add(LAST).read_volatile() }
    }

    /// Returns whether a page shows a content, by its last word.
    pub(super) fn shows(&self, page: u32, content: Content) -> bool {
        self.read(page) == word(content, LAST)
    }

    fn note(&self, page: u32) {
        self.touched[page as usize / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
        self.log.note(page);
    }

    fn address(&self, page: u32) -> *mut u64 {
        self.ram.range(page, 1).page(0).cast_mut().cast()
    }
}

/// Returns the words of a content.
pub(super) fn words(content: Content) -> [u64; WORDS] {
    std::array::from_fn(|index| word(content, index))
}

fn word(content: Content, index: usize) -> u64 {
    let base = content & ((1 << ALTERED) - 1);
    match index {
        _ if content == 0 => 0,
        LAST => mix(base << 9 | LAST as u64) ^ content >> ALTERED,
        _ => mix(base << 9 | index as u64),
    }
}

/// Checks that all pages still show their written content. A benchmark of sharing that loses content measures
/// nothing.
pub(super) fn verify(layout: &Layout, memory: &[Memory]) -> Result<()> {
    for (vm, (contents, memory)) in layout.vms.iter().zip(memory).enumerate() {
        for (page, content) in (0..).zip(contents) {
            let good = content.is_none_or(|content| memory.shows(page, content));
            ensure!(good, "page {page} of VM {vm} lost its content");
        }
    }
    Ok(())
}

/// The log of a VM's writes. The host records its own writes, like those of devices.
#[derive(Clone, Debug)]
pub(super) struct Log(Arc<[AtomicU64]>);

impl Log {
    fn new(pages: u32) -> Self {
        let mut all = PageSet::new(pages);
        all.insert_range(0..pages);
        Self(all.words().iter().map(|&word| AtomicU64::new(word)).collect())
    }

    fn note(&self, page: u32) {
        self.0[page as usize / 64].fetch_or(1 << (page % 64), Ordering::Release);
    }
}

impl ChangeLog for Log {
    fn collect(&mut self, written: &mut PageSet) -> io::Result<()> {
        for (word, noted) in written.words_mut().iter_mut().zip(&*self.0) {
            *word |= noted.load(Ordering::Acquire);
        }
        Ok(())
    }

    fn arm(&mut self, first: usize, words: &[u64]) -> io::Result<()> {
        for (noted, &word) in self.0[first..].iter().zip(words) {
            noted.fetch_and(!word, Ordering::AcqRel);
        }
        Ok(())
    }
}
