//! One virtual machine: built, run, paused, ended and freed.

mod asking;
mod balloon;
pub(crate) mod blocks;
mod bus;
mod changes;
mod console_target;
pub(crate) mod control;
mod crash;
pub(crate) mod devices;
mod error;
mod far_blocks;
mod generation;
mod hole;
#[cfg(test)]
mod kept_pages;
pub(crate) mod memory;
pub(crate) mod network;
mod pci;
mod processors;
mod provenance;
mod registration;
#[cfg(test)]
mod smp_tests;
mod vcpu;
pub(crate) mod virtio;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::VmFd;
use samepage_devices::doorbell::Doorbell;
use samepage_devices::serial::SerialStats;
use samepage_devices::virtio::balloon::{BalloonControl, FreePages};
use samepage_devices::virtio::console::Console;
use samepage_devices::virtio::rng::RngStats;
use samepage_devices::virtio::vsock::VsockStats;
use samepage_sharing::Ram;
use samepage_sharing::changes::ChangeLog;
use samepage_sharing::remote::worker::VmIndex;
use samepage_sharing::service::Membership;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::load::{self, Loaded};
use crate::config::{ConfigError, MemoryHole, Validated, VirtioBus, VmConfig, VmSpec};
use crate::console::Log;
use crate::hypervisor::Hypervisor;
use crate::seed;
use crate::x86::acpi;
use crate::x86::layout::{HoleRange, IDENTITY_MAP, TSS};
use crate::x86::topology::Topology;
use crate::x86::{mptable, registers, reset_vector};

use asking::Asking;
pub use asking::TimeToEnd;
use balloon::GivenPages;
use changes::DirtyLog;
use control::Control;
pub use crash::{CrashKind, CrashReport};
use devices::{Devices, FarMemory, HoleDevice, SharedMemory, Sharer};
pub use devices::{Disk, FixedPolicy, MAX_DISKS, MAX_PCI_DISKS, first_cached_layer};
pub use error::VmError;
pub use hole::HoleMemory;
use hole::{HeardHole, Ring};
pub use memory::{MemorySlot, VmMemory};
pub use network::{MAX_NETWORKS, Network};
use registration::Registration;
use vcpu::Vcpu;
pub use virtio::MAX_VIRTIO;
use virtio::mmio_devices;

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmEnd {
    /// The guest reset the machine. There is no next boot: this ends the VM.
    Reset,
    /// The guest turned the machine off.
    PowerOff,
    /// The guest crashed.
    Crashed(CrashReport),
    /// An error of the host ended the VM.
    Failed(String),
    /// The VM was stopped from outside.
    Stopped,
}

impl fmt::Display for VmEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmEnd::Reset => f.write_str("the guest reset the machine"),
            VmEnd::PowerOff => f.write_str("the guest powered off"),
            VmEnd::Crashed(report) => write!(f, "the guest crashed: {report}"),
            VmEnd::Failed(reason) => write!(f, "failed: {reason}"),
            VmEnd::Stopped => f.write_str("stopped"),
        }
    }
}

/// The state of a VM's vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmState {
    /// The vCPUs are held: before the start, or by a pause.
    Held,
    /// The vCPUs run.
    Running,
    /// The VM has ended, or is about to end.
    Ended,
}

impl VmState {
    /// Returns the state in a word.
    pub fn name(self) -> &'static str {
        match self {
            VmState::Held => "paused",
            VmState::Running => "running",
            VmState::Ended => "ended",
        }
    }
}

/// A handle that ends a VM from any thread, also after the VM is dropped.
#[derive(Clone)]
pub struct VmHandle {
    name: Arc<str>,
    control: Arc<Control>,
}

impl fmt::Debug for VmHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VmHandle").field(&self.name).finish()
    }
}

impl VmHandle {
    /// Returns the VM's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Ends this VM because of an error of the host. Does not wait. Has no effect on a VM that is ending.
    pub fn fail(&self, reason: String) {
        self.control.finish(VmEnd::Failed(reason));
    }

    /// Asks the VM to stop, and does not wait for it.
    pub fn request_stop(&self) {
        self.control.finish(VmEnd::Stopped);
    }

