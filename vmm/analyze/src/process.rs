//! Reads the guest memory of a running process without changing it. The mappings come from `/proc/PID/maps`,
//! the present pages from `/proc/PID/pagemap`, and their content from `/proc/PID/mem`.
//!
//! Absent pages are not read, because reading would populate them. Swapped pages are not read either and
//! count as swapped. The guest continues meanwhile, so a page may change between two reads: the result is an
//! estimate. Source: Linux' Documentation/admin-guide/mm/pagemap.rst.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::oracle::{Image, PAGE_SIZE, TooManyPages};
use samepage_sharing::pagemap::{Entry, Pagemap};
use thiserror::Error;

use super::maps::{self, GuestMemory, Mapping};
use super::progress::Progress;
use samepage_text::units::bytes;

const PAGE: u64 = PAGE_SIZE as u64;
/// Number of pages to look up, and at most to read, at a time.
const CHUNK: usize = 256;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FRAME: u64 = (1 << 55) - 1;

/// The reason why a process cannot be read.
#[derive(Debug, Error)]
pub(super) enum ProcessError {
    #[error("there is no such process")]
    Missing,
    #[error(
        "no permission to read its memory: run as root outside of containers (CAP_SYS_PTRACE), or as the \
         user of the process{yama}"
    )]
    Denied { yama: &'static str },
    #[error("it has no memory of its own: it is a kernel thread, or has ended")]
    NoMemory,
    #[error(
        "it has no read-write mapping of {} or more that could be guest memory; lower --min-mapping, or give \
         the addresses of guest memory with --range START-END (as in /proc/PID/maps)",
        bytes(*.0)
    )]
    NoGuest(u64),
    #[error("nothing readable and writable is mapped at {:x}-{:x}; see /proc/PID/maps", .0.start, .0.end)]
    NoRange(Range<u64>),
    #[error("it ended while it was being read")]
    Ended,
    #[error("reading {what} failed: {error}")]
    Read { what: String, error: io::Error },
    #[error(transparent)]
    TooManyPages(#[from] TooManyPages),
}

/// An open process with guest memory.
#[derive(Debug)]
pub(super) struct Process {
    memory: File,
    pagemap: File,
    /// The kernel's frame of zeros, if it is known. Untouched memory that was only read shows this frame.
    zero_frame: Option<u64>,
    /// The kernel's name of the program.
    pub(super) program: String,
    /// The guest memory.
    pub(super) guest: Vec<GuestMemory>,
}

impl Process {
    /// Opens process `pid` and finds its guest memory: at `ranges`, or without ranges in mappings of at least
    /// `least` bytes.
    pub(super) fn open(pid: u32, ranges: &[Range<u64>], least: u64) -> Result<Self, ProcessError> {
        let folder = format!("/proc/{pid}");
        let failed = |what: &str, error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => ProcessError::Missing,
            io::ErrorKind::PermissionDenied => ProcessError::Denied { yama: yama() },
            _ if error.raw_os_error() == Some(libc::ESRCH) => ProcessError::NoMemory,
            _ => ProcessError::Read { what: format!("{folder}/{what}"), error },
        };
        let open = |what: &str| File::open(format!("{folder}/{what}")).map_err(|error| failed(what, error));
        let text =
            |what: &str| fs::read_to_string(format!("{folder}/{what}")).map_err(|error| failed(what, error));

        let program = text("comm")?.trim_end().to_owned();
        // The map of mappings can be readable even if the memory is not.
        let (memory, pagemap) = (open("mem")?, open("pagemap")?);
        let maps = maps::parse(&text("maps")?);
        if maps.is_empty() {
            return Err(ProcessError::NoMemory);
        }
        let guest = if ranges.is_empty() {
            maps::guess(&maps, least)
        } else {
            let within =
                |range: &Range<u64>| maps::within(&maps, range).ok_or(ProcessError::NoRange(range.clone()));
            ranges.iter().map(within).collect::<Result<_, _>>()?
        };
        if guest.is_empty() {
            return Err(ProcessError::NoGuest(least));
        }
        Ok(Self { memory, pagemap, zero_frame: zero_frame(), program, guest })
    }

    /// Reads a part of guest memory.
    pub(super) fn feed(
        &self,
        part: &GuestMemory,
        image: &mut Image<'_>,
        progress: &mut Progress,
    ) -> Result<(), ProcessError> {
        let mut reader = Reader { process: self, buffer: vec![0; CHUNK * PAGE_SIZE] };
        let mut end = None;
        for mapping in &part.mappings {
            if end != Some(mapping.range.start) {
                image.gap();
            }
            reader.mapping(mapping, image, progress)?;
            end = Some(mapping.range.end);
        }
        Ok(())
    }
}

struct Reader<'a> {
    process: &'a Process,
    buffer: Vec<u8>,
}

/// The handling of a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Page {
    Untouched,
    Swapped,
    Present,
}

