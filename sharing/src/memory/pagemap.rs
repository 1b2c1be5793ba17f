//! The kernel's page map of this process: which guest pages are private copies.
//!
//! A page is *private* when it is present and not file-backed. That is the only proof that it has
//! left the frame its address refers to; everything else (not present, swapped, a userfaultfd
//! marker, migrating) counts as still mapped.
//!
//! `PAGEMAP_SCAN` (Linux 6.7) finds runs of such pages in the kernel; older kernels hand over 8
//! bytes a page. See `Documentation/admin-guide/mm/pagemap.rst`.

#![expect(unsafe_code, reason = "PAGEMAP_SCAN and address space have no safe wrapper")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::memory::ram::{PAGE_SIZE, Ram, RamRange};

const IOCTL_SCAN: libc::c_ulong = 0xc060_6610;

const CATEGORY_FILE: u64 = 1 << 2;
const CATEGORY_PRESENT: u64 = 1 << 3;
const CATEGORY_ZERO_FRAME: u64 = 1 << 5;
const CATEGORY_HUGE: u64 = 1 << 6;

/// How many runs one scan returns at most.
const REGIONS: usize = 256;
/// How much memory one call scans: it holds a lock of the process for some 5 ns a page.
const SCAN_BYTES: u64 = 128 << 20;
/// How many pages the older way reads at a time.
const ENTRIES: usize = 512;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// One page's word in `/proc/PID/pagemap`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    pub(crate) fn new(word: u64) -> Self {
        Self(word)
    }

    pub(crate) fn word(self) -> u64 {
        self.0
    }

    /// The page is in memory.
    #[must_use]
    pub fn present(self) -> bool {
        self.0 & (1 << 63) != 0
    }

    /// The page is in swap (or is being migrated).
    #[must_use]
    pub fn swapped(self) -> bool {
        self.0 & (1 << 62) != 0
    }

    /// The page belongs to a file: for guest RAM, to the frame store.
    #[must_use]
    pub fn file(self) -> bool {
        self.0 & (1 << 61) != 0
    }

    /// The page is write-protected by userfaultfd.
    #[must_use]
    pub fn write_protected(self) -> bool {
        self.0 & (1 << 57) != 0
    }

    /// Proof that the address shows a private page.
    #[must_use]
    pub fn private(self) -> bool {
        self.present() && !self.file()
    }

    /// Number of the physical page; 0 where the process may not know (without CAP_SYS_ADMIN).
    #[must_use]
    pub fn physical(self) -> u64 {
        if self.present() { self.0 & ((1 << 55) - 1) } else { 0 }
    }
}

/// The page map of this process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    scan: bool,
    /// The physical page of zeros that reads of untouched memory show, where it can be known.
    zero_page: Option<u64>,
}

impl Pagemap {
    /// Opens the page map and learns which way of reading it this kernel has.
    ///
    /// # Errors
    /// Where `/proc` is not mounted or hides the file.
    pub fn open() -> io::Result<Self> {
        let mut pagemap = Self { file: File::open("/proc/self/pagemap")?, scan: true, zero_page: None };
        let sample = Ram::reserve(PAGE_SIZE)?;
        // SAFETY: the page is reserved and readable; the read makes the kernel map its zero page.
        unsafe { sample.base().as_ptr().read_volatile() };
        let mut entry = [Entry(0)];
        pagemap.read(sample.range(0, 1).address(), &mut entry)?;
        pagemap.zero_page = Some(entry[0].physical()).filter(|&physical| physical != 0);
        pagemap.scan = pagemap.scan_private(sample.range(0, 1), &mut Vec::new()).is_ok();
        Ok(pagemap)
    }

    /// Appends to `runs` the pages of `pages` that are private and not the kernel's page of zeros,
    /// as page indices of their RAM, in order, runs as long as they go.
    ///
    /// # Errors
    /// What the kernel said. `runs` may then hold a part of the answer.
    pub fn private(&self, pages: RamRange<'_>, runs: &mut Vec<Range<u32>>) -> io::Result<()> {
        if self.scan { self.scan_private(pages, runs) } else { self.read_private(pages, runs) }
    }

    /// Whether this kernel says which pages are parts of huge ones.
    #[must_use]
    pub fn tells_huge(&self) -> bool {
        self.scan
    }

    /// Appends to `runs` the pages of `pages` that are private and mapped as parts of huge pages, but for
    /// the kernel's huge page of zeros where it tells that from others.
    ///
    /// # Errors
    /// As [`Pagemap::private`]; what the kernel said where it does not tell.
    pub fn huge(&self, pages: RamRange<'_>, runs: &mut Vec<Range<u32>>) -> io::Result<()> {
        self.scan(pages, CATEGORY_HUGE, runs)
    }

    fn scan_private(&self, pages: RamRange<'_>, runs: &mut Vec<Range<u32>>) -> io::Result<()> {
        self.scan(pages, 0, runs)
    }