    /// Holds the vCPUs until [`VmHandle::release`], whether the VM is paused or not. Does not wait. The state of the VM
    /// stays as it is.
    pub fn withhold(&self) {
        self.control.withhold();
    }

    /// Lets the vCPUs of a running VM run again after [`VmHandle::withhold`].
    pub fn release(&self) {
        self.control.release();
    }

    /// Returns the kernel's numbers of the vCPUs' threads, without those that have ended.
    pub fn threads(&self) -> Vec<u32> {
        self.control.threads()
    }
}

/// A virtual machine. Dropping it ends it and frees its threads, files and memory.
pub struct Vm {
    handle: VmHandle,
    vcpus: u32,
    threads: Vec<JoinHandle<()>>,
    notices: Vec<String>,
    console_log: Option<Log>,
    asking: Asking,
    // Fields are dropped in this order: users of guest memory come before it.
    devices: Arc<Devices>,
    membership: Option<Membership>,
    registration: Option<Registration>,
    kvm: Arc<VmFd>,
    hole: Option<Arc<HoleMemory>>,
    memory: VmMemory,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("name", &self.name()).field("end", &self.end()).finish_non_exhaustive()
    }
}

impl Vm {
    /// Builds a VM that is ready to run, from a validated configuration or from one that is validated here.
    ///
    /// # Errors
    /// Fails if the configuration has a fault, or if the host lacks what the VM needs. A VM that was built
    /// can run.
    pub fn build<C>(config: C, hypervisor: &Hypervisor) -> Result<Self, VmError>
    where
        C: TryInto<Validated>,
        VmError: From<C::Error>,
    {
        Self::build_validated(config.try_into()?, hypervisor)
    }

    fn build_validated(config: Validated, hypervisor: &Hypervisor) -> Result<Self, VmError> {
        let (mut config, unpacked) = config.into_parts();
        let mut notices: Vec<_> =
            give_up_hole_out_of_reach(&mut config, hypervisor.address_bits()).into_iter().collect();
        let bytes = config.spec.memory.0;
        let vcpus = config.spec.vcpus;
        processors::check_count(hypervisor, vcpus)?;
        // The description has made sure of it.
        let numbers = u8::try_from(vcpus).unwrap_or(u8::MAX);
        let memory = VmMemory::reserve(bytes, config.is_shared(), config.spec.hugepages)
            .map_err(|source| VmError::Memory { bytes, source })?;
        if let Some(node) = config.spec.host_numa_node {
            memory.ram().prefer_node(node).map_err(|source| VmError::NumaNode { node, source })?;
        }
        let news = config.has_port().then(|| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC));
        let news = news.transpose().map_err(VmError::Event)?;
        let hole = reserve_hole(&config, news.as_ref())?.map(Arc::new);
        let (kernel, initrd) = (config.kernel(), config.initrd());
        let command_line = config.kernel_command_line();
        let Loaded { entry, remark } =
            load::load(memory.view(), bytes, config.hole(), &kernel, initrd.as_ref(), &command_line)?;
        drop(unpacked);
        notices.extend(remark.map(|remark| format!("VM {}: {remark}", config.spec.name)));
        registers::write_tables(memory.view(), entry).map_err(VmError::Tables)?;
        let virtio: Vec<_> = mmio_devices(config.mmio_device_count(config.is_shared())).collect();
        let has_pci = config.spec.bus == VirtioBus::Pci;
        acpi::write(memory.view(), numbers, &virtio, has_pci).map_err(VmError::Tables)?;
        mptable::write(memory.view(), numbers).map_err(VmError::Tables)?;
        reset_vector::write(memory.view()).map_err(VmError::Tables)?;
        generation::write_new(memory.view())?;

