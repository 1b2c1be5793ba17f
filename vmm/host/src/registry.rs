//! The VMs of a process: one record for each, listed also when its machine has ended.
//!
//! Each VM has a [`Record`] that outlives its machine. Lengthy work (building, waiting for vCPUs, freeing
//! memory) runs on the caller's thread, one operation at a time for each VM; whoever asks for another
//! meanwhile waits for a [`Turn`](crate::record::Turn).
//!
//! One thread of the process collects machines that have ended, with [`Registry::collect`]; operations that
//! end a machine wait for that.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use vmm_sys_util::eventfd::EventFd;

use crate::build::build_all;
use crate::conflicts;
use crate::ends::{Ended, Ends, MachineNumber};
use crate::error::HostError;
use crate::events::EventLog;
use crate::host_limits::HostMemory;
use crate::record::{Machine, Record};
use crate::statistics::{self, Sample, Sampler};
use crate::trouble::{Teller, Troubles};
use crate::validated::Validated;
use samepage_api_types::events::Happening;
use samepage_api_types::lifecycle::State;
use samepage_machine::config::{self, ConfigError, HugePages};
use samepage_machine::huge_pages;
use samepage_machine::hypervisor::Hypervisor;
use samepage_machine::vm::{Vm, VmEnd};

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
pub struct Registry {
    hypervisor: Hypervisor,
    pub(crate) common: Common,
    /// What happens to its VMs.
    pub events: Arc<EventLog>,
    troubles: Arc<Troubles>,
    /// What changed about VMs without an event.
    changes: AtomicU64,
    pub(crate) records: Mutex<BTreeMap<String, Arc<Record>>>,
    /// Held during the check that the host has room for one more machine.
    pub(crate) reserving: Mutex<()>,
    ends: Ends,
    /// Machines being made or made anew, and VMs being deleted.
    operations: AtomicUsize,
    /// Readable when an operation has ended.
    settled: EventFd,
    closing: AtomicBool,
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

    /// The engine that shares memory.
    pub fn sharing(&self) -> Option<&Arc<Sharing>> {
        self.common.sharing.as_ref()
    }

