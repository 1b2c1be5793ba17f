//! Frees memory that work has left behind, once the process is idle.
//!
//! Two kinds of memory stay behind when VMs have started or ended. The first is memory of the allocator: glibc has
//! an arena for each thread, up to eight for each processor, and frees only the end of an arena. The second is code
//! that only the start of a VM needs. The kernel maps 64 KiB around each address that runs, which is nearly all of
//! the program when a VM has started. So the process has few arenas, and frees the unused pages of all arenas and
//! the pages of its code [`REST`] after the last change. When code is needed again, its pages come from the
//! kernel's page cache.

#![expect(unsafe_code, reason = "calls mallopt, malloc_trim, dl_iterate_phdr and madvise")]

use std::ffi::{CStr, c_int, c_void};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::slice;
use std::time::{Duration, Instant};

use samepage_process::poll::is_readable_now;
use vmm_sys_util::timerfd::TimerFd;

/// How many arenas the allocator has. Threads that run VMs and disks allocate next to nothing.
const ARENAS: c_int = 4;
/// How long the process must be idle.
const REST: Duration = Duration::from_secs(1);
/// After how long memory is freed although the process is not idle.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

const PAGE_BYTES: usize = 4096;
/// Bits in a page's word of `/proc/PID/pagemap`: swapped, belongs to a file, present.
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
const PRESENT: u64 = 1 << 63;

/// Limits the number of the allocator's arenas. To be called before any thread starts.
pub(crate) fn keep_arenas_few() {
    // SAFETY: the call changes a number of the allocator under the allocator's lock. If it fails, there are more
    // arenas.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
}

/// Waits until the process is idle.
#[derive(Debug)]
pub(crate) struct Upkeep {
    timer: TimerFd,
    /// The first change since memory was freed.
    changed: Option<Instant>,
}

impl Upkeep {
    /// # Errors
    /// Fails if the process is out of files.
    pub(crate) fn new() -> io::Result<Self> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        Ok(Self { timer, changed: None })
    }

    /// Records that a VM has started or ended.
    ///
    /// # Errors
    /// Fails if the timer cannot be set.
    pub(crate) fn note_change(&mut self) -> io::Result<()> {
        let since = self.changed.get_or_insert_with(Instant::now).elapsed();
        if since < LONGEST_WAIT {
            self.timer.reset(REST, None).map_err(io::Error::from)?;
        }
        Ok(())
    }

    /// Frees memory. To be called when the [file](Self::as_raw_fd) is readable.
    ///
    /// # Errors
    /// Fails if the timer cannot be read.
    pub(crate) fn free_unused(&mut self) -> io::Result<()> {
        // A change may have set the timer anew meanwhile.
        if is_readable_now(self.timer.as_raw_fd())? {
            self.timer.wait().map_err(io::Error::from)?;
            self.changed = None;
            free_unused();
        }
        Ok(())
    }
}

