//! One VM as clients see it, with or without a machine.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::{Condvar, Mutex};
use tokio::sync::{Notify, OwnedMutexGuard};
use vmm_sys_util::eventfd::EventFd;

use crate::backlog::Backlog;
use crate::conflicts::Uses;
use crate::ends::MachineNumber;
use samepage_api_types::lifecycle::State;
use samepage_api_types::spec::VmSpec;
use samepage_machine::DiskConfig;
use samepage_machine::vm::{Vm, VmEnd, VmState};
use samepage_spec::SharingMode;

/// How long one waits for others' operations on the same VM.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who has ended a machine that was told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A client, without asking the guest.
    Killed,
    /// A client, whose guest was asked and had this many seconds.
    NotInTime(u32),
    /// A client, to boot it anew.
    Reset,
    /// A client, to be rid of the VM.
    Deleted,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Killed => f.write_str("it was killed"),
            Self::NotInTime(seconds) => {
                write!(f, "it did not end within {seconds} s of being asked, and was killed")
            }
            Self::Reset => f.write_str("it was reset"),
            Self::Deleted => f.write_str("it was deleted"),
        }
    }
}

/// A VM's machine.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) vm: Arc<Vm>,
    pub(crate) number: MachineNumber,
}

/// One VM. It is there from before its first machine is built until it is deleted.
#[derive(Debug)]
pub struct Record {
    pub(crate) spec: VmSpec,
    pub(crate) uses: Uses,
    /// The process has an engine that shares memory.
    shares: bool,
    /// What its console said last.
    pub backlog: Arc<Backlog>,
    /// Written when the console takes more of what is typed.
    room: EventFd,
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Held by who looks at the machine for longer than a moment; it is not taken apart meanwhile.
    inspected: Mutex<()>,
    body: Mutex<Body>,
    collected: Condvar,
    /// The same for those who cannot block.
    gone: Notify,
}

#[derive(Debug)]
struct Body {
    machine: Option<Machine>,
    /// Its machine has run.
    started: bool,
    /// Its machine is being made: it takes files and memory.
    booting: bool,
    listed: bool,
    /// Its machine is being taken apart.
    collecting: bool,
    /// Who has told its machine to stop.
    cause: Option<Cause>,
    mode: SharingMode,
    end: Option<VmEnd>,
    since: SystemTime,
}

