//! Memory of made-up VMs, with a plain model beside it.
#![allow(dead_code, reason = "each test binary uses its part")]
#![expect(unsafe_code, reason = "plays the guests: writes to and reads from their memory")]

pub(crate) mod agent;
pub(crate) mod counted;
pub(crate) mod disks;
pub(crate) mod distant;
pub(crate) mod followed;
pub(crate) mod pipes;
pub(crate) mod world;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use samepage_sharing::calls::{Linux, MemoryCalls, Over};
use samepage_sharing::engine::{Engine, Settings};
use samepage_sharing::guest::Source;
use samepage_sharing::loss::Cause;
use samepage_sharing::ram::RamRange;
use samepage_sharing::store::{Frame, FrameStore};
use samepage_sharing::{PAGE_SIZE, Ram};

/// Words in a page.
pub(crate) const WORDS: usize = PAGE_SIZE / 8;

/// The word at `index` of the content named `seed`; content 0 is a page of zeros.
pub(crate) fn word(seed: u64, index: usize) -> u64 {
    if seed == 0 { 0 } else { (seed << 16 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
}

/// A made-up VM: RAM that nobody runs in.
pub(crate) struct Guest {
    pub(crate) ram: Arc<Ram>,
}

impl Guest {
    pub(crate) fn new(pages: u32) -> Self {
        let ram = Ram::reserve(pages as usize * PAGE_SIZE).unwrap();
        ram.use_small_pages().unwrap();
        Self { ram: Arc::new(ram) }
    }

    /// One whose RAM huge pages back, where the kernel has them.
    pub(crate) fn huge(pages: u32) -> Self {
        let ram = Ram::reserve(pages as usize * PAGE_SIZE).unwrap();
        ram.use_huge_pages().unwrap();
        Self { ram: Arc::new(ram) }
    }

    /// Writes the content named `seed` word by word, as a guest would.
    pub(crate) fn write(&self, page: u32, seed: u64) {
        let address = self.ram.range(page, 1).page(0).cast::<u64>().cast_mut();
        for index in 0..WORDS {
            // SAFETY: within the page, which is reserved, writable and written by one thread.
            unsafe { address.add(index).write_volatile(word(seed, index)) };
        }
    }

    /// Whether the page begins with a word of zeros.
    pub(crate) fn is_zero(&self, page: u32) -> bool {
        // SAFETY: as in `write`.
        unsafe { self.ram.range(page, 1).page(0).cast::<u64>().read_volatile() == 0 }
    }

    /// Asserts that the page has the content named `seed`.
    pub(crate) fn check(&self, page: u32, seed: u64) {
        let address = self.ram.range(page, 1).page(0).cast::<u64>();
        for index in 0..WORDS {
            // SAFETY: as in `write`.
            let found = unsafe { address.add(index).read_volatile() };
            assert_eq!(found, word(seed, index), "page {page}, word {index}, content {seed}");
        }
    }
}

/// What a call does instead of its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Fails and changes nothing.
    Refuse,
    /// A mapping call that unmaps what was there and then fails, as kernels before 6.12 may.
    Tear,
}

/// The kernel's calls, some of which fail.
pub(crate) struct Faulty {
    pub(crate) linux: Linux,
    /// Asked before every call, by its name.
    pub(crate) plan: Arc<Mutex<dyn FnMut(&'static str) -> Fault + Send>>,
}

impl Faulty {
    fn fault(&self, call: &'static str) -> io::Result<Fault> {
        match (self.plan.lock())(call) {
            Fault::Refuse => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
            fault => Ok(fault),
        }
    }
}

impl MemoryCalls for Faulty {
    fn register(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.fault("register").and_then(|_| self.linux.register(pages))
    }

    fn protect(&self, pages: RamRange<'_>) -> io::Result<u32> {
        // A refusal half-way leaves a part protected.
        if let Err(error) = self.fault("protect") {
            if pages.count() > 1 {
                self.linux.protect(pages.part(0, pages.count() / 2))?;
            }
            return Err(error);
        }
        self.linux.protect(pages)
    }

    fn unprotect(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.fault("unprotect").and_then(|_| self.linux.unprotect(pages))
    }

    fn wake(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.fault("wake").and_then(|_| self.linux.wake(pages))
    }

    fn map(&self, pages: RamRange<'_>, source: Source, over: Over) -> io::Result<()> {
        let call = if over == Over::Pages { "map" } else { "map again" };
        if self.fault(call)? == Fault::Tear {
            // SAFETY: the range is the test's guest RAM, which is not read until it is mapped.
            unsafe { libc::munmap(pages.address() as *mut libc::c_void, pages.bytes()) };
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        self.linux.map(pages, source, over)
    }

    fn discard(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.fault("discard").and_then(|_| self.linux.discard(pages))
    }

    fn stage(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.fault("stage").and_then(|_| self.linux.stage(pages))
    }

    fn clean(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.fault("clean").and_then(|_| self.linux.clean(pages))
    }

    fn restore(&self, pages: RamRange<'_>, over: Over) -> io::Result<()> {
        let call = if over == Over::Pages { "restore" } else { "restore again" };
        if self.fault(call)? == Fault::Tear {
            // SAFETY: as in `map`.
            unsafe { libc::munmap(pages.address() as *mut libc::c_void, pages.bytes()) };
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        self.linux.restore(pages, over)
    }

    fn unstage(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.fault("unstage").and_then(|_| self.linux.unstage(pages))
    }

    fn split(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.fault("split").and_then(|_| self.linux.split(pages))
    }

    fn punch(&self, frame: Frame, count: u32) -> io::Result<()> {
        self.fault("punch").and_then(|_| self.linux.punch(frame, count))
    }
}

pub(crate) fn no_rest(settle: bool) -> Settings {
    Settings { settle, ..Settings::default() }
}

/// An engine on the kernel's calls, faultless or not.
pub(crate) fn engine(settings: &Settings) -> Engine {
    faulty_engine(settings, |_| Fault::None)
}

pub(crate) fn faulty_engine(
    settings: &Settings,
    plan: impl FnMut(&'static str) -> Fault + Send + 'static,
) -> Engine {
    let store = FrameStore::create(1 << 20).unwrap();
    let linux = Linux::open(Arc::clone(store.file())).unwrap();
    Engine::new(settings, store, Box::new(Faulty { linux, plan: Arc::new(Mutex::new(plan)) })).unwrap()
}

/// Steps to the end of a pass; returns how much happened in it.
pub(crate) fn pass(engine: &mut Engine) -> u64 {
    loop {
        if let Some(events) = engine.pass_step() {
            return events;
        }
    }
}

/// Takes all pages off their frames that are to be, without looking at others.
pub(crate) fn take_off(engine: &mut Engine) {
    while engine.unmerge_step(std::time::Instant::now()) {}
}

pub(crate) fn audit(engine: &mut Engine) {
    let report = engine.audit().unwrap();
    assert!(report.passed(), "{report:#?}");
}

/// A count of losses, and the handler that counts.
pub(crate) fn losses() -> (Arc<AtomicU32>, samepage_sharing::space::LostHandler) {
    let count = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&count);
    (
        count,
        Box::new(move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
        }),
    )
}

/// How many mappings the kernel has for a guest's RAM.
pub(crate) fn kernels_mappings(guest: &Guest) -> usize {
    let start = guest.ram.base().as_ptr().addr();
    let end = start + guest.ram.bytes();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|line| {
            let (from, rest) = line.split_once('-').unwrap();
            let (to, _) = rest.split_once(' ').unwrap();
            let address = |text| usize::from_str_radix(text, 16).unwrap();
            address(from) < end && address(to) > start
        })
        .count()
}

/// A small generator of numbers.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Takes pages of a guest away, as a host may: whoever touches them is told by a signal.
pub(crate) fn damage(guest: &Guest, page: u32, count: u32, cause: Cause) {
    let pages = guest.ram.range(page, count);
    let (address, bytes) = (pages.address() as *mut libc::c_void, pages.bytes());
    // SAFETY: the pages are the test's guest RAM, which is under watch.
    unsafe {
        if cause == Cause::Unmapped {
            assert_eq!(libc::munmap(address, bytes), 0);
            return;
        }
        let file = libc::memfd_create(c"cut-off".as_ptr(), libc::MFD_CLOEXEC);
        assert_eq!(libc::ftruncate(file, bytes as i64), 0);
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
        let mapped = libc::mmap(address, bytes, libc::PROT_READ | libc::PROT_WRITE, flags, file, 0);
        assert_ne!(mapped, libc::MAP_FAILED);
        assert_eq!(libc::ftruncate(file, 0), 0);
        libc::close(file);
    }
}
