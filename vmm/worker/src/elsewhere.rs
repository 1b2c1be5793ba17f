//! A machine in a worker process.

use std::fmt;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use samepage_hole::{FrameRange, Hole};
use samepage_machine::vm::{HoleMemory, VmEnd, VmState};
use samepage_sharing::claims::ClaimSource;
use samepage_sharing::pagemap::Pagemap;
use samepage_sharing::service::{Bell, Discarded, Membership, PagesClient};
use samepage_spec::SharingMode;
use vmm_sys_util::eventfd::EventFd;

use crate::disks::DiskServers;
use crate::machine::{BalloonObserver, Brake, DeviceChange, DeviceError, DiskErrorObserver, Look, Machine};
use crate::messages::{Answer, Order, VmNumber};
use crate::process::{Gone, WorkerProcess};

/// How long figures are waited for. Lists show those of before for a worker that does not answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why memory of a VM that was adopted is not shared.
const UNSHARED: &str =
    "the VM was adopted from a process that ended; it shares no more memory until its next start";

/// How long the governor of memory waits for a figure. It guesses without.
const BRIEFLY: Duration = Duration::from_millis(20);

/// Holds the vCPUs of a machine in a worker process.
struct RemoteBrake {
    worker: Arc<WorkerProcess>,
    number: VmNumber,
    threads: OnceLock<Vec<u32>>,
}

impl Brake for RemoteBrake {
    fn withhold(&self) {
        self.worker.tell(self.number, Order::Withhold(true));
    }

    fn release(&self) {
        self.worker.tell(self.number, Order::Withhold(false));
    }

    fn threads(&self) -> Vec<u32> {
        if let Some(threads) = self.threads.get() {
            return threads.clone();
        }
        match self.worker.ask_within(self.number, Order::NameThreads, BRIEFLY) {
            Some(Answer::Threads(threads)) => self.threads.get_or_init(|| threads).clone(),
            _ => Vec::new(),
        }
    }
}

/// What a worker tells of one VM.
pub(crate) struct Remote {
    state: Mutex<State>,
    changed: Condvar,
    end_event: EventFd,
    console: Mutex<Box<dyn Write + Send>>,
    room: Mutex<Option<EventFd>>,
    observer: Mutex<Option<DiskErrorObserver>>,
    /// Tells the engine that the guest has published what its pages are for.
    bell: Mutex<Option<Bell>>,
    /// Frees pages that the guest gives back. `None` for a VM that is no member: the engine knows nothing of its memory.
    pages: Mutex<Option<PagesClient>>,
    balloon: Mutex<Option<BalloonObserver>>,
}

struct State {
    runs: bool,
    end: Option<VmEnd>,
}

impl Remote {
    /// A VM that does not run yet. `console` gets its output, and never waits.
    pub(crate) fn new(console: Box<dyn Write + Send>) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State { runs: false, end: None }),
            changed: Condvar::new(),
            end_event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            console: Mutex::new(console),
            room: Mutex::default(),
            observer: Mutex::default(),
            bell: Mutex::default(),
            pages: Mutex::default(),
            balloon: Mutex::default(),
        })
    }

    /// The first end counts.
    pub(crate) fn tell_end(&self, end: VmEnd) {
        let mut state = self.state.lock();
        if state.end.is_none() {
            state.end = Some(end);
            self.changed.notify_all();
            // A full counter is readable as well.
            let _ = self.end_event.write(1);
        }
    }

    pub(crate) fn tell_room(&self) {
        if let Some(room) = &*self.room.lock() {
            let _ = room.write(1);
        }
    }

    pub(crate) fn copy_console(&self, bytes: &[u8]) {
        // The writer keeps what it can.
        let _ = self.console.lock().write_all(bytes);
    }

    pub(crate) fn tell_disk_error(&self, disk: &str, message: &str) {
        let observer = self.observer.lock().clone();
        if let Some(observer) = observer {
            observer(disk, message);
        }
    }

    pub(crate) fn set_bell(&self, bell: Bell) {
        *self.bell.lock() = Some(bell);
    }

    pub(crate) fn ring(&self) {
        if let Some(bell) = &*self.bell.lock() {
            bell.ring();
        }
    }

    /// Has this engine free pages from now on, or none. What it was told before is done then.
    pub(crate) fn set_pages(&self, pages: Option<PagesClient>) {
        *self.pages.lock() = pages;
    }

    /// Frees the first of these pages.
    pub(crate) fn discard(&self, pages: Range<u32>) -> Discarded {
        match &*self.pages.lock() {
            Some(client) => client.free(pages),
            None => Discarded { next: pages.end, freed: 0 },
        }
    }

    pub(crate) fn tell_balloon(&self, frames: u32) {
        let observer = self.balloon.lock().clone();
        if let Some(observer) = observer {
            observer(frames);
        }
    }

    /// Passes output on to this writer from now on. It never waits.
    pub(crate) fn set_console(&self, console: Box<dyn Write + Send>) {
        *self.console.lock() = console;
    }

    pub(crate) fn set_runs(&self, runs: bool) {
        self.state.lock().runs = runs;
    }

    fn wait(&self) -> VmEnd {
        let mut state = self.state.lock();
        loop {
            if let Some(end) = &state.end {
                return end.clone();
            }
            self.changed.wait(&mut state);
        }
    }
}