        let kvm = Arc::new(create_machine(hypervisor)?);
        let logged = config.is_shared() && changes::enable(&kvm);
        memory.register(&kvm, logged).map_err(VmError::kvm("give guest memory to KVM"))?;
        if let Some(hole) = hole.as_ref().filter(|_| !config.has_port()) {
            let slot = memory.slots().len() as u32;
            hole.register(&kvm, slot).map_err(VmError::kvm("give the memory hole to KVM"))?;
        }
        add_interrupt_controllers(&kvm)?;
        processors::use_long_apic_ids(&kvm);
        let control = Arc::new(Control::new().map_err(VmError::Event)?);
        let handle = VmHandle { name: config.spec.name.as_str().into(), control };
        let vm = handle.clone();
        let tell = move |loss| vm.fail(format!("its memory was lost: {loss}"));
        memory.ram().on_loss(tell).map_err(VmError::Thread)?;
        if let Some(hole) = &hole {
            let vm = handle.clone();
            let tell = move |loss| vm.fail(format!("its memory hole was lost: {loss}"));
            hole.on_loss(tell).map_err(VmError::Thread)?;
        }
        let log = || {
            logged.then(|| {
                let control = Arc::clone(&handle.control);
                let log: Box<dyn ChangeLog> =
                    Box::new(DirtyLog::new(Arc::clone(&kvm), memory.clone(), control));
                log
            })
        };
        let registration = match &config.elsewhere {
            Some(there) => {
                Some(Registration::new(&there.vms, Arc::clone(memory.ram()), log()).map_err(VmError::Offer)?)
            }
            None => None,
        };
        let membership = match config.sharing {
            Some(sharing) => {
                let vm = handle.clone();
                let lost =
                    move |error: &_| vm.fail(format!("its memory was lost while it was shared: {error}"));
                let ram = Arc::clone(memory.ram());
                let member = sharing.add(ram, log(), &config.spec.sharing, Box::new(lost));
                Some(member.map_err(VmError::Sharing)?)
            }
            None => None,
        };
        let ring: Option<Ring> = match (&hole, &membership, &config.elsewhere) {
            (Some(hole), Some(membership), _) => {
                let bell = membership.listen(hole.clone());
                Some(Arc::new(move || bell.ring()))
            }
            (Some(_), None, Some(there)) => Some(Arc::clone(&there.ring)),
            _ => None,
        };
        let hole_device = hole.as_ref().zip(ring).map(|(hole, ring)| match news {
            None => HoleDevice::Doorbell(hole.doorbell(), Doorbell::new(move || ring())),
            Some(news) => {
                let heard = HeardHole { memory: Arc::clone(hole), ring };
                HoleDevice::Port(Console::new(&config.spec.name, Arc::new(heard), news))
            }
        });
        let (console, console_log) =
            console_target::open(config.console, &config.spec.name, handle.control.closing())?;
        let slots = memory.slots();
        let sharer = match (&membership, &registration, &config.elsewhere) {
            (Some(membership), ..) => {
                Sharer::Here(SharedMemory { hints: membership.hints(), blocks: membership.blocks(), slots })
            }
            (None, Some(registration), Some(there)) => {
                let vm = (&there.vms, registration.index());
                Sharer::Elsewhere(FarMemory { vm, has_cache: there.has_cache, slots })
            }
            _ => Sharer::None,
        };
        let given = config.spec.balloon().map(|_| {
            let given = GivenPages::new(&memory, membership.as_ref(), config.elsewhere.as_ref());
            Arc::new(given) as Arc<dyn FreePages>
        });
        let (spec, _seed) = seed::attach(config.spec).map_err(ConfigError::from)?;
        let devices = Arc::new(Devices::new(
            &kvm,
            (memory.view(), memory.ram().loss_flag(), given),
            console,
            &spec,
            &sharer,
            hole_device,
            config.detours,
        )?);
        let topology = Topology::new(vcpus, spec.smt);
        let fds = processors::create(hypervisor, &kvm, (topology, spec.cpu), entry)?;

