//! The engine at work: one thread that takes step after step under a ceiling of CPU time, rests
//! between passes, and sleeps while there is nothing to share.

#![expect(unsafe_code, reason = "reads the CPU clock of a thread, the size of memory")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::audit::AuditReport;
use crate::calls::{Linux, MemoryCalls};
use crate::changes::ChangeLog;
use crate::engine::{Engine, Settings, Step};
use crate::ram::{PAGE_SIZE, Ram};
use crate::space::LostHandler;
use crate::statistics::{EngineStatistics, VmStatistics};
use crate::store::FrameStore;
use crate::uffd::UffdError;

/// Stack of the sharing thread, in bytes: no deep calls, no large locals.
const STACK_BYTES: usize = 256 << 10;

/// The sharing thread rests for no less than this between pieces of work.
const SHORTEST_REST: Duration = Duration::from_millis(4);

/// Why memory cannot be shared on this host. VMs run all the same.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Pages cannot be write-protected.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The memory file of the frames was refused.
    #[error("creating the frame store, a memory file: {0}")]
    Store(#[source] io::Error),
    /// Something else that the engine needs was refused.
    #[error("starting the sharing engine: {0}")]
    Engine(#[source] io::Error),
}

/// The sharing engine of a process, running.
#[derive(Debug)]
pub struct Sharing {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    engine: Mutex<Engine>,
    control: Mutex<Control>,
    changed: Condvar,
    cpu_nanoseconds: AtomicU64,
    settings: Settings,
}

#[derive(Debug, Default)]
struct Control {
    stop: bool,
    /// VMs came or went: there is something to look at.
    fresh: bool,
    /// Nothing is to be looked for.
    paused: bool,
    /// Slots whose RAM the kernel would not let go yet.
    leaving: Vec<usize>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("control", &self.control).finish_non_exhaustive()
    }
}

impl Sharing {
    /// Starts the engine with the running kernel's calls.
    ///
    /// # Errors
    /// Where this host cannot share memory; the error says how to enable it.
    pub fn start(settings: Settings) -> Result<Self, StartError> {
        let frames = settings.frames.unwrap_or_else(default_frames);
        let store = FrameStore::create(frames).map_err(StartError::Store)?;
        let calls = Linux::open(Arc::clone(store.file()))?;
        Self::start_with(settings, store, Box::new(calls))
    }

    /// Starts the engine with calls of the caller's, for a store of the caller's.
    ///
    /// # Errors
    /// As [`Sharing::start`].
    pub fn start_with(
        settings: Settings,
        store: FrameStore,
        calls: Box<dyn MemoryCalls>,
    ) -> Result<Self, StartError> {
        let engine = Engine::new(&settings, store, calls).map_err(StartError::Engine)?;
        let shared = Arc::new(Shared {
            engine: Mutex::new(engine),
            control: Mutex::default(),
            changed: Condvar::new(),
            cpu_nanoseconds: AtomicU64::new(0),
            settings,
        });
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("sharing-0".into())
            .stack_size(STACK_BYTES)
            .spawn(move || worker.work())
            .map_err(StartError::Engine)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Takes a VM's RAM in: it is shared until the membership ends. With a change log, effort follows
    /// the VM's changes; without one, all of its memory is gone over again and again. `on_lost` is called, from the
    /// sharing thread, when a part of it could not be kept: the VM must be stopped then.
    ///
    /// The RAM must be small pages ([`Ram::use_small_pages`]), and nothing may pin it for writing.
    ///
    /// # Errors
    /// Where the RAM cannot be registered; it is not shared then and otherwise as before.
    pub fn add(
        &self,
        ram: Arc<Ram>,
        log: Option<Box<dyn ChangeLog>>,
        on_lost: LostHandler,
    ) -> io::Result<Membership> {
        let slot = self.shared.engine.lock().add(ram, log, on_lost)?;
        self.shared.refresh();
        Ok(Membership { shared: Arc::clone(&self.shared), slot })
    }

    /// Looks for nothing any more. What is shared stays so, and VMs come and go as before. A step
    /// that is under way ends first.
    pub fn pause(&self) {
        self.shared.control.lock().paused = true;
        drop(self.shared.engine.lock());
    }

    /// Goes on after a [`pause`](Self::pause).
    pub fn resume(&self) {
        self.shared.control.lock().paused = false;
        self.shared.refresh();
    }

    /// The engine's statistics.
    #[must_use]
    pub fn statistics(&self) -> EngineStatistics {
        let mut statistics = self.shared.engine.lock().statistics();
        statistics.cpu_seconds = self.shared.cpu_nanoseconds.load(Ordering::Relaxed) as f64 / 1e9;
        statistics
    }

    /// Recounts everything and compares it with the books. Takes about a second for each 4 GiB of
    /// guest memory, in which nothing is merged; guests run on.
    ///
    /// # Errors
    /// Where the page maps cannot be read.
    pub fn audit(&self) -> io::Result<AuditReport> {
        self.shared.engine.lock().audit()
    }
}

impl Drop for Sharing {
    fn drop(&mut self) {
        self.shared.control.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the worker has been reported by its own thread.
            let _ = thread.join();
        }
    }
}