impl Record {
    /// A VM that is about to be made, in a process that shares memory or not.
    pub(crate) fn new(spec: VmSpec, uses: Uses, shares: bool) -> io::Result<Self> {
        let mode = spec.sharing.mode;
        Ok(Self {
            spec,
            uses,
            shares,
            backlog: Arc::default(),
            room: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            turn: Arc::default(),
            inspected: Mutex::default(),
            body: Mutex::new(Body {
                machine: None,
                started: false,
                booting: true,
                listed: false,
                collecting: false,
                cause: None,
                mode,
                end: None,
                since: SystemTime::now(),
            }),
            collected: Condvar::new(),
            gone: Notify::new(),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// What it is made from.
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// Its disks, with all defaults.
    pub fn disks(&self) -> &[DiskConfig] {
        self.uses.disks()
    }

    /// Its machine, while it has one.
    pub fn vm(&self) -> Option<Arc<Vm>> {
        self.machine().map(|machine| machine.vm)
    }

    pub(crate) fn machine(&self) -> Option<Machine> {
        self.body.lock().machine.clone()
    }

    /// Whether it has a machine of this number.
    pub(crate) fn has_machine(&self, number: MachineNumber) -> bool {
        self.body.lock().machine.as_ref().is_some_and(|machine| machine.number == number)
    }

    /// Looks at its machine, if it has one.
    pub fn inspect<T>(&self, look: impl FnOnce(&Vm) -> T) -> Option<T> {
        let _inspected = self.inspected.lock();
        let vm = self.vm()?;
        Some(look(&vm))
    }

    /// What of its memory is to be shared.
    pub fn mode(&self) -> SharingMode {
        self.body.lock().mode
    }

    /// What of its memory is shared in this process.
    pub fn effective_mode(&self) -> SharingMode {
        if self.shares { self.mode() } else { SharingMode::Off }
    }

    pub(crate) fn set_mode(&self, mode: SharingMode) {
        self.body.lock().mode = mode;
    }

    /// What it does now.
    pub fn state(&self) -> State {
        self.body.lock().state()
    }

    /// Since when it has been in its state; a moment of the past while that changes.
    pub fn since(&self) -> SystemTime {
        self.body.lock().since
    }

    /// Why it has ended, if it has.
    pub fn reason(&self) -> Option<String> {
        let body = self.body.lock();
        Some(match (body.end()?, body.cause) {
            (VmEnd::Stopped, Some(cause)) => cause.to_string(),
            (VmEnd::Stopped, None) => "the process ended it".to_owned(),
            (end, _) => end.to_string(),
        })
    }

    /// Notes who is about to tell its machine to stop. The first one counts.
    pub fn note_cause(&self, cause: Cause) {
        self.body.lock().cause.get_or_insert(cause);
    }

    /// Whether its machine came to this end so that it can be made anew.
    pub(crate) fn is_reset(&self, end: &VmEnd) -> bool {
        matches!(end, VmEnd::Stopped) && self.body.lock().cause == Some(Cause::Reset)
    }

    /// Whether clients see it.
    pub fn is_listed(&self) -> bool {
        self.body.lock().listed
    }

    pub(crate) fn list(&self) {
        self.body.lock().listed = true;
    }

    pub(crate) fn delist(&self) {
        self.body.lock().listed = false;
    }

    /// Whether it has a machine or is about to: then it uses files and memory.
    pub(crate) fn is_taking(&self) -> bool {
        let body = self.body.lock();
        body.machine.is_some() || body.booting
    }

    /// A machine is about to be made anew.
    pub(crate) fn begin_boot(&self) {
        let mut body = self.body.lock();
        body.booting = true;
        body.end = None;
        body.cause = None;
        body.started = false;
    }

    /// The machine could not be made anew.
    pub(crate) fn abandon_boot(&self, error: String) {
        let mut body = self.body.lock();
        body.booting = false;
        body.end = Some(VmEnd::Failed(error));
        body.since = SystemTime::now();
    }

    /// Gives it its machine, which does not run yet.
    pub(crate) fn install(&self, machine: Machine) {
        if let Ok(room) = self.room.try_clone() {
            machine.vm.set_serial_room_event(room);
        }
        let mut body = self.body.lock();
        body.booting = false;
        body.since = SystemTime::now();
        body.machine = Some(machine);
    }

    /// Takes its machine away, which never ran.
    pub(crate) fn uninstall(&self) -> Option<Machine> {
        let machine = self.body.lock().machine.take();
        self.collected.notify_all();
        self.gone.notify_waiters();
        machine
    }

    pub(crate) fn note_change(&self) {
        self.body.lock().since = SystemTime::now();
    }

    pub(crate) fn note_started(&self) {
        let mut body = self.body.lock();
        body.started = true;
        body.since = SystemTime::now();
    }

    /// Its machine has ended, and is taken apart here unless somebody else still holds it. `changed` is called
    /// before those who wait for that go on.
    pub(crate) fn finish(&self, end: &VmEnd, changed: impl FnOnce()) {
        let mut body = self.body.lock();
        body.end = Some(end.clone());
        body.since = SystemTime::now();
        let machine = body.machine.take();
        body.collecting = machine.is_some();
        drop(body);
        // Memory and threads are given back before anybody is told.
        {
            let _not_inspected = self.inspected.lock();
            drop(machine);
        }
        changed();
        self.body.lock().collecting = false;
        self.collected.notify_all();
        self.gone.notify_waiters();
    }

    /// The same as [`Record::wait_collected`], for those who cannot block.
    pub async fn collected(&self) {
        loop {
            let gone = self.gone.notified();
            tokio::pin!(gone);
            // From here on nothing is missed.
            gone.as_mut().enable();
            {
                let body = self.body.lock();
                if body.machine.is_none() && !body.collecting {
                    return;
                }
            }
            gone.await;
        }
    }

    /// Waits until the machine has ended, and is not about to be made anew by whoever ended it.
    pub async fn ended(&self) {
        loop {
            self.collected().await;
            // Whoever ended it for a reset makes the next machine in the same turn.
            drop(self.turn.lock().await);
            if !self.is_taking() {
                return;
            }
        }
    }

    /// Waits until it has no machine.
    pub fn wait_collected(&self) {
        let mut body = self.body.lock();
        self.collected.wait_while(&mut body, |body| body.machine.is_some() || body.collecting);
    }

    /// Written when the console takes more; another handle to the same event.
    ///
    /// # Errors
    /// When the process is out of files.
    pub fn room(&self) -> io::Result<EventFd> {
        self.room.try_clone()
    }

    /// Waits for one's turn to do something to the VM; `None` when that takes too long.
    pub async fn turn(self: &Arc<Self>) -> Option<Turn> {
        let guard = tokio::time::timeout(PATIENCE, self.turn.clone().lock_owned()).await.ok()?;
        Some(Turn { record: self.clone(), _guard: guard })
    }

    /// One's turn, at once; `None` where something is being done to the VM.
    pub fn try_turn(self: &Arc<Self>) -> Option<Turn> {
        let guard = self.turn.clone().try_lock_owned().ok()?;
        Some(Turn { record: self.clone(), _guard: guard })
    }
}

impl Body {
    fn end(&self) -> Option<VmEnd> {
        self.end.clone().or_else(|| self.machine.as_ref()?.vm.end())
    }

    fn state(&self) -> State {
        let Some(Machine { vm, .. }) = &self.machine else {
            return self.end.as_ref().map_or(State::Created, state_after);
        };
        match vm.state() {
            VmState::Running => State::Running,
            VmState::Held if self.started => State::Paused,
            VmState::Held => State::Created,
            // Where its vCPUs still have to be done, how it ends is not told yet.
            VmState::Ended => vm.end().as_ref().map_or(State::Stopped, state_after),
        }
    }
}

/// The right to do something to a VM, which one at a time has.
#[derive(Debug)]
pub struct Turn {
    record: Arc<Record>,
    _guard: OwnedMutexGuard<()>,
}

impl Turn {
    /// The VM.
    pub fn record(&self) -> &Arc<Record> {
        &self.record
    }
}

/// The state of a VM that has come to this end.
fn state_after(end: &VmEnd) -> State {
    match end {
        VmEnd::Reset | VmEnd::PowerOff | VmEnd::Stopped => State::Stopped,
        VmEnd::Crashed(_) => State::Crashed,
        VmEnd::Failed(_) => State::Failed,
    }
}