impl Reader<'_> {
    fn mapping(
        &mut self,
        mapping: &Mapping,
        image: &mut Image<'_>,
        progress: &mut Progress,
    ) -> Result<(), ProcessError> {
        let mut words = [0; CHUNK * 8];
        let mut position = mapping.range.start;
        while position < mapping.range.end {
            let count = ((mapping.range.end - position) / PAGE).min(CHUNK as u64) as usize;
            let words = &mut words[..count * 8];
            self.process.pagemap.read_exact_at(words, position / PAGE * 8).map_err(|error| {
                // The page map of a process that has ended is empty.
                if error.kind() == io::ErrorKind::UnexpectedEof {
                    ProcessError::Ended
                } else {
                    ProcessError::Read { what: format!("the page map at {position:x}"), error }
                }
            })?;
            let pages =
                words.as_chunks::<8>().0.iter().map(|word| self.page(u64::from_ne_bytes(*word), mapping));
            let pages: Vec<_> = pages.collect();
            for run in pages.chunk_by(|one, other| one == other) {
                match run[0] {
                    Page::Untouched => image.untouched(run.len() as u64),
                    Page::Swapped => image.unread(run.len() as u64),
                    Page::Present => self.read(position, run.len(), image)?,
                }
                position += run.len() as u64 * PAGE;
                progress.add(run.len() as u64 * PAGE);
            }
        }
        Ok(())
    }

    fn page(&self, word: u64, mapping: &Mapping) -> Page {
        if word & PRESENT != 0 {
            let zeros = self.process.zero_frame.is_some_and(|zeros| word & FRAME == zeros);
            if zeros { Page::Untouched } else { Page::Present }
        } else if word & SWAPPED != 0 {
            Page::Swapped
        } else if mapping.on_frames() {
            Page::Present
        } else {
            Page::Untouched
        }
    }

    /// Reads `count` pages. Some of them may disappear meanwhile.
    fn read(&mut self, mut address: u64, count: usize, image: &mut Image<'_>) -> Result<(), ProcessError> {
        let mut left = count * PAGE_SIZE;
        while left > 0 {
            let read = match self.process.memory.read_at(&mut self.buffer[..left], address) {
                // The memory of a process that has ended is empty.
                Ok(0) => return Err(ProcessError::Ended),
                Ok(read) => read - read % PAGE_SIZE,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => 0,
            };
            for page in self.buffer[..read].as_chunks::<PAGE_SIZE>().0 {
                image.page(page)?;
            }
            // An unreadable page stops a read, or makes it fail if it comes first.
            let skipped = if read == 0 { PAGE_SIZE } else { 0 };
            image.unread((skipped / PAGE_SIZE) as u64);
            left -= read + skipped;
            address += (read + skipped) as u64;
        }
        Ok(())
    }
}

/// Returns the kernel's frame of zeros, if this process may see the numbers of frames.
fn zero_frame() -> Option<u64> {
    // The vector is large enough for its own mapping and never written, so all of its pages are untouched.
    let untouched = vec![0_u8; 64 * PAGE_SIZE];
    let page = &untouched[32 * PAGE_SIZE];
    std::hint::black_box(*page);
    let mut entry = [Entry::default()];
    Pagemap::open().ok()?.read(std::ptr::from_ref(page).addr(), &mut entry).ok()?;
    Some(entry[0].physical()).filter(|&frame| frame != 0)
}

/// Returns advice about the restrictions of Linux' Yama module.
fn yama() -> &'static str {
    match fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").as_deref().map(str::trim) {
        Ok("1") => " with `sysctl kernel.yama.ptrace_scope=0`",
        Ok("2") => "; with kernel.yama.ptrace_scope=2 the latter is not enough",
        Ok("3") => "; kernel.yama.ptrace_scope=3 forbids it for everybody until the next boot",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::Oracle;

    #[test]
    fn what_was_never_touched_is_not_read() {
        let mut memory = vec![0_u8; 64 << 20];
        let first = memory.as_ptr().addr().next_multiple_of(PAGE_SIZE) - memory.as_ptr().addr();
        memory[first..first + 2 * PAGE_SIZE].fill(5);
        memory[first + 100 * PAGE_SIZE] = 6;
        let start = (memory.as_ptr().addr() + first) as u64;
        let range = start..start + (32 << 20);
        let process = Process::open(std::process::id(), std::slice::from_ref(&range), 0).unwrap();
        let mut oracle = Oracle::new().unwrap();
        process.feed(&process.guest[0], &mut oracle.image("self"), &mut Progress::off()).unwrap();
        let total = oracle.report().total;
        assert_eq!((total.pages, total.within, total.unique), (8192, 2, 1));
        // Huge pages bring zeros with them.
        assert_eq!(total.untouched + total.zero, 8189);
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        // Process numbers end at 2^22.
        assert!(matches!(Process::open(u32::MAX, &[], 0), Err(ProcessError::Missing)));
        let own = std::process::id();
        assert!(matches!(Process::open(own, &[], 1 << 60), Err(ProcessError::NoGuest(_))));
        assert!(matches!(
            Process::open(own, std::slice::from_ref(&(4096..8192)), 0),
            Err(ProcessError::NoRange(_))
        ));
    }
}
