//! The VMs of a process: one record for each, listed also when its machine has ended.
//!
//! Each VM has a [`Record`] that outlives its machine. Lengthy work (building, waiting for vCPUs, freeing
//! memory) runs on the caller's thread, with one operation at a time for each VM. Other operations on the VM
//! wait for a [`Turn`](crate::record::Turn).
//!
//! One thread of the process collects machines that have ended, with [`Registry::collect`]. Operations that
//! end a machine wait for that.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use vmm_sys_util::eventfd::EventFd;

use crate::build::build_all;
use crate::conflicts::{self, Uses};
use crate::disk_errors::{DiskErrorHandler, DiskErrors};
use crate::ends::{Ended, Ends, MachineNumber};
use crate::error::HostError;
use crate::events::EventLog;
use crate::governor::{Held, MemoryWatch};
use crate::host_limits::HostMemory;
use crate::record::{Installed, Record};
use crate::statistics::{self, Sample, Sampler, WorkerSample};
use samepage_api_types::events::Happening;
use samepage_api_types::lifecycle::State;
use samepage_machine::config::{ConfigError, HugePages, Validated};
use samepage_machine::huge_pages;
use samepage_machine::hypervisor::Hypervisor;
use samepage_machine::vm::{VmEnd, VmState};
use samepage_worker::machine::Machine;
use samepage_worker::pool::Workers;

/// Resources and settings that all VMs of the process have in common.
#[derive(Debug)]
pub struct Common {
    /// The engine that shares memory; `None` if this process shares none.
    pub sharing: Option<Arc<Sharing>>,
    /// The settings of the engine.
    pub settings: Settings,
    /// The factor by which the VMs' memory may exceed the host's available memory.
    pub overcommit: f64,
    /// The processes that hold the machines; `None` if this process holds them.
    pub workers: Option<Arc<Workers>>,
}

/// The VMs of a process.
#[derive(Debug)]
pub struct Registry {
    hypervisor: Hypervisor,
    pub(crate) common: Common,
    /// The log of events.
    pub events: Arc<EventLog>,
    /// What the governor sees and does.
    pub memory: MemoryWatch,
    disk_errors: Arc<DiskErrors>,
    /// Counts changes of VMs that are no event.
    changes: AtomicU64,
    pub(crate) records: Mutex<BTreeMap<String, Arc<Record>>>,
    /// Held during the check that the host has room for one more machine.
    pub(crate) reserving: Mutex<()>,
    ends: Ends,
    /// Machines being built, and VMs being deleted.
    operations: AtomicUsize,
    /// Readable when an operation has ended.
    settled: EventFd,
    is_ending: AtomicBool,
}

impl Registry {
    /// Returns a registry without VMs.
    ///
    /// # Errors
    /// Fails if the process is out of files.
    pub fn new(hypervisor: Hypervisor, common: Common) -> io::Result<Self> {
        let events = Arc::<EventLog>::default();
        Ok(Self {
            hypervisor,
            ends: Ends::new()?,
            common,
            disk_errors: Arc::new(DiskErrors::new(Arc::clone(&events))),
            events,
            memory: MemoryWatch::default(),
            changes: AtomicU64::new(0),
            records: Mutex::default(),
            reserving: Mutex::default(),
            operations: AtomicUsize::new(0),
            settled: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            is_ending: AtomicBool::new(false),
        })
    }

    /// Returns the engine that shares memory, if there is one.
    pub fn sharing(&self) -> Option<&Arc<Sharing>> {
        self.common.sharing.as_ref()
    }

    /// Returns the settings of the engine.
    pub fn settings(&self) -> &Settings {
        &self.common.settings
    }

