//! One VM, with or without a machine.

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
use samepage_machine::vm::{VmEnd, VmState};
use samepage_spec::{SharingMode, VmSpec};
use samepage_worker::machine::Machine;

/// How long an operation waits for other operations on the same VM.
const TURN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a machine was stopped from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A client killed the VM, without asking the guest.
    Killed,
    /// The guest did not end within this many seconds of a client's request.
    NotInTime(u32),
    /// A client reset the VM.
    Reset,
    /// A client deleted the VM.
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
pub(crate) struct Installed {
    pub(crate) vm: Arc<dyn Machine>,
    pub(crate) number: MachineNumber,
}

/// One VM, from before its first machine is built until it is deleted.
#[derive(Debug)]
pub struct Record {
    pub(crate) spec: VmSpec,
    pub(crate) uses: Uses,
    /// Whether the process has an engine that shares memory.
    is_shared: bool,
    /// The end of the console's output.
    pub backlog: Arc<Backlog>,
    /// Written when the console accepts more input.
    room: EventFd,
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Held during lengthy inspections of the machine, which is not freed meanwhile.
    inspected: Mutex<()>,
    body: Mutex<Body>,
    collected: Condvar,
    /// The same for asynchronous waiters.
    gone: Notify,
}

#[derive(Debug)]
struct Body {
    machine: Option<Installed>,
    /// Whether the machine has run.
    has_run: bool,
    /// Whether a machine is being built: the VM uses files and memory.
    is_booting: bool,
    is_listed: bool,
    /// Whether the machine is being freed.
    is_collecting: bool,
    /// Why the machine was stopped from outside.
    cause: Option<Cause>,
    mode: SharingMode,
    end: Option<VmEnd>,
    since: SystemTime,
}

impl Record {
    /// Returns the record of a VM that is about to be built.
    pub(crate) fn new(spec: VmSpec, uses: Uses, is_shared: bool) -> io::Result<Self> {
        let mode = spec.sharing.mode;
        Ok(Self {
            spec,
            uses,
            is_shared,
            backlog: Arc::default(),
            room: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            turn: Arc::default(),
            inspected: Mutex::default(),
            body: Mutex::new(Body {
                machine: None,
                has_run: false,
                is_booting: true,
                is_listed: false,
                is_collecting: false,
                cause: None,
                mode,
                end: None,
                since: SystemTime::now(),
            }),
            collected: Condvar::new(),
            gone: Notify::new(),
        })
    }

    /// Returns the VM's name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Returns the VM's description.
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// Returns the machine, if there is one.
    pub fn vm(&self) -> Option<Arc<dyn Machine>> {
        self.machine().map(|machine| machine.vm)
    }

    pub(crate) fn machine(&self) -> Option<Installed> {
        self.body.lock().machine.clone()
    }

    /// Whether the VM has the machine of this number.
    pub(crate) fn has_machine(&self, number: MachineNumber) -> bool {
        self.body.lock().machine.as_ref().is_some_and(|machine| machine.number == number)
    }

    /// Calls `look` with the machine, if there is one. The machine is not freed meanwhile.
    pub fn inspect<T>(&self, look: impl FnOnce(&dyn Machine) -> T) -> Option<T> {
        let _inspected = self.inspected.lock();
        let vm = self.vm()?;
        Some(look(&*vm))
    }

    /// The same, if no other inspection takes place. Does not wait.
    pub(crate) fn try_inspect<T>(&self, look: impl FnOnce(&dyn Machine) -> T) -> Option<T> {
        let _inspected = self.inspected.try_lock()?;
        let vm = self.vm()?;
        Some(look(&*vm))
    }

    /// Calls `look` with the machine, if there is one, for a moment: neither ends nor inspections go on meanwhile.
    pub(crate) fn glance<T>(&self, look: impl FnOnce(MachineNumber, &dyn Machine) -> T) -> Option<T> {
        let body = self.body.lock();
        let installed = body.machine.as_ref()?;
        Some(look(installed.number, &*installed.vm))
    }

    /// Returns which pages are to be shared.
    pub fn mode(&self) -> SharingMode {
        self.body.lock().mode
    }

    /// Returns which pages are shared in this process.
    pub fn effective_mode(&self) -> SharingMode {
        if self.is_shared { self.mode() } else { SharingMode::Off }
    }

    pub(crate) fn set_mode(&self, mode: SharingMode) {
        self.body.lock().mode = mode;
    }

    /// Returns the VM's state.
    pub fn state(&self) -> State {
        self.body.lock().state()
    }

    /// Returns when the VM came into its state.
    pub fn since(&self) -> SystemTime {
        self.body.lock().since
    }

    /// Returns why the VM has ended, if it has.
    pub fn reason(&self) -> Option<String> {
        let body = self.body.lock();
        Some(match (body.end()?, body.cause) {
            (VmEnd::Stopped, Some(cause)) => cause.to_string(),
            (VmEnd::Stopped, None) => "the process ended it".to_owned(),
            (end, _) => end.to_string(),
        })
    }

    /// Records why the machine is about to be stopped. Only the first call counts.
    pub fn note_cause(&self, cause: Cause) {
        self.body.lock().cause.get_or_insert(cause);
    }

    /// Whether this end of the machine is part of a reset.
    pub(crate) fn is_reset(&self, end: &VmEnd) -> bool {
        matches!(end, VmEnd::Stopped) && self.body.lock().cause == Some(Cause::Reset)
    }

