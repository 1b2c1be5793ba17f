//! Memory that the host cannot supply: a page that is poisoned (a machine check), whose backing was cut off
//! (SIGBUS), or that is not mapped at all (SIGSEGV). Whoever of this process touches such a page of guest
//! memory ends one VM, and never the process.
//!
//! Ranges are entered with [`watch`]. A signal handler looks up the address that could not be accessed. For
//! one within a range it first notes that the range is *lost*, then puts a page of zeros there, so that the
//! access goes on. A thread tells the range's owner, who ends the VM with a report. For all other addresses
//! the handler does what was set up before it: the process ends, as it should.
//!
//! # What a reader owes
//! Zeros that were put there are nobody's content. Whoever reads guest memory to act on it asks whether the
//! range is lost *after* it has read and *before* it acts: since the note comes before the zeros, whoever
//! has read them sees it. Disks write straight from guest memory; there the kernel reads, between that
//! question and the end of the write. A write that such a fault overtakes may put zeros into the sectors that
//! it was to write. It is never reported as done.
//!
//! # What is allowed in the handler
//! Atomic loads and stores, `mmap` and `write`: nothing that takes a lock or allocates. Entries are found
//! through chunks that are never freed.

#![expect(unsafe_code, reason = "handles signals and puts pages in the place of lost ones")]

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use libc::{c_int, c_void, siginfo_t};
use parking_lot::Mutex;

use crate::memory::ram::PAGE_SIZE;

/// Entries of a chunk.
const CHUNK: usize = 64;
/// Stack of the thread that tells of losses, in bytes.
const STACK_BYTES: usize = 64 << 10;

/// What could not be supplied, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Where it was, in bytes from the start of the range.
    pub offset: usize,
    /// Fails if the kernel refuses.
    pub cause: Cause,
}

/// Why memory could not be supplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A machine check: the memory itself is faulty.
    Poisoned,
    /// Its backing is gone: a file was cut off, or swapped memory could not be read.
    Unbacked,
    /// Nothing is mapped there.
    Unmapped,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = match self.cause {
            Cause::Poisoned => "the host's memory is faulty there; see the kernel log (dmesg)",
            Cause::Unbacked => {
                "the host has lost what backs it: an I/O error hit swapped memory, or a file was cut off"
            }
            Cause::Unmapped => "nothing is mapped there any more",
        };
        write!(f, "page {} cannot be used: {why}", self.offset / PAGE_SIZE)
    }
}

/// What became of a range.
#[derive(Debug)]
struct State {
    lost: Arc<AtomicBool>,
    offset: AtomicUsize,
    cause: AtomicI32,
    /// A part of the range may be somebody else's by now.
    torn: AtomicBool,
}

impl State {
    fn loss(&self) -> Option<Loss> {
        self.lost.load(Ordering::SeqCst).then(|| Loss {
            offset: self.offset.load(Ordering::SeqCst),
            cause: match self.cause.load(Ordering::SeqCst) {
                0 => Cause::Poisoned,
                1 => Cause::Unbacked,
                _ => Cause::Unmapped,
            },
        })
    }