    /// Adds VMs and builds their machines. All or none: if one fails, nothing of the others is left. They do
    /// not run yet.
    ///
    /// # Errors
    /// Fails if a VM conflicts with another one, or if the host lacks memory or anything else for it.
    pub fn create(&self, vms: Vec<Validated>) -> Result<Vec<Arc<Record>>, HostError> {
        let _operation = self.operation();
        let mut configs = Vec::with_capacity(vms.len());
        let mut records = Vec::with_capacity(vms.len());
        for vm in vms {
            let (spec, uses) = (vm.spec().clone(), Uses::of(vm.config()));
            let shares = self.common.sharing.is_some();
            let record = Arc::new(Record::new(spec, uses, shares).map_err(HostError::Watch)?);
            configs.push(self.complete(vm, &record));
            records.push(record);
        }
        self.reserve(&records)?;
        if let Err(error) = self.build(configs, &records) {
            let mut known = self.records.lock();
            records.iter().for_each(|record| drop(known.remove(record.name())));
            return Err(error);
        }
        for record in &records {
            record.list();
            self.tell_state(record);
        }
        // A shutdown in the meantime did not see all of the new VMs.
        if self.is_closing() {
            records.iter().filter_map(|record| record.vm()).for_each(|vm| vm.request_stop());
        }
        Ok(records)
    }

    /// Builds machines and gives them to their records. All or none. They do not run yet.
    pub(crate) fn build(&self, configs: Vec<Validated>, records: &[Arc<Record>]) -> Result<(), HostError> {
        let vms = build_all(&self.hypervisor, &self.common, configs)?;
        let mut installed = records.iter().zip(vms).map(|(record, vm)| self.install(record, vm));
        let done = installed.try_for_each(|installed| installed);
        if done.is_err() {
            for record in records {
                if let Some(vm) = record.vm() {
                    self.ends.forget(&*vm);
                }
                drop(record.uninstall());
            }
        }
        Ok(done?)
    }

    pub(crate) fn install(&self, record: &Record, vm: Arc<dyn Machine>) -> io::Result<()> {
        let number = self.ends.next_number();
        self.disk_errors.watch(&*vm);
        let (events, name) = (Arc::clone(&self.events), record.name().to_owned());
        vm.observe_balloon(Arc::new(move |frames| {
            let size_bytes = u64::from(frames) * PAGE_SIZE as u64;
            events.tell(Happening::Balloon { vm: name.clone(), size_bytes });
        }));
        record.install(Installed { vm: Arc::clone(&vm), number });
        // Ends are looked up by the record's machine, so they are watched after that.
        self.ends.watch(&*vm, number)
    }

    /// Adds the process's engine and the console's backlog to a configuration.
    pub(crate) fn complete(&self, mut config: Validated, record: &Record) -> Validated {
        if self.common.workers.is_none() {
            config.share_with(self.common.sharing.clone());
        }
        config.set_mode(record.mode());
        if config.spec().hugepages == HugePages::Thp && huge_pages::unavailable().is_some() {
            config.use_small_pages();
        }
        config.copy_console(record.backlog.sink());
        config
    }

    /// Reserves names, files and memory for VMs that are about to be built.
    fn reserve(&self, new: &[Arc<Record>]) -> Result<(), HostError> {
        let _one_after_another = self.reserving.lock();
        if self.is_closing() {
            return Err(HostError::Closing);
        }
        for record in new {
            if self.records.lock().contains_key(record.name()) {
                let (vm, name) = (record.name().to_owned(), record.name().to_owned());
                return Err(HostError::Config { vm, source: ConfigError::DuplicateName(name) });
            }
        }
        self.check_together(new)?;
        self.records.lock().extend(new.iter().map(|record| (record.name().to_owned(), record.clone())));
        Ok(())
    }