        let mut vm = Self {
            handle,
            vcpus,
            threads: Vec::new(),
            notices,
            console_log,
            devices,
            membership,
            registration,
            kvm,
            asking: Asking::default(),
            hole,
            memory,
        };
        for (number, fd) in (0..).zip(fds) {
            let (memory, devices) = (vm.memory.clone(), vm.devices.clone());
            let vcpu = Vcpu { number, fd, memory, devices, node: spec.host_numa_node };
            let thread = vcpu.spawn(&spec.name, &vm.handle.control).map_err(VmError::Thread)?;
            vm.threads.push(thread);
        }
        vm.devices.keep_new_files();
        Ok(vm)
    }

    /// Returns the VM's name.
    pub fn name(&self) -> &str {
        self.handle.name()
    }

    /// Returns the number of the vCPUs.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// Returns a handle that ends the VM.
    pub fn handle(&self) -> VmHandle {
        self.handle.clone()
    }

    /// Starts the guest, or resumes it after [`Vm::pause`].
    pub fn start(&self) {
        self.handle.control.run();
    }

    /// Pauses the guest. On return its vCPUs have stopped; devices finish requests that they have begun.
    pub fn pause(&self) {
        self.handle.control.hold();
    }

    /// Resumes a paused guest.
    pub fn resume(&self) {
        self.handle.control.run();
    }

    /// Ends the VM without asking the guest, and waits until its vCPUs have stopped.
    pub fn stop(&self) -> VmEnd {
        self.handle.request_stop();
        self.wait()
    }

    /// Ends the VM because of an error of the host. Does not wait.
    pub fn fail(&self, reason: String) {
        self.handle.fail(reason);
    }

    /// Waits until the VM has ended, and returns how.
    pub fn wait(&self) -> VmEnd {
        self.handle.control.wait()
    }

    /// Returns how the VM ended, if it has.
    pub fn end(&self) -> Option<VmEnd> {
        self.handle.control.end()
    }

    /// Returns an event that becomes readable, and stays so, when the VM has ended.
    pub fn end_event(&self) -> &EventFd {
        self.handle.control.ended()
    }

    /// Returns the VM's membership in the sharing engine; `None` if it shares no memory.
    pub fn membership(&self) -> Option<&Membership> {
        self.membership.as_ref()
    }

    /// Returns the number by which an engine of another process asks for the VM's memory, if one shares it.
    pub fn index(&self) -> Option<VmIndex> {
        self.registration.as_ref().map(Registration::index)
    }

    /// Returns the memory hole as a file, if an engine of another process reads it.
    pub fn hole_file(&self) -> Option<&Arc<OwnedFd>> {
        self.hole.as_ref()?.file()
    }

    /// Tells the guest that the engine of another process has changed the header of the memory hole.
    pub fn tell_hole_news(&self) {
        if let Some(hole) = &self.hole {
            hole.tell_news();
        }
    }

    /// Returns the state of the vCPUs.
    pub fn state(&self) -> VmState {
        self.handle.control.state()
    }

    /// Returns the CPU time of the vCPUs, in the guest and on its behalf.
    pub fn cpu_time(&self) -> Duration {
        self.handle.control.cpu_time()
    }

    /// Returns guest RAM as pages.
    pub fn ram(&self) -> &Arc<Ram> {
        self.memory.ram()
    }

    /// Returns guest memory by guest addresses.
    pub fn memory(&self) -> &VmMemory {
        &self.memory
    }

    /// Opens the console's file again, if it has one, so that the renamed file can be moved away. The guest does
    /// not wait.
    ///
    /// # Errors
    /// Fails if the file cannot be opened. Then output goes to the previous file.
    pub fn reopen_console(&self) -> Result<(), VmError> {
        let Some(log) = &self.console_log else { return Ok(()) };
        log.reopen().map_err(|source| VmError::Console { path: log.path().display().to_string(), source })
    }

    /// Types to the guest's console. Returns how many bytes from the start were accepted. When there is room
    /// again, the event of [`Vm::set_serial_room_event`] is written.
    pub fn serial_input(&self, data: &[u8]) -> usize {
        self.devices.serial_input(data)
    }

    /// Sets the event that is written when the console accepts more; see [`Vm::serial_input`].
    pub fn set_serial_room_event(&self, event: EventFd) {
        self.devices.set_serial_room_event(event);
    }

    /// Returns the counters of the console.
    pub fn serial_stats(&self) -> &Arc<SerialStats> {
        self.devices.serial_stats()
    }

    /// Returns remarks for the user on how the VM was built, in sentences.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Returns the network devices, in the order of the configuration.
    pub fn networks(&self) -> &[Network] {
        self.devices.networks()
    }

    /// Returns the counters of the socket device, if there is one.
    pub fn vsock_stats(&self) -> Option<&Arc<VsockStats>> {
        self.devices.vsock_stats()
    }

    /// Returns the counters of the entropy device, if there is one.
    pub fn rng_stats(&self) -> Option<&Arc<RngStats>> {
        self.devices.rng_stats()
    }

    /// Returns the controls and counters of the memory balloon, if there is one.
    pub fn balloon(&self) -> Option<&Arc<BalloonControl>> {
        self.devices.balloon()
    }

    /// Returns the disks, in the order of the configuration.
    pub fn disks(&self) -> &[Disk] {
        self.devices.disks()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.handle.request_stop();
        for thread in self.threads.drain(..) {
            // A panic was reported on standard error and has ended the VM, so there is no more to do.
            let _ = thread.join();
        }
    }
}