    /// Notes the first loss. Async-signal-safe.
    fn lose(&self, offset: usize, cause: Cause) {
        if !self.lost.load(Ordering::SeqCst) {
            self.offset.store(offset, Ordering::SeqCst);
            self.cause.store(cause as i32, Ordering::SeqCst);
            self.lost.store(true, Ordering::SeqCst);
            LOSSES.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// One range, or none where `start` is 0.
struct Entry {
    start: AtomicUsize,
    bytes: AtomicUsize,
    /// Belongs to the [`Watch`], which takes the entry back before it gives this up.
    state: AtomicPtr<State>,
}

impl Entry {
    const fn new() -> Self {
        Self {
            start: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            state: AtomicPtr::new(ptr::null_mut()),
        }
    }
}

struct Chunk {
    entries: [Entry; CHUNK],
    next: AtomicPtr<Chunk>,
}

impl Chunk {
    const fn new() -> Self {
        Self { entries: [const { Entry::new() }; CHUNK], next: AtomicPtr::new(ptr::null_mut()) }
    }
}

static FIRST: Chunk = Chunk::new();
/// Losses since the start of the process.
static LOSSES: AtomicU64 = AtomicU64::new(0);
/// Who enters ranges. Never taken in the handler.
static ENTERING: Mutex<()> = Mutex::new(());
static INSTALLED: OnceLock<Result<Installed, i32>> = OnceLock::new();
static TELLERS: Mutex<Vec<Teller>> = Mutex::new(Vec::new());

/// What the handler needs, and what was set up before it.
struct Installed {
    /// Written when there is a loss to be told of.
    news: OwnedFd,
    before: [libc::sigaction; 2],
}

/// Who is told of a loss.
struct Teller {
    state: Arc<State>,
    tell: Box<dyn FnOnce(Loss) + Send>,
}

/// What a handler of a signal is.
pub type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);

/// Called for faults that concern no range.
static OTHERS: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// Has `handler` called for SIGBUS and SIGSEGV that concern no range, in place of what was set up before. It
/// may do what handlers may.
///
/// # Errors
/// Fails if the signals' handlers cannot be had.
pub fn on_other_faults(handler: Handler) -> io::Result<()> {
    OTHERS.store(handler as *mut c_void, Ordering::SeqCst);
    install()
}

/// Notes that memory of another process was lost, with that process.
pub(crate) fn note() {
    LOSSES.fetch_add(1, Ordering::SeqCst);
}

/// How many ranges were lost since the start of the process. Where it has not changed, no range was.
pub fn count() -> u64 {
    LOSSES.load(Ordering::SeqCst)
}

fn entries() -> impl Iterator<Item = &'static Entry> {
    let mut chunk: Option<&'static Chunk> = Some(&FIRST);
    std::iter::from_fn(move || {
        let present = chunk?;
        // SAFETY: chunks are leaked when they are made.
        chunk = unsafe { present.next.load(Ordering::Acquire).as_ref() };
        Some(present)
    })
    .flat_map(|chunk| &chunk.entries)
}

/// A range under watch, until this value goes. The memory has to stay this process's own until then.
#[derive(Debug)]
pub struct Watch {
    entry: Option<&'static Entry>,
    state: Arc<State>,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (start, bytes) = (self.start.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed));
        write!(f, "{start:#x}+{bytes:#x}")
    }
}

/// Has faults within a range noted, rather than end the process.
///
/// # Safety
/// The range consists of whole pages and belongs to the caller until the returned value goes. Nobody refers
/// to what is in it but by volatile or atomic accesses: pages of zeros may take the place of lost ones.
///
/// # Errors
/// Fails if the signals' handlers or the event that wakes the teller cannot be had.
pub unsafe fn watch(start: usize, bytes: usize) -> io::Result<Watch> {
    install()?;
    let state = Arc::new(State {
        lost: Arc::default(),
        offset: AtomicUsize::new(0),
        cause: AtomicI32::new(0),
        torn: AtomicBool::new(false),
    });
    let _one = ENTERING.lock();
    let entry = entries().find(|entry| entry.start.load(Ordering::Relaxed) == 0);
    let entry = entry.unwrap_or_else(|| {
        let chunk: &'static Chunk = Box::leak(Box::new(Chunk::new()));
        chunk.next.store(FIRST.next.load(Ordering::Relaxed), Ordering::Relaxed);
        FIRST.next.store(ptr::from_ref(chunk).cast_mut(), Ordering::Release);
        &chunk.entries[0]
    });
    entry.bytes.store(bytes, Ordering::Relaxed);
    entry.state.store(Arc::as_ptr(&state).cast_mut(), Ordering::Relaxed);
    entry.start.store(start, Ordering::Release);
    Ok(Watch { entry: Some(entry), state })
}