impl AsRawFd for Upkeep {
    /// Readable when memory is to be freed.
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

fn free_unused() {
    // SAFETY: the allocator takes its own locks, and frees only pages without allocations.
    unsafe { libc::malloc_trim(0) };
    // If the kernel does not report a segment's content, its pages stay.
    if let Ok(map) = File::open("/proc/self/pagemap") {
        for segment in code() {
            if is_of_file(&map, &segment).unwrap_or(false) {
                drop_pages(&segment);
            }
        }
    }
}

/// Returns the addresses of segments of the program and its libraries that are never written, in whole pages.
fn code() -> Vec<Range<usize>> {
    let mut segments: Vec<Range<usize>> = Vec::new();
    // SAFETY: the callback gets the vector that it expects. The vector outlives the call, and the callback does not unwind.
    unsafe { libc::dl_iterate_phdr(Some(note_object), (&raw mut segments).cast()) };
    segments
}

/// Collects the segments of one program or library.
unsafe extern "C" fn note_object(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    segments: *mut c_void,
) -> c_int {
    // SAFETY: the linker passes a description that is valid for this call, and `code` passes its vector.
    let (info, segments) = unsafe { (&*info, &mut *segments.cast::<Vec<Range<usize>>>()) };
    // The program has no name, libraries have a path. The kernel's vDSO has neither, and no file.
    let is_file = info.dlpi_name.is_null() || {
        // SAFETY: names that are not null end with a zero byte.
        let name = unsafe { CStr::from_ptr(info.dlpi_name) }.to_bytes();
        name.is_empty() || name.starts_with(b"/")
    };
    if info.dlpi_phdr.is_null() || !is_file {
        return 0;
    }
    // SAFETY: the linker keeps this number of headers at this address while the object is loaded.
    let headers = unsafe { slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    let loaded =
        headers.iter().filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0);
    segments.extend(loaded.map(|header| {
        let start = (info.dlpi_addr + header.p_vaddr) as usize;
        let end = start + header.p_memsz as usize;
        start / PAGE_BYTES * PAGE_BYTES..end.next_multiple_of(PAGE_BYTES)
    }));
    0
}

/// Returns whether all pages of a segment come from the file. Other pages, such as those with a debugger's breakpoints,
/// would be lost.
fn is_of_file(map: &File, segment: &Range<usize>) -> io::Result<bool> {
    let mut words = vec![0; segment.len() / PAGE_BYTES * 8];
    map.read_exact_at(&mut words, (segment.start / PAGE_BYTES * 8) as u64)?;
    let mut words = words.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes")));
    Ok(words.all(|word| word & SWAPPED == 0 && (word & PRESENT == 0 || word & OF_FILE != 0)))
}

fn drop_pages(segment: &Range<usize>) {
    // SAFETY: the range holds pages of a file that the linker mapped. They are never written (`code`) and unchanged
    // (`is_of_file`). The next access reads the same content from the file again.
    unsafe { libc::madvise(segment.start as *mut c_void, segment.len(), libc::MADV_DONTNEED) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of a segment that are mapped.
    fn mapped(segment: &Range<usize>) -> usize {
        let map = File::open("/proc/self/pagemap").unwrap();
        let mut words = vec![0; segment.len() / PAGE_BYTES * 8];
        map.read_exact_at(&mut words, (segment.start / PAGE_BYTES * 8) as u64).unwrap();
        let words = words.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
        words.filter(|word| word & PRESENT != 0).count()
    }

    #[test]
    fn code_is_found_and_runs_on_after_its_pages_were_freed() {
        let here = free_unused as fn() as usize;
        let segments = code();
        let own = segments.iter().find(|segment| segment.contains(&here)).expect("this program's code");
        assert!(segments.iter().any(|segment| segment.contains(&(libc::madvise as *const () as usize))));
        let map = File::open("/proc/self/pagemap").unwrap();
        assert!(is_of_file(&map, own).unwrap());
        assert!(!is_of_file(&map, &stack_page()).unwrap());
        for page in own.clone().step_by(PAGE_BYTES) {
            // SAFETY: a byte of this program's code, which is readable.
            unsafe { std::ptr::read_volatile(page as *const u8) };
        }
        let before = mapped(own);
        assert_eq!(before, own.len() / PAGE_BYTES);
        free_unused();
        // Other tests run meanwhile and map some of the pages again.
        assert!(mapped(own) < before);
    }

    fn stack_page() -> Range<usize> {
        let word = 1_u64;
        let page = std::hint::black_box(&raw const word) as usize / PAGE_BYTES * PAGE_BYTES;
        page..page + PAGE_BYTES
    }

    #[test]
    fn memory_is_freed_after_a_rest_and_once() {
        let mut upkeep = Upkeep::new().unwrap();
        upkeep.free_unused().unwrap();
        upkeep.note_change().unwrap();
        assert!(upkeep.changed.is_some());
        samepage_process::poll::wait_readable([Some(upkeep.as_raw_fd())]).unwrap();
        upkeep.free_unused().unwrap();
        assert!(upkeep.changed.is_none());
        assert!(!is_readable_now(upkeep.as_raw_fd()).unwrap());
    }
}
