//! The cost of many mappings of one frame: the kernel keeps a reverse map from a frame to all its mappings,
//! and some operations walk all of it.

#![expect(unsafe_code, reason = "maps a memory file of its own many times, and writes to the mappings")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use samepage_sharing::PAGE_SIZE;

use super::context::Bench;
use super::cpu;
use super::report::{Measurement, Section};

/// Number of mappings of one frame.
const SHARERS: [usize; 4] = [1, 100, 1000, 10_000];
/// Number of repetitions for one figure.
const REPEATS: usize = 64;
/// Number of repetitions of operations that walk all mappings.
const WALKS: usize = 5;
/// A bit for each frame of the host: 1 says that the frame was not used since the bit was set.
const PAGE_IDLE: &str = "/sys/kernel/mm/page_idle/bitmap";

/// Costs in microseconds of CPU time.
#[derive(Debug, Default)]
struct Costs {
    map: Vec<f64>,
    fault: Vec<f64>,
    break_away: Vec<f64>,
    unmap: Vec<f64>,
    punch: Vec<f64>,
    idle: Vec<f64>,
}

pub(super) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let mut one = None;
    let mut sections = Vec::new();
    for sharers in SHARERS.into_iter().filter(|&sharers| !bench.quick || sharers <= 1000) {
        let mut costs = Costs::default();
        for _ in 0..bench.rounds {
            bench.say(format_args!("{sharers} mappings"));
            bench.check()?;
            round(sharers, &mut costs)?;
        }
        let one = one.get_or_insert_with(Costs::default);
        if sharers == 1 {
            *one = costs;
            continue;
        }
        let title = format!("CPU time with a frame that is mapped {sharers} times, beside one mapping");
        let mut section = Section::new(title, format!("{sharers} mappings"), "1 mapping");
        let rows = [
            ("one more mapping", &costs.map, &one.map),
            ("the first read through it", &costs.fault, &one.fault),
            ("a write that breaks away from the frame", &costs.break_away, &one.break_away),
            ("one mapping less", &costs.unmap, &one.unmap),
            ("walk: punch the frame out of the file", &costs.punch, &one.punch),
            ("walk: mark the frame idle", &costs.idle, &one.idle),
        ];
        for (name, ours, other) in rows.into_iter().filter(|(_, ours, _)| !ours.is_empty()) {
            section.push(Measurement::new(name, "µs", ours, other));
        }
        sections.push(section);
    }
    if let Some(last) = sections.last_mut() {
        last.note("KSM makes another copy of a page for every 256 mappings (max_page_sharing)");
        last.note("samepage punches frames that no page shows any more; pages that left theirs still map it");
    }
    Ok(sections)
}

fn round(sharers: usize, costs: &mut Costs) -> Result<()> {
    let frame = Frame::create()?;
    let mut area = Area::reserve(sharers + 1)?;
    for place in 0..sharers {
        area.map(place, &frame)?;
        area.read(place);
    }
    let mut times = [Duration::ZERO; 4];
    for _ in 0..REPEATS {
        let place = sharers;
        let (mapped, map) = cpu::of(|| area.map(place, &frame));
        mapped?;
        let ((), fault) = cpu::of(|| area.read(place));
        let ((), break_away) = cpu::of(|| area.write(place));
        let (unmapped, unmap) = cpu::of(|| area.unmap(place));
        unmapped?;
        for (sum, time) in times.iter_mut().zip([map, fault, break_away, unmap]) {
            *sum += time;
        }
    }
    let figures = [&mut costs.map, &mut costs.fault, &mut costs.break_away, &mut costs.unmap];
    for (figures, time) in figures.into_iter().zip(times) {
        figures.push(cpu::micros_each(time, REPEATS as u64));
    }
    let mut punching = Duration::ZERO;
    for _ in 0..WALKS {
        let (punched, time) = cpu::of(|| frame.punch());
        punched?;
        punching += time;
        frame.fill()?;
        (0..sharers).for_each(|place| area.read(place));
    }
    costs.punch.push(cpu::micros_each(punching, WALKS as u64));
    if let Some(idle) = mark_idle(area.page(0))? {
        costs.idle.push(idle);
    }
    Ok(())
}