impl Watch {
    /// Whether a part of the range was lost.
    #[must_use]
    pub fn lost(&self) -> bool {
        self.state.lost.load(Ordering::SeqCst)
    }

    /// The same, as something that lasts longer than the range.
    #[must_use]
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.state.lost)
    }

    /// What was lost first.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        self.state.loss()
    }

    /// Has `tell` called, from a thread of its own, once a part of the range is lost; at once where one is.
    ///
    /// # Errors
    /// Fails if there is no such thread to be had.
    pub fn on_loss(&self, tell: impl FnOnce(Loss) + Send + 'static) -> io::Result<()> {
        start_telling()?;
        TELLERS.lock().push(Teller { state: Arc::clone(&self.state), tell: Box::new(tell) });
        if self.lost() {
            notify();
        }
        Ok(())
    }

    /// Notes that a part of the range is lost. Who is to be told is told by the caller.
    pub(crate) fn lose(&self, offset: usize) {
        self.state.lose(offset, Cause::Unmapped);
    }

    /// A part of the range may be somebody else's from now on: nothing is replaced there.
    pub(crate) fn tear(&self) {
        self.state.torn.store(true, Ordering::SeqCst);
    }

    /// Ends the watch: the range is about to be given up.
    pub(crate) fn end(&mut self) {
        if let Some(entry) = self.entry.take() {
            let _one = ENTERING.lock();
            entry.start.store(0, Ordering::SeqCst);
        }
        TELLERS.lock().retain(|teller| !Arc::ptr_eq(&teller.state, &self.state));
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

/// Sets the handlers up, once for the process.
fn install() -> io::Result<()> {
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: opens an event.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
        }
        // SAFETY: the descriptor is new and nobody else's.
        let news = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut before = [const { MaybeUninit::<libc::sigaction>::zeroed() }; 2];
        for (signal, before) in [libc::SIGBUS, libc::SIGSEGV].into_iter().zip(&mut before) {
            // SAFETY: asks for the action without changing it.
            if unsafe { libc::sigaction(signal, ptr::null(), before.as_mut_ptr()) } != 0 {
                return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
            }
        }
        // SAFETY: zeroes are a valid value, which the kernel has overwritten.
        let before = before.map(|action| unsafe { action.assume_init() });
        Ok(Installed { news, before })
    });
    let _one = ENTERING.lock();
    static HANDLING: AtomicBool = AtomicBool::new(false);
    match installed {
        Err(errno) => return Err(io::Error::from_raw_os_error(*errno)),
        // What the handler reads is there by now.
        Ok(_) if HANDLING.swap(true, Ordering::SeqCst) => return Ok(()),
        Ok(_) => {}
    }
    for signal in [libc::SIGBUS, libc::SIGSEGV] {
        // SAFETY: zeroes are a valid value of the structure.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        let handler: Handler = handle;
        action.sa_sigaction = handler as usize;
        // On the alternative stack, where a thread has one: a stack that has overflowed is none of ours.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler does only what is allowed in one.
        if unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn handle(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands out the structure; the address is meant where the kernel sent the signal.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // SAFETY: the place of this thread's error number.
    let errno = unsafe { *libc::__errno_location() };
    let supplied = code > 0 && supply(signal, code, address);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if supplied {
        return;
    }
    let others = OTHERS.load(Ordering::SeqCst);
    if !others.is_null() {
        // SAFETY: nothing but handlers is stored there.
        let handler: Handler = unsafe { std::mem::transmute(others) };
        return handler(signal, info, context);
    }
    let Some(Ok(installed)) = INSTALLED.get() else { return };
    let before = &installed.before[usize::from(signal == libc::SIGSEGV)];
    match before.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // The instruction is tried again, and ends the process as it would have.
            // SAFETY: gives the signal the action that it had.
            unsafe { libc::sigaction(signal, before, ptr::null_mut()) };
        }
        // SAFETY: the handler that was set up before, called as the kernel would; a handler without
        // SA_SIGINFO takes the first argument and ignores the others.
        handler => unsafe {
            let handler: Handler = std::mem::transmute(handler);
            handler(signal, info, context);
        },
    }
}