/// The memory hole of a guest in a worker process.
#[derive(Debug)]
pub(crate) struct RemoteHole {
    pub(crate) memory: HoleMemory,
    pub(crate) worker: Arc<WorkerProcess>,
    pub(crate) number: VmNumber,
    /// The guest reads the header through a port.
    pub(crate) is_port: bool,
}

impl ClaimSource for RemoteHole {
    fn hole(&self) -> Hole<'_> {
        self.memory.hole()
    }

    fn ranges(&self) -> &[FrameRange] {
        self.memory.ranges()
    }

    fn request(&self, number: u32) {
        self.memory.request(number);
        if self.is_port {
            self.worker.tell(self.number, Order::HoleNews);
        }
    }
}

/// What the machine is.
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) number: VmNumber,
    pub(crate) vcpus: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) notices: Vec<String>,
    /// Another managing process has built it.
    pub(crate) is_adopted: bool,
}

/// A machine in a worker process. Dropping it ends it, takes its memory from the engine, and has the worker free it.
pub(crate) struct MachineElsewhere {
    pub(crate) identity: Identity,
    pub(crate) remote: Arc<Remote>,
    /// What serves its disks. Ends before the membership.
    pub(crate) disks: DiskServers,
    pub(crate) membership: Option<Membership>,
    pub(crate) worker: Arc<WorkerProcess>,
    /// What was seen last, for a worker that is gone.
    pub(crate) last: Mutex<Look>,
    /// Gives the worker's place back.
    pub(crate) on_drop: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for MachineElsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineElsewhere")
            .field("name", &self.identity.name)
            .field("worker", &self.worker.id())
            .finish_non_exhaustive()
    }
}

impl MachineElsewhere {
    fn ask(&self, order: Order) -> Result<Answer, Gone> {
        self.worker.ask(self.identity.number, order)
    }

    fn is_true(&self, order: Order) -> bool {
        matches!(self.ask(order), Ok(Answer::Truth(true)))
    }
}

impl Machine for MachineElsewhere {
    fn name(&self) -> &str {
        &self.identity.name
    }

    fn worker(&self) -> Option<u32> {
        Some(self.worker.id())
    }

    fn vcpus(&self) -> u32 {
        self.identity.vcpus
    }

    fn memory_bytes(&self) -> u64 {
        self.identity.memory_bytes
    }

    fn start(&self) {
        self.remote.set_runs(true);
        // A worker that is gone has told the end.
        let _ = self.ask(Order::Start);
    }

    fn pause(&self) {
        if matches!(self.ask(Order::Pause), Ok(Answer::Done)) {
            self.remote.set_runs(false);
        } else {
            self.remote.wait();
        }
    }

    fn request_stop(&self) {
        self.worker.tell(self.identity.number, Order::Stop);
    }

    fn wait(&self) -> VmEnd {
        self.remote.wait()
    }

    fn end(&self) -> Option<VmEnd> {
        self.remote.state.lock().end.clone()
    }

    fn end_event(&self) -> RawFd {
        self.remote.end_event.as_raw_fd()
    }

    fn state(&self) -> VmState {
        let state = self.remote.state.lock();
        match (&state.end, state.runs) {
            (Some(_), _) => VmState::Ended,
            (None, true) => VmState::Running,
            (None, false) => VmState::Held,
        }
    }