    /// Finds private pages that are also in all of these categories.
    fn scan(&self, pages: RamRange<'_>, besides: u64, runs: &mut Vec<Range<u32>>) -> io::Result<()> {
        let base = pages.address() as u64;
        let end = base + pages.bytes() as u64;
        let mut start = base;
        let mut regions = [Region::default(); REGIONS];
        while start < end {
            let mut argument = ScanArgument {
                size: size_of::<ScanArgument>() as u64,
                start,
                end: end.min(start + SCAN_BYTES),
                regions: regions.as_mut_ptr().addr() as u64,
                regions_len: REGIONS as u64,
                category_mask: CATEGORY_PRESENT | CATEGORY_FILE | CATEGORY_ZERO_FRAME | besides,
                category_inverted: CATEGORY_FILE | CATEGORY_ZERO_FRAME,
                return_mask: CATEGORY_PRESENT,
                ..ScanArgument::default()
            };
            regions.as_mut_ptr().expose_provenance();
            // SAFETY: the argument has the layout that this ioctl reads and writes, and names a
            // live array of regions with its length.
            let found = unsafe { libc::ioctl(self.file.as_raw_fd(), IOCTL_SCAN as _, &raw mut argument) };
            if found < 0 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() == Some(libc::EINTR) {
                    continue;
                }
                return Err(error);
            }
            for region in &regions[..found as usize] {
                let page = |address: u64| pages.first() + ((address - base) / PAGE_SIZE as u64) as u32;
                push(runs, page(region.start)..page(region.end));
            }
            if argument.walk_end <= start {
                break;
            }
            start = argument.walk_end;
        }
        Ok(())
    }

    fn read_private(&self, pages: RamRange<'_>, runs: &mut Vec<Range<u32>>) -> io::Result<()> {
        let mut entries = [Entry(0); ENTRIES];
        let mut done = 0;
        while done < pages.count() {
            let count = (pages.count() - done).min(ENTRIES as u32);
            let part = pages.part(done, count);
            let entries = &mut entries[..count as usize];
            self.read(part.address(), entries)?;
            for (page, entry) in (part.first()..).zip(entries.iter()) {
                if entry.private() && Some(entry.physical()) != self.zero_page {
                    push(runs, page..page + 1);
                }
            }
            done += count;
        }
        Ok(())
    }

    /// Reads the words of consecutive pages from `address` on.
    ///
    /// # Errors
    /// What the kernel said, or `UnexpectedEof` beyond the end of the address space.
    pub fn read(&self, address: usize, entries: &mut [Entry]) -> io::Result<()> {
        let mut bytes = [0; ENTRIES * 8];
        let mut offset = (address / PAGE_SIZE * 8) as u64;
        for entries in entries.chunks_mut(ENTRIES) {
            let bytes = &mut bytes[..entries.len() * 8];
            self.file.read_exact_at(bytes, offset)?;
            for (entry, word) in entries.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *entry = Entry(u64::from_ne_bytes(*word));
            }
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    /// How many of the first `pages` are protected by userfaultfd without a gap.
    ///
    /// # Errors
    /// As [`Pagemap::read`].
    pub fn protected_prefix(&self, pages: RamRange<'_>) -> io::Result<u32> {
        let mut entries = [Entry(0); ENTRIES];
        let entries = &mut entries[..pages.count() as usize];
        self.read(pages.address(), entries)?;
        Ok(entries.iter().take_while(|entry| entry.write_protected()).count() as u32)
    }
}

fn push(runs: &mut Vec<Range<u32>>, run: Range<u32>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(ram: &Ram, page: u32) {
        let address = ram.range(page, 1).page(0).cast_mut();
        // SAFETY: the page is reserved, writable and this test's own.
        unsafe { address.write_volatile(1) };
    }

    #[test]
    fn both_ways_find_the_written_pages_and_no_others() {
        let ram = Ram::reserve(64 * PAGE_SIZE).unwrap();
        ram.use_small_pages().unwrap();
        for page in [0, 5, 6, 7, 63] {
            touch(&ram, page);
        }
        // SAFETY: as above; a read populates page 20 with the kernel's page of zeros.
        unsafe { ram.range(20, 1).page(0).read_volatile() };
        let mut pagemap = Pagemap::open().unwrap();
        for scan in [pagemap.scan, false] {
            pagemap.scan = scan;
            let mut runs = Vec::new();
            pagemap.private(ram.range(0, 64), &mut runs).unwrap();
            if pagemap.zero_page.is_none() && !scan {
                runs.retain(|run| *run != (20..21));
            }
            assert_eq!(runs, [0..1, 5..8, 63..64], "scan: {scan}");
        }
    }

    #[test]
    fn more_runs_than_one_call_returns() {
        let pages = 4 * REGIONS as u32 + 6;
        let ram = Ram::reserve(pages as usize * PAGE_SIZE).unwrap();
        ram.use_small_pages().unwrap();
        for page in (0..pages).step_by(2) {
            touch(&ram, page);
        }
        let mut runs = Vec::new();
        Pagemap::open().unwrap().private(ram.range(1, pages - 1), &mut runs).unwrap();
        let expected: Vec<_> = (2..pages).step_by(2).map(|page| page..page + 1).collect();
        assert_eq!(runs, expected);
    }
}