/// Puts a page of zeros where one was lost, if the address is in a range. Async-signal-safe.
fn supply(signal: c_int, code: c_int, address: usize) -> bool {
    const BUS_MCEERR_AR: c_int = 4;
    const BUS_MCEERR_AO: c_int = 5;
    const SEGV_MAPERR: c_int = 1;
    let inside = |entry: &&Entry| {
        let start = entry.start.load(Ordering::Acquire);
        start != 0 && address.wrapping_sub(start) < entry.bytes.load(Ordering::Relaxed)
    };
    let Some(entry) = entries().find(inside) else { return false };
    let (start, bytes) = (entry.start.load(Ordering::Acquire), entry.bytes.load(Ordering::Relaxed));
    // SAFETY: the entry's watch keeps the state, and lives as long as anybody accesses the range.
    let Some(state) = (unsafe { entry.state.load(Ordering::Relaxed).as_ref() }) else { return false };
    let hole = signal == libc::SIGSEGV && code == SEGV_MAPERR;
    if state.torn.load(Ordering::SeqCst) && !hole {
        return false;
    }
    let cause = match (signal, code) {
        (libc::SIGBUS, BUS_MCEERR_AR | BUS_MCEERR_AO) => Cause::Poisoned,
        (libc::SIGBUS, _) => Cause::Unbacked,
        _ => Cause::Unmapped,
    };
    // The note comes before the zeros: see the module.
    state.lose(address - start, cause);
    notify();
    let page = address & !(PAGE_SIZE - 1);
    let fixed = if hole { libc::MAP_FIXED_NOREPLACE } else { libc::MAP_FIXED };
    if map(page, PAGE_SIZE, fixed) {
        return true;
    }
    // SAFETY: the place of this thread's error number.
    match unsafe { *libc::__errno_location() } {
        // Another thread was faster.
        libc::EEXIST => true,
        // Out of mappings: one for all of the range takes none.
        _ if !state.torn.load(Ordering::SeqCst) => map(start, bytes, libc::MAP_FIXED),
        _ => false,
    }
}

fn map(start: usize, bytes: usize, fixed: c_int) -> bool {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed;
    // SAFETY: within a range under watch, whose owner has promised that pages may be replaced; with
    // MAP_FIXED_NOREPLACE nothing is.
    unsafe { libc::mmap(start as *mut c_void, bytes, access, flags, -1, 0) != libc::MAP_FAILED }
}