    /// Checks new VMs against the present machines: files and memory.
    pub(crate) fn check_together(&self, new: &[Arc<Record>]) -> Result<(), HostError> {
        let is_new = |record: &Arc<Record>| new.iter().any(|new| Arc::ptr_eq(new, record));
        let mut all: Vec<_> = self.records.lock().values().cloned().collect();
        all.retain(|record| record.is_taking() && !is_new(record));
        all.extend_from_slice(new);
        conflicts::check_together(&all.iter().map(|record| record.uses.clone()).collect::<Vec<_>>())?;
        if let Some(mut memory) = HostMemory::measure() {
            // Memory that present VMs use is part of their promised memory.
            // A worker may have ended by now.
            let workers =
                self.worker_processes().into_iter().filter_map(|id| statistics::rss_anon_of(id).ok());
            let taken = statistics::rss_anon().unwrap_or(0) + workers.sum::<u64>();
            memory.available = memory.available.saturating_add(taken);
            let requested = all.iter().map(|record| record.spec.memory.0);
            if let Err(error) = memory.check(requested.fold(0, u64::saturating_add), self.common.overcommit) {
                self.events.tell(Happening::Limit { message: error.to_string() });
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Returns the numbers of the worker processes.
    fn worker_processes(&self) -> Vec<u32> {
        self.common.workers.as_ref().map_or_else(Vec::new, |workers| workers.processes())
    }

    /// Returns the VM of this name.
    ///
    /// # Errors
    /// Fails if there is none.
    pub fn find(&self, name: &str) -> Result<Arc<Record>, HostError> {
        let record = self.records.lock().get(name).filter(|record| record.is_listed()).cloned();
        record.ok_or_else(|| HostError::NoSuchVm(name.to_owned()))
    }

    /// Returns all VMs, by name.
    pub fn list(&self) -> Vec<Arc<Record>> {
        self.records.lock().values().filter(|record| record.is_listed()).cloned().collect()
    }

    /// Returns the machines of all VMs, in the order in which they were added.
    pub fn machines(&self) -> Vec<Arc<dyn Machine>> {
        self.by_start().iter().filter_map(|record| record.vm()).collect()
    }

    /// Returns the VMs that have a machine, in the order in which their machines were added.
    pub fn by_start(&self) -> Vec<Arc<Record>> {
        let with_number = |record: &Arc<Record>| Some((record.machine()?.number, Arc::clone(record)));
        let mut records: Vec<_> = self.records.lock().values().filter_map(with_number).collect();
        records.sort_by_key(|(number, _)| *number);
        records.into_iter().map(|(_, record)| record).collect()
    }

    /// Returns for how long the present machine of a VM was held because memory was short.
    pub fn held(&self, record: &Record) -> Held {
        record.machine().map_or_else(Held::default, |machine| self.memory.held(machine.number))
    }

    /// Calls `look` with each record that has a machine. Other threads can neither add nor remove VMs meanwhile.
    pub(crate) fn glance_at_all(&self, mut look: impl FnMut(&Arc<Record>, MachineNumber, &dyn Machine)) {
        for record in self.records.lock().values() {
            record.glance(|number, vm| look(record, number, vm));
        }
    }

    /// Returns statistics of the process, with those of the given VMs that have a machine. Takes time in
    /// proportion to their memory.
    ///
    /// # Errors
    /// Fails if `/proc` cannot be read.
    pub fn sample(&self, sampler: &Sampler, records: &[Arc<Record>]) -> io::Result<Sample> {
        let vms = records.iter().filter_map(|record| record.inspect(|vm| sampler.vm(vm)));
        let mut sample = sampler.process(self.sharing().map(Arc::as_ref), vms.collect::<io::Result<_>>()?)?;
        // A worker may have ended by now.
        let workers = self.worker_processes().into_iter().filter_map(|id| WorkerSample::of(id).ok());
        sample.add_workers(workers.collect());
        Ok(sample)
    }

    /// Takes apart the machines that have ended, and returns their ends. To be called by one thread, when
    /// [`Registry::ends`] is readable.
    ///
    /// # Errors
    /// Fails if the machines cannot be watched.
    pub fn collect(&self) -> io::Result<Vec<Ended>> {
        let mut ended = Vec::new();
        loop {
            let ready = self.ends.ready()?;
            if ready.is_empty() {
                return Ok(ended);
            }
            ended.extend(ready.into_iter().filter_map(|number| self.collect_one(number)));
        }
    }

    fn collect_one(&self, number: MachineNumber) -> Option<Ended> {
        let record = self.records.lock().values().find(|record| record.has_machine(number)).cloned()?;
        let vm = record.vm()?;
        self.ends.forget(&*vm);
        let end = vm.wait();
        let console_lost = vm.look().devices.console.lost_bytes;
        // The record's reference is the last one, unless other threads still use the machine.
        drop(vm);
        let is_reset = record.is_reset(&end);
        record.finish(&end, || self.note_change());
        let name = record.name().to_owned();
        if let VmEnd::Crashed(report) = &end {
            self.events.tell(Happening::Crash { vm: name.clone(), report: report.to_string() });
        }
        // After a reset, the state is reported when the next machine exists.
        if !is_reset {
            self.tell_state(&record);
        }
        Some(Ended { name, end, console_lost, is_reset })
    }

    /// Returns a number that changes whenever a VM is created or deleted, or when its state or its sharing mode
    /// changes. It changes before the request that caused it is answered.
    pub fn revision(&self) -> u64 {
        self.events.last() + self.changes.load(Ordering::SeqCst)
    }

    pub(crate) fn note_change(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Has `handler` called with each disk error, besides the event log. Only the first call has an effect.
    pub fn on_disk_error(&self, handler: DiskErrorHandler) {
        self.disk_errors.set_handler(handler);
    }

    /// Adds an event: a limit was reached.
    pub fn tell_limit(&self, message: String) {
        self.events.tell(Happening::Limit { message });
    }

    pub(crate) fn tell_state(&self, record: &Record) {
        self.tell_state_because(record, record.reason());
    }

    pub(crate) fn tell_state_because(&self, record: &Record, reason: Option<String>) {
        let (vm, state) = (record.name().to_owned(), record.state());
        self.events.tell(Happening::State { vm, state, reason });
    }

    /// Refuses further VMs, and asks all guests to end; paused guests are resumed for that. Returns the names of
    /// their VMs. VMs whose guests cannot be asked, or never ran, end at once. All are to be collected.
    pub fn ask_to_end(&self) -> Vec<String> {
        self.is_ending.store(true, Ordering::SeqCst);
        let records: Vec<_> = self.records.lock().values().cloned().collect();
        let mut asked = Vec::new();
        for record in records {
            let Some(vm) = record.vm() else { continue };
            if record.state() == State::Paused {
                vm.start();
                record.note_change();
                self.tell_state(&record);
            }
            if record.state() == State::Running && vm.ask_to_end() {
                asked.push(record.name().to_owned());
            } else {
                vm.request_stop();
            }
        }
        asked
    }

    /// Asks in another way all guests that were asked and still run. Guests that have read of the power button have
    /// until the time is short.
    pub fn ask_again(&self, time_is_short: bool) {
        let machines = self.machines();
        machines
            .iter()
            .filter(|vm| vm.state() == VmState::Running)
            .for_each(|vm| vm.ask_again(time_is_short));
    }

    /// Refuses further VMs, and ends all VMs without asking their guests. All are to be collected.
    pub fn close(&self) {
        self.is_ending.store(true, Ordering::SeqCst);
        self.machines().iter().for_each(|vm| vm.request_stop());
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.is_ending.load(Ordering::SeqCst)
    }

    /// Whether there are no machines, and none are being built. When this comes about, [`Registry::ends`] or
    /// [`Registry::settled`] becomes readable.
    pub fn is_idle(&self) -> bool {
        // In this order: an operation changes no machine once it no longer counts.
        self.operations.load(Ordering::SeqCst) == 0
            && self.records.lock().values().all(|record| record.vm().is_none())
    }

    /// Returns the file that is readable while machines have ended and are to be [collected](Self::collect).
    pub fn ends(&self) -> RawFd {
        self.ends.as_raw_fd()
    }

    /// Returns the file that becomes readable when an operation has ended, such as the making of a VM.
    pub fn settled(&self) -> RawFd {
        self.settled.as_raw_fd()
    }

    /// Makes [`Registry::settled`] unreadable until another operation has ended.
    pub fn clear_settled(&self) {
        // If the event is not readable, there is nothing to clear.
        let _ = self.settled.read();
    }

    pub(crate) fn operation(&self) -> Operation<'_> {
        self.operations.fetch_add(1, Ordering::SeqCst);
        Operation(self)
    }
}

/// A machine being built, or a VM being deleted. The process does not end meanwhile.
pub(crate) struct Operation<'a>(&'a Registry);

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        self.0.operations.fetch_sub(1, Ordering::SeqCst);
        // Writing fails only if the event counter is full. Then it is readable anyway.
        let _ = self.0.settled.write(1);
    }
}
