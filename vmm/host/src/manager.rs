//! The VMs of a process as clients see them: made, asked for actions, and listed also when they have
//! ended.
//!
//! Each VM has a [`Record`] that outlives its machine. What takes time (building, waiting for vCPUs,
//! giving memory back) is done by the caller's thread, one operation at a time for each VM; whoever asks
//! for another meanwhile waits for its [`Turn`].
//!
//! Machines that have ended are collected by one thread of the process, with [`Manager::collect`];
//! operations that end a machine wait for that.

use crate::translate::{ToConfig, Translate};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::events::EventLog;
use crate::fleet::{self, Ended, Fleet, FleetError, Uses};
use crate::host_limits::{HostMemory, Overcommitted};
use crate::record::{Cause, Record, Turn};
use crate::statistics;
use crate::trouble::{Teller, Troubles};
use samepage_api_types::events::Happening;
use samepage_api_types::lifecycle::{Action, State};
use samepage_api_types::spec::{SharingMode, VmSpec};
use samepage_machine::config::{ConfigError, ConsoleConfig, VmConfig};
use samepage_machine::huge_pages::HugePages;
use samepage_machine::hypervisor::Hypervisor;
use samepage_machine::vm::{Vm, VmEnd, VmState};

/// Why something cannot be done.
#[derive(Debug, Error)]
pub enum ManagerError {
    /// There is no such VM.
    #[error("there is no VM named {0}")]
    NoSuchVm(String),
    /// The VM's state forbids it.
    #[error("VM {vm} is {}, and what is {} cannot be asked to {}", .state.name(), .state.name(), .action.name())]
    Illegal {
        /// Its name.
        vm: String,
        /// Its state.
        state: State,
        /// What was asked for.
        action: Action,
    },
    /// It ended while it was asked for something.
    #[error("VM {vm} ended before it could {}: {end}", .action.name())]
    EndedMeanwhile {
        /// Its name.
        vm: String,
        /// What was asked for.
        action: Action,
        /// How it ended.
        end: VmEnd,
    },
    /// What the VM is to be, or what it uses.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// A value in the description of a VM.
    #[error("VM {vm}: {reason}")]
    Spec {
        /// Its name.
        vm: String,
        /// Where in the description, as a JSON pointer.
        place: String,
        /// What it has to be.
        reason: String,
    },
    /// The host has too little memory.
    #[error(transparent)]
    Overcommitted(#[from] Overcommitted),
    /// The VM's memory is its own.
    #[error("the memory of VM {0} is not shared: {1}")]
    NotSharing(String, &'static str),
    /// The VM's guest cannot be asked to end.
    #[error("the guest of VM {0} takes nothing from its keyboard")]
    NotListening(String),
    /// No more VMs are made.
    #[error("the process is ending")]
    Closing,
}

/// What all VMs of the process have in common.
#[derive(Debug)]
pub struct Common {
    /// The engine that shares their memory, where this host can.
    pub sharing: Option<Arc<Sharing>>,
    /// The settings that it was started with.
    pub settings: Settings,
    /// How far the VMs' memory together may exceed what the host has available.
    pub overcommit: f64,
}

/// The VMs of a process.
#[derive(Debug)]
pub struct Manager {
    fleet: Fleet,
    common: Common,
    /// What happens to its VMs.
    pub events: Arc<EventLog>,
    troubles: Arc<Troubles>,
    /// What changed about VMs without an event.
    changes: AtomicU64,
    records: Mutex<BTreeMap<String, Arc<Record>>>,
    /// Held while it is checked that one more VM can be.
    reserving: Mutex<()>,
    /// Machines being made or made anew, and VMs being deleted.
    operations: AtomicUsize,
    /// Readable when an operation has ended.
    settled: EventFd,
    closing: AtomicBool,
}

impl Manager {
    /// A manager without VMs.
    ///
    /// # Errors
    /// When the process is out of files.
    pub fn new(hypervisor: Hypervisor, common: Common) -> io::Result<Self> {
        let events = Arc::<EventLog>::default();
        Ok(Self {
            fleet: Fleet::new(hypervisor)?,
            common,
            troubles: Arc::new(Troubles::new(Arc::clone(&events))),
            events,
            changes: AtomicU64::new(0),
            records: Mutex::default(),
            reserving: Mutex::default(),
            operations: AtomicUsize::new(0),
            settled: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            closing: AtomicBool::new(false),
        })
    }

    /// The machines that there are.
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// The engine that shares memory.
    pub fn sharing(&self) -> Option<&Arc<Sharing>> {
        self.common.sharing.as_ref()
    }

    /// The settings that the engine was started with.
    pub fn settings(&self) -> &Settings {
        &self.common.settings
    }

    /// Makes VMs. All or none: if one cannot be, nothing of the others is left. They do not run yet.
    ///
    /// `consoles` says for each where its console goes besides the backlog, if not where its description
    /// says.
    ///
    /// # Errors
    /// What is wrong, with which of them.
    pub fn create(
        &self,
        specs: Vec<VmSpec>,
        consoles: Vec<Option<ConsoleConfig>>,
    ) -> Result<Vec<Arc<Record>>, ManagerError> {
        let _operation = self.operation();
        let mut configs = Vec::with_capacity(specs.len());
        let mut records = Vec::with_capacity(specs.len());
        for (spec, console) in
            specs.into_iter().zip(consoles.into_iter().chain(std::iter::repeat_with(|| None)))
        {
            spec.check().map_err(|(place, reason)| {
                let vm = spec.name.clone();
                ManagerError::Spec { vm, place, reason }
            })?;
            let mut config = spec.to_config();
            config.check().map_err(|source| FleetError::Config { vm: spec.name.clone(), source })?;
            config.console = console.unwrap_or(config.console);
            let shares = self.common.sharing.is_some();
            let record = Record::new(spec, Uses::of(&config), shares).map_err(FleetError::Watch)?;
            let record = Arc::new(record);
            configs.push(self.complete(config, &record));
            records.push(record);
        }
        self.reserve(&records)?;
        let added = self.fleet.add(configs);
        let vms = match added {
            Ok(vms) => vms,
            Err(error) => {
                let mut known = self.records.lock();
                records.iter().for_each(|record| drop(known.remove(record.name())));
                return Err(error.into());
            }
        };
        for (record, vm) in records.iter().zip(vms) {
            self.troubles.watch(&vm);
            record.install(vm, true);
            self.tell_state(record);
        }
        // A shutdown that came meanwhile did not see all of them.
        if self.is_closing() {
            records.iter().filter_map(|record| record.vm()).for_each(|vm| vm.handle().request_stop());
        }
        Ok(records)
    }

    /// Adds to a configuration what a VM of this process has besides.
    fn complete(&self, mut config: VmConfig, record: &Record) -> VmConfig {
        config.sharing = self.common.sharing.clone();
        if config.hugepages == HugePages::Thp && samepage_machine::huge_pages::unavailable().is_some() {
            config.hugepages = HugePages::Off;
        }
        let to = Box::new(config.console);
        config.console = ConsoleConfig::Copied { to, copy: record.backlog.sink() };
        config
    }

    /// Takes names, files and memory for VMs that are about to be made.
    fn reserve(&self, new: &[Arc<Record>]) -> Result<(), ManagerError> {
        let _one_after_another = self.reserving.lock();
        if self.is_closing() {
            return Err(ManagerError::Closing);
        }
        for record in new {
            if self.records.lock().contains_key(record.name()) {
                let (vm, name) = (record.name().to_owned(), record.name().to_owned());
                return Err(FleetError::Config { vm, source: ConfigError::DuplicateName(name) }.into());
            }
        }
        self.check_together(new)?;
        self.records.lock().extend(new.iter().map(|record| (record.name().to_owned(), record.clone())));
        Ok(())
    }

    /// Checks VMs that are to be made against the machines that there are: files, and memory.
    fn check_together(&self, new: &[Arc<Record>]) -> Result<(), ManagerError> {
        let is_new = |record: &Arc<Record>| new.iter().any(|new| Arc::ptr_eq(new, record));
        let mut all: Vec<_> = self.records.lock().values().cloned().collect();
        all.retain(|record| record.is_taking() && !is_new(record));
        all.extend_from_slice(new);
        fleet::check_together(&all.iter().map(|record| record.uses.clone()).collect::<Vec<_>>())?;
        if let Some(mut memory) = HostMemory::measure() {
            // What VMs that are there have taken already is part of what they were promised.
            let taken = statistics::rss_anon().unwrap_or(0);
            memory.available = memory.available.saturating_add(taken);
            let requested = all.iter().map(|record| record.spec.memory.0);
            if let Err(error) = memory.check(requested.fold(0, u64::saturating_add), self.common.overcommit) {
                self.events.tell(Happening::Limit { message: error.to_string() });
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// The VM of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(&self, name: &str) -> Result<Arc<Record>, ManagerError> {
        let record = self.records.lock().get(name).filter(|record| record.is_listed()).cloned();
        record.ok_or_else(|| ManagerError::NoSuchVm(name.to_owned()))
    }

    /// All VMs, by name.
    pub fn list(&self) -> Vec<Arc<Record>> {
        self.records.lock().values().filter(|record| record.is_listed()).cloned().collect()
    }

    /// Does what a VM is asked to do, and returns its state afterwards. Who asks for a stop waits himself
    /// for the guest, and has it killed after that.
    ///
    /// # Errors
    /// Where its state forbids that, or where a machine cannot be made anew. Then the VM has ended.
    pub fn act(&self, turn: &Turn, action: Action) -> Result<State, ManagerError> {
        let record = turn.record();
        let state = self.check(record, action)?;
        match action {
            Action::Start if state == State::Created => self.run(record, action)?,
            Action::Start => {
                record.wait_collected();
                self.boot(record, action)?;
            }
            Action::Resume => self.run(record, action)?,
            Action::Pause => {
                let vm = self.machine(record, action)?;
                vm.pause();
                if vm.state() == VmState::Ended {
                    let name = record.name().to_owned();
                    return Err(ManagerError::EndedMeanwhile { vm: name, action, end: vm.wait() });
                }
                record.note_change();
                self.tell_state(record);
            }
            Action::Reset => {
                let _operation = self.operation();
                self.end(record, Cause::Reset);
                self.boot(record, action)?;
            }
            Action::Shutdown => {
                if !self.machine(record, action)?.press_ctrl_alt_del() {
                    return Err(ManagerError::NotListening(record.name().to_owned()));
                }
            }
            Action::Stop => {
                if state == State::Paused {
                    self.run(record, action)?;
                }
                // Who does not listen is given the time as well: it may end for other reasons.
                self.machine(record, action)?.press_ctrl_alt_del();
            }
            Action::Kill => self.end(record, Cause::Killed),
        }
        Ok(record.state())
    }

    /// Checks that a VM's state, which is returned, allows an action.
    ///
    /// # Errors
    /// Where it does not.
    pub fn check(&self, record: &Record, action: Action) -> Result<State, ManagerError> {
        let state = record.state();
        match state.after(action) {
            Some(_) => Ok(state),
            None => Err(ManagerError::Illegal { vm: record.name().to_owned(), state, action }),
        }
    }

    fn machine(&self, record: &Record, action: Action) -> Result<Arc<Vm>, ManagerError> {
        let illegal =
            || ManagerError::Illegal { vm: record.name().to_owned(), state: record.state(), action };
        record.vm().ok_or_else(illegal)
    }

    fn run(&self, record: &Record, action: Action) -> Result<(), ManagerError> {
        let vm = self.machine(record, action)?;
        record.note_started();
        vm.start();
        let reason = (action == Action::Reset).then(|| Cause::Reset.to_string());
        self.tell_state_because(record, reason.or_else(|| record.reason()));
        Ok(())
    }

    /// Makes a machine anew, and lets it run.
    fn boot(&self, record: &Arc<Record>, action: Action) -> Result<(), ManagerError> {
        let _operation = self.operation();
        {
            let _one_after_another = self.reserving.lock();
            if self.is_closing() {
                return Err(ManagerError::Closing);
            }
            self.check_together(std::slice::from_ref(record))?;
            record.begin_boot();
        }
        let mut config = record.spec.to_config();
        config.participation.mode = record.mode().translate();
        let added = self.fleet.add(vec![self.complete(config, record)]);
        let vm = match added.map(|mut vms| vms.pop()) {
            Ok(Some(vm)) => vm,
            Ok(None) => return Err(ManagerError::NoSuchVm(record.name().to_owned())),
            Err(error) => {
                record.abandon_boot(&error);
                self.tell_state(record);
                return Err(error.into());
            }
        };
        self.troubles.watch(&vm);
        record.install(vm.clone(), false);
        if self.is_closing() {
            vm.handle().request_stop();
        }
        drop(vm);
        self.run(record, action)
    }

    /// Ends a VM's machine, if it has one, and waits until nothing is left of it.
    pub fn end(&self, record: &Record, cause: Cause) {
        if let Some(vm) = record.vm() {
            record.note_cause(cause);
            vm.handle().request_stop();
            vm.wait();
        }
        record.wait_collected();
    }

    /// Lets a VM go, with all that it holds.
    pub fn delete(&self, turn: &Turn) {
        // What watches the process hears of the end of this, and of memory that it leaves behind.
        let _operation = self.operation();
        let record = turn.record();
        self.end(record, Cause::Deleted);
        let removed = {
            let mut known = self.records.lock();
            let same = known.get(record.name()).is_some_and(|present| Arc::ptr_eq(present, record));
            if same { known.remove(record.name()) } else { None }
        };
        if removed.is_some() {
            record.delist();
            record.backlog.close();
            self.events.tell(Happening::Deleted { vm: record.name().to_owned() });
        }
    }

    /// Changes what of a VM's memory is shared, now and in machines to come.
    ///
    /// # Errors
    /// Where no memory is shared in this process.
    pub fn set_mode(&self, turn: &Turn, mode: SharingMode) -> Result<(), ManagerError> {
        let record = turn.record();
        if self.common.sharing.is_none() {
            return Err(ManagerError::NotSharing(record.name().to_owned(), "this process shares none"));
        }
        record.set_mode(mode);
        self.note_change();
        if let Some(vm) = record.vm()
            && let Some(membership) = vm.membership()
        {
            membership.set_mode(mode.translate());
        }
        Ok(())
    }

    /// Takes apart the machines that have ended. Called by one thread, when [`Fleet`]'s file is readable.
    ///
    /// # Errors
    /// Where the fleet cannot be watched.
    pub fn collect(&self) -> io::Result<Vec<Ended>> {
        let mut ended = self.fleet.take_ended()?;
        for vm in &mut ended {
            let record = self.records.lock().get(&vm.name).cloned();
            if let Some(record) = record {
                vm.reset = record.is_reset(&vm.end);
                record.finish(&vm.end, || self.note_change());
                if let VmEnd::Crashed(report) = &vm.end {
                    let report = report.to_string();
                    self.events.tell(Happening::Crash { vm: vm.name.clone(), report });
                }
                // What follows a reset is told once it is there.
                if !vm.reset {
                    self.tell_state(&record);
                }
            }
        }
        Ok(ended)
    }

    /// A number that is another one once a VM was made or deleted, came into another state or shares
    /// otherwise, before whoever asked for that is answered.
    pub fn revision(&self) -> u64 {
        self.events.last() + self.changes.load(Ordering::SeqCst)
    }

    fn note_change(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Has `teller` told what goes wrong with disks, besides those who watch events. Asked for once.
    pub fn on_trouble(&self, teller: Teller) {
        self.troubles.set_teller(teller);
    }

    /// Notes that a limit was reached, for those who watch.
    pub fn tell_limit(&self, message: String) {
        self.events.tell(Happening::Limit { message });
    }

    fn tell_state(&self, record: &Record) {
        self.tell_state_because(record, record.reason());
    }

    fn tell_state_because(&self, record: &Record, reason: Option<String>) {
        let (vm, state) = (record.name().to_owned(), record.state());
        self.events.tell(Happening::State { vm, state, reason });
    }

    /// Makes no more VMs, and asks all guests at once to end; those that are paused go on for that. Returns
    /// the names of their VMs. VMs whose guests cannot be asked, or never ran, end at once. All are to be
    /// collected.
    pub fn ask_to_end(&self) -> Vec<String> {
        self.closing.store(true, Ordering::SeqCst);
        let records: Vec<_> = self.records.lock().values().cloned().collect();
        let mut asked = Vec::new();
        for record in records {
            let Some(vm) = record.vm() else { continue };
            if record.state() == State::Paused {
                vm.resume();
                record.note_change();
                self.tell_state(&record);
            }
            if record.state() == State::Running && vm.ask_to_end() {
                asked.push(record.name().to_owned());
            } else {
                vm.handle().request_stop();
            }
        }
        asked
    }

    /// Makes no more VMs, and ends those that are there; their guests are not asked. They are to be collected.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.fleet.request_stop_all();
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Whether there are no machines, nor any being made. When this comes about, the fleet's file or this
    /// one becomes readable.
    pub fn is_idle(&self) -> bool {
        // In this order: an operation leaves the fleet as it is once it no longer counts.
        self.operations.load(Ordering::SeqCst) == 0 && self.fleet.is_empty()
    }

    /// Makes this file unreadable until another operation has ended.
    pub fn clear_settled(&self) {
        // Where there is nothing to be read nothing is to be cleared.
        let _ = self.settled.read();
    }

    fn operation(&self) -> Operation<'_> {
        self.operations.fetch_add(1, Ordering::SeqCst);
        Operation(self)
    }
}

impl AsRawFd for Manager {
    fn as_raw_fd(&self) -> RawFd {
        self.settled.as_raw_fd()
    }
}

/// A machine is being made or a VM deleted; the process does not end meanwhile.
struct Operation<'a>(&'a Manager);

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        self.0.operations.fetch_sub(1, Ordering::SeqCst);
        // The one failure of an event counter is that it is full: then it is readable as it is.
        let _ = self.0.settled.write(1);
    }
}