/// Wakes the teller up. Async-signal-safe.
fn notify() {
    if let Some(Ok(installed)) = INSTALLED.get() {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: writes eight bytes of ours. A counter that is full is readable as it is.
        unsafe { libc::write(installed.news.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

/// Starts the thread that tells of losses, once for the process.
fn start_telling() -> io::Result<()> {
    static TELLING: Mutex<bool> = Mutex::new(false);
    let mut telling = TELLING.lock();
    if !*telling {
        thread::Builder::new().name("memory-loss".into()).stack_size(STACK_BYTES).spawn(tell_losses)?;
        *telling = true;
    }
    Ok(())
}

fn tell_losses() {
    let Some(Ok(installed)) = INSTALLED.get() else { return };
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: fills the set in and blocks all signals for this thread: they are for others.
    unsafe {
        libc::sigfillset(set.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut());
    }
    loop {
        let mut number = [0; 8];
        // SAFETY: the buffer is as long as told. A read that was interrupted is like one that was not.
        unsafe { libc::read(installed.news.as_raw_fd(), number.as_mut_ptr().cast(), number.len()) };
        let due: Vec<_> = TELLERS.lock().extract_if(.., |teller| teller.state.loss().is_some()).collect();
        for Teller { state, tell } in due {
            if let Some(loss) = state.loss() {
                tell(loss);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::memory::ram::Ram;

    #[test]
    fn holes_and_files_that_were_cut_off_read_as_zeros_and_are_told_once() {
        for cause in [Cause::Unmapped, Cause::Unbacked] {
            let ram = Ram::reserve(8 * PAGE_SIZE).unwrap();
            let (sender, told) = mpsc::channel();
            ram.on_loss(move |loss| sender.send(loss).unwrap()).unwrap();
            let others = Ram::reserve(8 * PAGE_SIZE).unwrap();
            let page = ram.range(5, 1).page(0);
            damage(page.addr(), 2, cause);
            assert!(!ram.lost());
            // SAFETY: the pages are the test's own, under watch.
            let read =
                unsafe { (page.add(7).read_volatile(), page.add(PAGE_SIZE).cast::<u64>().read_volatile()) };
            assert_eq!(read, (0, 0));
            assert!(ram.lost() && !others.lost());
            let loss = told.recv_timeout(Duration::from_secs(60)).unwrap();
            assert_eq!(loss, Loss { offset: 5 * PAGE_SIZE + 7, cause });
            assert!(told.try_recv().is_err());
            // SAFETY: as above; writing works as well.
            unsafe { page.cast_mut().write_volatile(3) };
        }
    }

    #[test]
    fn there_is_room_for_any_number_of_ranges() {
        let all: Vec<_> = (0..3 * CHUNK).map(|_| Ram::reserve(PAGE_SIZE).unwrap()).collect();
        let last = &all[3 * CHUNK - 1];
        damage(last.base().as_ptr().addr(), 1, Cause::Unmapped);
        // SAFETY: as above.
        unsafe { last.base().as_ptr().read_volatile() };
        assert_eq!(all.iter().filter(|ram| ram.lost()).count(), 1);
        assert!(last.lost());
    }

    #[test]
    fn who_asks_after_the_loss_is_told_as_well() {
        let ram = Ram::reserve(PAGE_SIZE).unwrap();
        damage(ram.base().as_ptr().addr(), 1, Cause::Unmapped);
        // SAFETY: as above.
        unsafe { ram.base().as_ptr().read_volatile() };
        let (sender, told) = mpsc::channel();
        ram.on_loss(move |loss| sender.send(loss).unwrap()).unwrap();
        assert_eq!(told.recv_timeout(Duration::from_secs(60)).unwrap().cause, Cause::Unmapped);
    }

    /// A fault at an address that is nobody's still ends the process, by the signal.
    #[test]
    fn other_faults_end_the_process_as_before() {
        if std::env::var_os("FAULT_OUTSIDE").is_some() {
            let _ram = Ram::reserve(PAGE_SIZE).unwrap();
            // SAFETY: none is needed, the process ends here.
            unsafe { (64 as *const u8).read_volatile() };
            unreachable!("the fault was taken for one of guest memory");
        }
        use std::os::unix::process::ExitStatusExt;
        let this = concat!(module_path!(), "::other_faults_end_the_process_as_before");
        let (_, name) = this.split_once("::").unwrap();
        let program = std::env::current_exe().unwrap();
        let status = std::process::Command::new(program)
            .args(["--exact", name])
            .env("FAULT_OUTSIDE", "1")
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(libc::SIGSEGV), "{status}");
    }

    /// Takes pages away as a host may.
    fn damage(address: usize, pages: usize, cause: Cause) {
        let bytes = pages * PAGE_SIZE;
        // SAFETY: the pages are the test's own.
        unsafe {
            if cause == Cause::Unmapped {
                assert_eq!(libc::munmap(address as *mut c_void, bytes), 0);
                return;
            }
            let file = libc::memfd_create(c"cut-off".as_ptr(), libc::MFD_CLOEXEC);
            assert_eq!(libc::ftruncate(file, bytes as i64), 0);
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
            let mapped = libc::mmap(address as *mut c_void, bytes, libc::PROT_READ, flags, file, 0);
            assert_ne!(mapped, libc::MAP_FAILED);
            assert_eq!(libc::ftruncate(file, 0), 0);
            libc::close(file);
        }
    }
}