/// Returns the microseconds that the kernel takes to mark the frame at an address as idle. The kernel
/// searches all mappings for that. Returns `None` if the kernel does not support it, or does not reveal the
/// frame.
fn mark_idle(address: *mut u8) -> Result<Option<f64>> {
    if !Path::new(PAGE_IDLE).exists() {
        return Ok(None);
    }
    let mut entry = [0; 8];
    let pagemap = File::open("/proc/self/pagemap").context("open the page map")?;
    let place = (address.addr() / PAGE_SIZE * 8) as u64;
    pagemap.read_exact_at(&mut entry, place).context("read the page map")?;
    // Bits 0 to 54 are the frame's number, which is 0 for unprivileged users.
    let number = u64::from_ne_bytes(entry) & ((1 << 55) - 1);
    let Ok(bitmap) = OpenOptions::new().write(true).open(PAGE_IDLE) else { return Ok(None) };
    if number == 0 {
        return Ok(None);
    }
    let mut sum = Duration::ZERO;
    for _ in 0..WALKS {
        let word = (1_u64 << (number % 64)).to_ne_bytes();
        let (written, time) = cpu::of(|| bitmap.write_all_at(&word, number / 64 * 8));
        written.context("mark a frame idle")?;
        sum += time;
    }
    Ok(Some(cpu::micros_each(sum, WALKS as u64)))
}

/// A memory file with one page.
struct Frame(File);

impl Frame {
    fn create() -> Result<Self> {
        // SAFETY: the name is a terminated string, and a new file touches no memory.
        let fd = unsafe { libc::memfd_create(c"samepage-bench".as_ptr(), libc::MFD_CLOEXEC) };
        ensure!(fd >= 0, "creating a memory file: {}", io::Error::last_os_error());
        // SAFETY: the file was just opened and has no other owner.
        let frame = Self(unsafe { File::from_raw_fd(fd) });
        frame.0.set_len(PAGE_SIZE as u64).context("give a memory file its length")?;
        frame.fill()?;
        Ok(frame)
    }

    fn fill(&self) -> Result<()> {
        self.0.write_all_at(&[1; PAGE_SIZE], 0).context("fill a memory file")
    }

    fn punch(&self) -> Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: mappings of the file stay mapped, and read as zeros.
        let failed = unsafe { libc::fallocate(self.0.as_raw_fd(), mode, 0, PAGE_SIZE as i64) } != 0;
        ensure!(!failed, "punching a memory file: {}", io::Error::last_os_error());
        Ok(())
    }
}

/// Address space with room for pages that are never adjacent.
struct Area {
    base: NonNull<u8>,
    places: usize,
}

impl Area {
    fn reserve(places: usize) -> Result<Self> {
        let base = Self::mmap(std::ptr::null_mut(), places * 2 * PAGE_SIZE, None)?;
        Ok(Self { base, places })
    }

    /// Maps a frame, or inaccessible address space.
    fn mmap(address: *mut u8, bytes: usize, frame: Option<&Frame>) -> Result<NonNull<u8>> {
        let fixed = if address.is_null() { 0 } else { libc::MAP_FIXED };
        let (protection, flags, fd) = match frame {
            Some(frame) => (libc::PROT_READ | libc::PROT_WRITE, fixed, frame.0.as_raw_fd()),
            None => (libc::PROT_NONE, fixed | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1),
        };
        // SAFETY: either the kernel chooses the address, or it is within an area that nothing else uses.
        let mapped =
            unsafe { libc::mmap(address.cast(), bytes, protection, libc::MAP_PRIVATE | flags, fd, 0) };
        ensure!(mapped != libc::MAP_FAILED, "mapping {bytes} bytes: {}", io::Error::last_os_error());
        NonNull::new(mapped.cast()).context("the kernel mapped address 0")
    }

    fn page(&self, place: usize) -> *mut u8 {
        assert!(place < self.places);
        self.base.as_ptr().wrapping_add(place * 2 * PAGE_SIZE)
    }

    fn map(&mut self, place: usize, frame: &Frame) -> Result<()> {
        Self::mmap(self.page(place), PAGE_SIZE, Some(frame)).map(|_| ())
    }

    fn unmap(&mut self, place: usize) -> Result<()> {
        Self::mmap(self.page(place), PAGE_SIZE, None).map(|_| ())
    }

    /// Reads a mapped page.
    fn read(&self, place: usize) {
        // SAFETY: the callers have mapped the frame here.
        unsafe { self.page(place).read_volatile() };
    }

    /// Writes to a mapped page.
    fn write(&mut self, place: usize) {
        // SAFETY: as above; the mapping is private and writable.
        unsafe { self.page(place).write_volatile(2) };
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the area was reserved by `reserve` and belongs only to this value.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.places * 2 * PAGE_SIZE) };
    }
}