    /// Whether clients see the VM.
    pub fn is_listed(&self) -> bool {
        self.body.lock().is_listed
    }

    pub(crate) fn list(&self) {
        self.body.lock().is_listed = true;
    }

    pub(crate) fn delist(&self) {
        self.body.lock().is_listed = false;
    }

    /// Whether the VM has a machine or is about to have one: then it uses files and memory.
    pub(crate) fn is_taking(&self) -> bool {
        let body = self.body.lock();
        body.machine.is_some() || body.is_booting
    }

    /// Records that a machine is about to be built.
    pub(crate) fn begin_boot(&self) {
        let mut body = self.body.lock();
        body.is_booting = true;
        body.end = None;
        body.cause = None;
        body.has_run = false;
    }

    /// Records that the machine could not be built.
    pub(crate) fn abandon_boot(&self, error: String) {
        let mut body = self.body.lock();
        body.is_booting = false;
        body.end = Some(VmEnd::Failed(error));
        body.since = SystemTime::now();
    }

    /// Installs a machine, which does not run yet.
    pub(crate) fn install(&self, machine: Installed) {
        if let Ok(room) = self.room.try_clone() {
            machine.vm.set_serial_room_event(room);
        }
        let mut body = self.body.lock();
        body.is_booting = false;
        body.since = SystemTime::now();
        body.machine = Some(machine);
    }

    /// Notes what has happened to a machine that another process has managed.
    pub(crate) fn continue_from(&self, has_run: bool, since: SystemTime) {
        let mut body = self.body.lock();
        body.has_run = has_run;
        body.since = since;
    }

    /// Notes how a VM has ended that has no machine any more.
    pub(crate) fn note_end(&self, end: VmEnd, since: SystemTime) {
        let mut body = self.body.lock();
        body.is_booting = false;
        body.end = Some(end);
        body.since = since;
    }

    /// Removes a machine that never ran.
    pub(crate) fn uninstall(&self) -> Option<Installed> {
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
        body.has_run = true;
        body.since = SystemTime::now();
    }

    /// Frees the machine, which has ended, unless another thread still uses it. Calls `changed` before waiters
    /// continue.
    pub(crate) fn finish(&self, end: &VmEnd, changed: impl FnOnce()) {
        let mut body = self.body.lock();
        body.end = Some(end.clone());
        body.since = SystemTime::now();
        let machine = body.machine.take();
        body.is_collecting = machine.is_some();
        drop(body);
        // Memory and threads are freed before any waiter continues.
        {
            let _not_inspected = self.inspected.lock();
            drop(machine);
        }
        changed();
        self.body.lock().is_collecting = false;
        self.collected.notify_all();
        self.gone.notify_waiters();
    }

    /// Waits until the VM has no machine, as [`Record::wait_collected`] does.
    pub async fn collected(&self) {
        loop {
            let gone = self.gone.notified();
            tokio::pin!(gone);
            // From here on nothing is missed.
            gone.as_mut().enable();
            {
                let body = self.body.lock();
                if body.machine.is_none() && !body.is_collecting {
                    return;
                }
            }
            gone.await;
        }
    }

    /// Waits until the machine has ended, and no reset is about to build another one.
    pub async fn ended(&self) {
        loop {
            self.collected().await;
            // A reset ends the old machine and builds the next one in the same turn.
            drop(self.turn.lock().await);
            if !self.is_taking() {
                return;
            }
        }
    }

    /// Waits until the VM has no machine.
    pub fn wait_collected(&self) {
        let mut body = self.body.lock();
        self.collected.wait_while(&mut body, |body| body.machine.is_some() || body.is_collecting);
    }

    /// Returns a handle to the event that is written when the console accepts more input.
    ///
    /// # Errors
    /// Fails if the process is out of files.
    pub fn room(&self) -> io::Result<EventFd> {
        self.room.try_clone()
    }

    /// Waits for a turn to operate on the VM. Returns `None` after 10 seconds.
    pub async fn turn(self: &Arc<Self>) -> Option<Turn> {
        let guard = tokio::time::timeout(TURN_TIMEOUT, self.turn.clone().lock_owned()).await.ok()?;
        Some(Turn { record: self.clone(), _guard: guard })
    }

    /// Returns a turn at once, or `None` if another operation is in progress.
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
        let Some(Installed { vm, .. }) = &self.machine else {
            return self.end.as_ref().map_or(State::Created, state_after);
        };
        match vm.state() {
            VmState::Running => State::Running,
            VmState::Held if self.has_run => State::Paused,
            VmState::Held => State::Created,
            // A machine has no end until its vCPUs have stopped.
            VmState::Ended => vm.end().as_ref().map_or(State::Stopped, state_after),
        }
    }
}

/// The right to operate on a VM. There is one at a time for each VM.
#[derive(Debug)]
pub struct Turn {
    record: Arc<Record>,
    _guard: OwnedMutexGuard<()>,
}

impl Turn {
    /// Returns the VM.
    pub fn record(&self) -> &Arc<Record> {
        &self.record
    }
}

/// Returns the state of a VM whose machine ended in this way.
fn state_after(end: &VmEnd) -> State {
    match end {
        VmEnd::Reset | VmEnd::PowerOff | VmEnd::Stopped => State::Stopped,
        VmEnd::Crashed(_) => State::Crashed,
        VmEnd::Failed(_) => State::Failed,
    }
}