    /// The settings that the engine was started with.
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
            let uses = vm.uses();
            let (spec, config) = vm.into_parts();
            let shares = self.common.sharing.is_some();
            let record = Arc::new(Record::new(spec, uses, shares).map_err(HostError::Watch)?);
            configs.push(self.complete(config, &record));
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
        // A shutdown that came meanwhile did not see all of them.
        if self.is_closing() {
            records.iter().filter_map(|record| record.vm()).for_each(|vm| vm.handle().request_stop());
        }
        Ok(records)
    }

    /// Builds machines and gives them to their records. All or none. They do not run yet.
    pub(crate) fn build(
        &self,
        configs: Vec<config::Validated>,
        records: &[Arc<Record>],
    ) -> Result<(), HostError> {
        let vms = build_all(&self.hypervisor, configs)?;
        let mut installed = records.iter().zip(vms).map(|(record, vm)| self.install(record, Arc::new(vm)));
        let done = installed.try_for_each(|installed| installed);
        if done.is_err() {
            for record in records {
                if let Some(vm) = record.vm() {
                    self.ends.forget(&vm);
                }
                drop(record.uninstall());
            }
        }
        Ok(done?)
    }

    fn install(&self, record: &Record, vm: Arc<Vm>) -> io::Result<()> {
        let number = self.ends.next_number();
        self.troubles.watch(&vm);
        record.install(Machine { vm: Arc::clone(&vm), number });
        // Ends are looked up by the record's machine, so they are watched after that.
        self.ends.watch(&vm, number)
    }

    /// Adds to a configuration what a VM of this process has besides.
    pub(crate) fn complete(&self, mut config: config::Validated, record: &Record) -> config::Validated {
        config.share_with(self.common.sharing.clone());
        config.set_mode(record.mode());
        if config.config().hugepages == HugePages::Thp && huge_pages::unavailable().is_some() {
            config.use_small_pages();
        }
        config.copy_console(record.backlog.sink());
        config
    }

    /// Takes names, files and memory for VMs that are about to be made.
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

    /// Checks VMs that are to be made against the machines that there are: files, and memory.
    pub(crate) fn check_together(&self, new: &[Arc<Record>]) -> Result<(), HostError> {
        let is_new = |record: &Arc<Record>| new.iter().any(|new| Arc::ptr_eq(new, record));
        let mut all: Vec<_> = self.records.lock().values().cloned().collect();
        all.retain(|record| record.is_taking() && !is_new(record));
        all.extend_from_slice(new);
        conflicts::check_together(&all.iter().map(|record| record.uses.clone()).collect::<Vec<_>>())?;
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
    pub fn find(&self, name: &str) -> Result<Arc<Record>, HostError> {
        let record = self.records.lock().get(name).filter(|record| record.is_listed()).cloned();
        record.ok_or_else(|| HostError::NoSuchVm(name.to_owned()))
    }

    /// All VMs, by name.
    pub fn list(&self) -> Vec<Arc<Record>> {
        self.records.lock().values().filter(|record| record.is_listed()).cloned().collect()
    }

    /// Returns the machines of all VMs, in the order in which they were added.
    pub fn machines(&self) -> Vec<Arc<Vm>> {
        self.by_start().iter().filter_map(|record| record.vm()).collect()
    }

    /// Returns the VMs that have a machine, in the order in which their machines were added.
    pub fn by_start(&self) -> Vec<Arc<Record>> {
        let with_number = |record: &Arc<Record>| Some((record.machine()?.number, Arc::clone(record)));
        let mut records: Vec<_> = self.records.lock().values().filter_map(with_number).collect();
        records.sort_by_key(|(number, _)| *number);
        records.into_iter().map(|(_, record)| record).collect()
    }

    /// Returns statistics of the process, with those of the given VMs that have a machine. Takes time in
    /// proportion to their memory.
    ///
    /// # Errors
    /// Fails if `/proc` cannot be read.
    pub fn sample(&self, sampler: &Sampler, records: &[Arc<Record>]) -> io::Result<Sample> {
        let vms = records.iter().filter_map(|record| record.inspect(|vm| sampler.vm(vm)));
        sampler.process(self.sharing().map(Arc::as_ref), vms.collect::<io::Result<_>>()?)
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
        self.ends.forget(&vm);
        let end = vm.wait();
        let console_lost = vm.serial_stats().lost.load(Ordering::Relaxed);
        // The record's is the last reference, but for those who still use the machine.
        drop(vm);
        let is_reset = record.is_reset(&end);
        record.finish(&end, || self.note_change());
        let name = record.name().to_owned();
        if let VmEnd::Crashed(report) = &end {
            self.events.tell(Happening::Crash { vm: name.clone(), report: report.to_string() });
        }
        // The state after a reset is told once the next machine is there.
        if !is_reset {
            self.tell_state(&record);
        }
        Some(Ended { name, end, console_lost, is_reset })
    }

    /// A number that is another one once a VM was made or deleted, came into another state or shares
    /// otherwise, before whoever asked for that is answered.
    pub fn revision(&self) -> u64 {
        self.events.last() + self.changes.load(Ordering::SeqCst)
    }

    pub(crate) fn note_change(&self) {
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

    pub(crate) fn tell_state(&self, record: &Record) {
        self.tell_state_because(record, record.reason());
    }

    pub(crate) fn tell_state_because(&self, record: &Record, reason: Option<String>) {
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
        self.machines().iter().for_each(|vm| vm.handle().request_stop());
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Whether there are no machines, nor any being made. When this comes about, [`Registry::ends`] or
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
        // Where there is nothing to be read nothing is to be cleared.
        let _ = self.settled.read();
    }

    pub(crate) fn operation(&self) -> Operation<'_> {
        self.operations.fetch_add(1, Ordering::SeqCst);
        Operation(self)
    }
}

/// A machine is being made or a VM deleted; the process does not end meanwhile.
pub(crate) struct Operation<'a>(&'a Registry);

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        self.0.operations.fetch_sub(1, Ordering::SeqCst);
        // The one failure of an event counter is that it is full: then it is readable as it is.
        let _ = self.0.settled.write(1);
    }
}