/// Reserves the memory hole of a VM that has one. `news` is for a memory hole behind a port.
fn reserve_hole(config: &VmConfig, news: Option<&EventFd>) -> Result<Option<HoleMemory>, VmError> {
    let bytes = config.spec.memory.0;
    let range = config.hole().or_else(|| news.map(|_| HoleRange::of(bytes)));
    let Some(range) = range else { return Ok(None) };
    let reserved = match &config.elsewhere {
        Some(_) => HoleMemory::in_file(bytes, range),
        None => HoleMemory::reserve(bytes, range),
    };
    let memory = reserved.map_err(|source| VmError::Memory { bytes: range.bytes, source })?;
    let news = news.map(EventFd::try_clone).transpose().map_err(VmError::Event)?;
    Ok(Some(match news {
        Some(news) => memory.behind_port(news),
        None => memory,
    }))
}

/// Removes a memory hole that processors of this host cannot address. Returns a remark for the user.
fn give_up_hole_out_of_reach(config: &mut VmConfig, address_bits: u32) -> Option<String> {
    config.hole().filter(|hole| hole.end() > 1 << address_bits)?;
    config.spec.memory_hole = MemoryHole::Off;
    let VmSpec { name, memory, .. } = &config.spec;
    Some(format!(
        "VM {name}: it has no memory hole, since guests address {address_bits} bits on this host and \
         {bytes} bytes of memory leave no room for it; nothing else is missing",
        bytes = memory.0
    ))
}

/// Returns an empty machine.
fn create_machine(hypervisor: &Hypervisor) -> Result<VmFd, VmError> {
    let kvm = hypervisor.create_vm().map_err(VmError::kvm("create a VM"))?;
    if hypervisor.needs_identity_map {
        kvm.set_identity_map_address(IDENTITY_MAP).map_err(VmError::kvm("set KVM's identity map"))?;
    }
    if hypervisor.needs_tss {
        kvm.set_tss_address(TSS as usize).map_err(VmError::kvm("set KVM's task state segment"))?;
    }
    Ok(kvm)
}

/// Adds interrupt controllers and timer to a machine that already has its memory. In the other order, KVM
/// would wait some milliseconds before it accepts the memory, until no processor sees the machine without
/// these devices.
fn add_interrupt_controllers(kvm: &VmFd) -> Result<(), VmError> {
    kvm.create_irq_chip().map_err(VmError::kvm("create the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    kvm.create_pit2(pit).map_err(VmError::kvm("create the timer"))
}

#[cfg(test)]
mod tests {
    use samepage_sharing::engine::Settings;
    use samepage_sharing::service::Sharing;

    use super::*;
    use crate::config::Size;

    #[test]
    fn a_hole_out_of_reach_is_given_up_and_told() {
        let Ok(sharing) = Sharing::start(Settings::default()).map(Arc::new) else { return };
        let config = |bytes, sharing: Option<&Arc<Sharing>>| {
            let spec = VmSpec { memory: Size(bytes), ..VmSpec::new("big", "kernel") };
            VmConfig { sharing: sharing.cloned(), ..VmConfig::from(spec) }
        };
        for (gib, bits, told) in [(1_u64, 36, false), (300, 39, false), (511, 39, true), (300, 38, true)] {
            let mut config = config(gib << 30, Some(&sharing));
            let notice = give_up_hole_out_of_reach(&mut config, bits);
            assert_eq!((notice.is_some(), config.hole().is_none()), (told, told), "{gib} GiB: {notice:?}");
        }
        assert_eq!(give_up_hole_out_of_reach(&mut config(511 << 30, None), 39), None);
    }
}