/// A VM's part in sharing. Dropping it, once the VM no longer runs, gives its frames up; its RAM
/// is empty then.
#[derive(Debug)]
pub struct Membership {
    shared: Arc<Shared>,
    slot: usize,
}

impl Membership {
    /// The VM's statistics.
    ///
    /// # Errors
    /// Where the page map cannot be read.
    pub fn statistics(&self) -> io::Result<VmStatistics> {
        Ok(self.shared.engine.lock().vm_statistics(self.slot)?.unwrap_or_default())
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        if self.shared.engine.lock().remove(self.slot).is_err() {
            // The kernel lacks the memory to let memory go; the worker tries again.
            self.shared.control.lock().leaving.push(self.slot);
        }
        self.shared.refresh();
    }
}

impl Shared {
    fn refresh(&self) {
        self.control.lock().fresh = true;
        self.changed.notify_all();
    }

    fn work(&self) {
        let share = (self.settings.cpu_percent / 100.0).max(0.001);
        let mut rested = Instant::now();
        loop {
            let started = Instant::now();
            let before = thread_cpu();
            let mut engine = self.engine.lock();
            self.retry_leaving(&mut engine);
            let idle = engine.members.count() == 0 || self.control.lock().paused;
            let step = if idle { None } else { Some(engine.step(started)) };
            // Whoever waits comes first.
            MutexGuard::unlock_fair(engine);
            let cpu = thread_cpu();
            self.cpu_nanoseconds.store(cpu.as_nanos() as u64, Ordering::Relaxed);

            // Every piece of work moves the moment at which the ceiling is kept. Rests of less than a
            // few milliseconds are put together: a wake-up costs as much as a small piece of work.
            rested = rested.max(started) + (cpu - before).div_f64(share);
            let now = Instant::now();
            let rest_until = match step {
                Some(Step::RestUntil(moment)) => moment.max(rested),
                _ if rested > now + SHORTEST_REST => rested,
                _ => now,
            };
            let mut control = self.control.lock();
            while !control.stop && !std::mem::take(&mut control.fresh) {
                if !idle && rest_until <= now {
                    break;
                }
                if idle && control.leaving.is_empty() {
                    self.changed.wait(&mut control);
                } else if self.changed.wait_until(&mut control, rest_until).timed_out() {
                    break;
                }
            }
            if control.stop {
                return;
            }
        }
    }

    fn retry_leaving(&self, engine: &mut Engine) {
        let leaving = std::mem::take(&mut self.control.lock().leaving);
        for slot in leaving {
            if engine.remove(slot).is_err() {
                self.control.lock().leaving.push(slot);
            }
        }
    }
}

/// CPU time that this thread has used.
fn thread_cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec that is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Frames for twice the host's memory: more could not be held, and the reservation is free.
fn default_frames() -> u32 {
    // SAFETY: asks for a number.
    let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
    // SAFETY: as above.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let bytes = u64::try_from(pages).unwrap_or(1 << 20) * u64::try_from(page_bytes).unwrap_or(4096);
    u32::try_from(2 * bytes / PAGE_SIZE as u64).unwrap_or(u32::MAX - 1).min(1 << 30)
}