    fn membership(&self) -> Option<&Membership> {
        self.membership.as_ref()
    }

    fn unshared(&self) -> Option<&'static str> {
        self.identity.is_adopted.then_some(UNSHARED)
    }

    fn note_mode(&self, mode: SharingMode) {
        self.worker.tell(self.identity.number, Order::NoteMode(mode));
    }

    fn brake(&self) -> Arc<dyn Brake> {
        let (worker, number) = (Arc::clone(&self.worker), self.identity.number);
        Arc::new(RemoteBrake { worker, number, threads: OnceLock::new() })
    }

    fn private_bytes(&self, _: &Pagemap) -> io::Result<u64> {
        match self.worker.ask_within(self.identity.number, Order::CountPrivate, BRIEFLY) {
            Some(Answer::Bytes(bytes)) => Ok(bytes),
            Some(Answer::Failed(reason)) => Err(io::Error::other(reason)),
            Some(_) => Err(io::ErrorKind::InvalidData.into()),
            None => Err(io::Error::new(io::ErrorKind::TimedOut, "its worker process does not answer")),
        }
    }

    fn touched(&self, _: &Pagemap) -> io::Result<Vec<Range<u32>>> {
        match self.worker.ask_within(self.identity.number, Order::Touched, PATIENCE) {
            Some(Answer::Runs(runs)) => Ok(runs.into_iter().map(|(first, end)| first..end).collect()),
            Some(Answer::Failed(reason)) => Err(io::Error::other(reason)),
            Some(_) => Err(io::ErrorKind::InvalidData.into()),
            // Its memory is gone with it.
            None if self.worker.is_gone() => Ok(Vec::new()),
            None => Err(io::Error::new(io::ErrorKind::TimedOut, "its worker process does not answer")),
        }
    }

    fn reopen_console(&self) -> Result<(), String> {
        match self.ask(Order::ReopenConsole) {
            Ok(Answer::Failed(reason)) => Err(reason),
            Ok(_) | Err(Gone) => Ok(()),
        }
    }

    fn serial_input(&self, data: &[u8]) -> usize {
        match self.ask(Order::Type(data.to_vec())) {
            Ok(Answer::Taken(count)) => count.min(data.len()),
            _ => 0,
        }
    }

    fn set_serial_room_event(&self, event: EventFd) {
        *self.remote.room.lock() = Some(event);
    }

    fn press_ctrl_alt_del(&self) -> bool {
        self.is_true(Order::PressCtrlAltDel)
    }

    fn ask_to_end(&self) -> bool {
        self.is_true(Order::AskToEnd)
    }

    fn ask_again(&self, time_is_short: bool) {
        let _ = self.ask(Order::AskAgain { time_is_short });
    }

    fn notices(&self) -> Vec<String> {
        self.identity.notices.clone()
    }

    fn look(&self) -> Look {
        let looked = self.worker.ask_within(self.identity.number, Order::Look, PATIENCE);
        if let Some(Answer::Looked { cpu_nanoseconds, devices }) = looked {
            *self.last.lock() = Look { cpu_time: Duration::from_nanos(cpu_nanoseconds), devices: *devices };
        }
        self.last.lock().clone()
    }

    fn change_device(&self, id: &str, change: DeviceChange) -> Result<(), DeviceError> {
        match self.ask(Order::Change { id: id.to_owned(), change }) {
            Ok(Answer::Done) => Ok(()),
            Ok(Answer::Failed(reason)) => Err(DeviceError::Refused(reason)),
            Ok(_) | Err(Gone) => Err(DeviceError::Missing),
        }
    }

    fn observe_disk_errors(&self, observer: DiskErrorObserver) {
        *self.remote.observer.lock() = Some(observer);
    }

    fn observe_balloon(&self, observer: BalloonObserver) {
        *self.remote.balloon.lock() = Some(observer);
    }
}

impl Drop for MachineElsewhere {
    fn drop(&mut self) {
        if self.worker.is_let_go() {
            return;
        }
        if self.end().is_none() {
            self.request_stop();
            self.wait();
        }
        self.disks.end();
        self.remote.set_pages(None);
        // The engine empties the memory while the worker still has it.
        drop(self.membership.take());
        let _ = self.ask(Order::Free);
        self.worker.forget(self.identity.number);
        (self.on_drop)();
    }
}
