//! The devices of one VM and the wires between them and KVM.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use samepage_devices::GuestMemory;
use samepage_devices::disk::cache::BlockCache;
use samepage_devices::disk::limit::RateLimiter;
use samepage_devices::disk::{CachePolicy, DiskOptions, Engine, Format, NewFile, NewImage};
use samepage_devices::doorbell::{DOORBELL_BYTES, Doorbell};
use samepage_devices::i8042::{self, I8042};
use samepage_devices::net::Detour;
use samepage_devices::power::{self, Power};
use samepage_devices::serial::{self, Serial, SerialStats};
use samepage_devices::virtio::balloon::{Balloon, BalloonConfig, BalloonControl, FRAME_BYTES, FreePages};
use samepage_devices::virtio::block::{Block, BlockConfig, BlockStats, DiskSize};
use samepage_devices::virtio::console::Console;
use samepage_devices::virtio::rng::{Rng, RngStats};
use samepage_devices::virtio::vsock::{Vsock, VsockStats};
use samepage_sharing::blocks::admission::Readers;
use samepage_sharing::remote::serve::Vms;
use samepage_sharing::remote::worker::VmIndex;
use samepage_sharing::service::{BlockClient, HintSender};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::blocks::{DiskBlocks, keep};
use super::bus::Bus;
use super::far_blocks::FarBlocks;
use super::memory::MemorySlot;
use super::network::{self, Network};
use super::provenance::DiskHints;
use super::virtio::Places;
use super::{VmEnd, VmError};
use crate::config::{BalloonSpec, DiskSpec, VirtioBus, VmSpec};
use crate::x86::layout::{KEYBOARD_IRQ, POWER_PORT, SERIAL_IRQ, SERIAL_PORT};

/// Upper limit for the disks of a VM.
pub const MAX_DISKS: usize = 8;

/// The same on a PCI bus, which has room for more devices.
pub const MAX_PCI_DISKS: usize = 24;

/// Returns the upper limit for the disks of a VM on this bus.
pub(crate) fn most_disks(bus: VirtioBus) -> usize {
    match bus {
        VirtioBus::Mmio => MAX_DISKS,
        VirtioBus::Pci => MAX_PCI_DISKS,
    }
}

/// A disk of a running VM.
pub struct Disk {
    /// The name of the disk within the VM.
    pub id: String,
    /// The counters.
    pub stats: Arc<BlockStats>,
    /// The limits per second, which can be changed at any time.
    pub limiter: Arc<RateLimiter>,
    /// The size, which can be set to the image's at any time.
    pub size: Arc<DiskSize>,
    /// Remarks for the user on how the image is accessed, in sentences.
    pub notices: Vec<String>,
    /// The cache policy with which the disk was opened.
    policy: CachePolicy,
    /// The disk's access to the block cache, if it has one.
    blocks: Option<CacheAccess>,
}

/// A disk's access to the block cache of its VM's group.
#[derive(Clone)]
enum CacheAccess {
    /// In this process.
    Here(Arc<DiskBlocks>),
    /// In another process.
    Far(Arc<FarBlocks>),
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("id", &self.id).field("cache", &self.cache()).finish_non_exhaustive()
    }
}

/// The policy is fixed until the disk is opened again.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "disk {id} was opened with the cache policy {from}, and cannot change to {to} while it is open: only \
     exclusive, scrub, inclusive and none can be exchanged for each other, on a disk that was opened with one \
     of the first three"
)]
pub struct FixedPolicy {
    id: String,
    from: CachePolicy,
    to: CachePolicy,
}

impl Disk {
    /// Returns the present cache policy.
    pub fn cache(&self) -> CachePolicy {
        match &self.blocks {
            None => self.policy,
            Some(CacheAccess::Here(blocks)) => blocks.policy(),
            Some(CacheAccess::Far(blocks)) => blocks.policy(),
        }
    }

    /// Connects one more queue to the block cache of another process, at whose end of a line this is. To be called before
    /// the guest runs.
    ///
    /// # Errors
    /// Fails if the disk uses no such cache, or if the other end is gone.
    pub fn connect_cache(&self, socket: OwnedFd) -> io::Result<()> {
        match &self.blocks {
            Some(CacheAccess::Far(blocks)) => blocks.connect(socket),
            _ => Err(io::Error::new(io::ErrorKind::Unsupported, "the disk uses no cache of another process")),
        }
    }

    /// Changes the cache policy for further reads. Cached blocks stay until they are evicted.
    ///
    /// # Errors
    /// Fails if the disk would have to be opened again.
    pub fn set_cache(&self, policy: CachePolicy) -> Result<(), FixedPolicy> {
        match &self.blocks {
            Some(CacheAccess::Here(blocks)) if policy != CachePolicy::Buffered => blocks.set_policy(policy),
            Some(CacheAccess::Far(blocks)) if policy != CachePolicy::Buffered => blocks.set_policy(policy),
            _ if policy == self.cache() => {}
            _ => return Err(FixedPolicy { id: self.id.clone(), from: self.policy, to: policy }),
        }
        Ok(())
    }
}

/// A VM's memory, as the sharing engine sees it.
pub(super) struct SharedMemory<'a> {
    /// Hints of devices about pages.
    pub(super) hints: HintSender,
    /// The block cache.
    pub(super) blocks: BlockClient,
    /// The guest addresses of RAM.
    pub(super) slots: &'a [MemorySlot],
}

/// The engine that shares a VM's memory, as the VM's devices reach it.
pub(super) enum Sharer<'a> {
    /// The VM shares no memory.
    None,
    /// The engine of this process.
    Here(SharedMemory<'a>),
    /// The engine of another process.
    Elsewhere(FarMemory<'a>),
}

/// A VM's memory, as a sharing engine in another process sees it.
pub(super) struct FarMemory<'a> {
    /// The VM, among those whose memory the engine maps.
    pub(super) vm: (&'a Arc<Vms>, VmIndex),
    /// The engine's process serves disks.
    pub(super) has_cache: bool,
    /// The guest addresses of RAM.
    pub(super) slots: &'a [MemorySlot],
}

impl<'a> Sharer<'a> {
    fn here(&self) -> Option<&SharedMemory<'a>> {
        match self {
            Self::Here(memory) => Some(memory),
            Self::None | Self::Elsewhere(_) => None,
        }
    }

    /// Returns the engine of another process whose cache a disk can use, and the first image of the disk's chain that the
    /// cache may hold blocks of: no worker can change it, or what it is.
    fn far(&self, disk: &DiskSpec) -> Option<(&FarMemory<'a>, usize)> {
        match self {
            Self::Elsewhere(memory) if memory.has_cache => Some((memory, first_cached_layer(disk)?)),
            _ => None,
        }
    }

    /// Returns the policy that a disk gets.
    fn possible(&self, disk: &DiskSpec) -> CachePolicy {
        let wanted = disk.cache();
        match self {
            Self::None if keep(wanted).is_some() => CachePolicy::Buffered,
            // The page cache would hold the blocks of each guest a second time.
            Self::Elsewhere(_) if keep(wanted).is_some() && self.far(disk).is_none() => CachePolicy::None,
            _ => wanted,
        }
    }
}

/// Returns the first image of a disk's chain that a block cache in another process can hold blocks of, if there is one: a
/// read-only disk, or the base that the description of an overlay names.
pub fn first_cached_layer(disk: &DiskSpec) -> Option<usize> {
    if disk.readonly { Some(0) } else { disk.backing.as_ref().map(|_| 1) }
}

/// The device through which a guest notifies the engine that it has published page types.
pub(super) enum HoleDevice {
    /// A doorbell at this address.
    Doorbell(u64, Doorbell),
    /// A port, through which the types themselves come too. It comes after the disks.
    Port(Console),
}

/// All devices of a VM, by their addresses.
pub(super) struct Devices {
    ports: Bus,
    mmio: Bus,
    serial: Arc<Mutex<Serial>>,
    serial_stats: Arc<SerialStats>,
    keyboard: Arc<Mutex<I8042>>,
    power: Arc<Mutex<Power>>,
    disks: Vec<Disk>,
    networks: Vec<Network>,
    vsock: Option<Arc<VsockStats>>,
    rng: Option<Arc<RngStats>>,
    balloon: Option<Arc<BalloonControl>>,
    new_files: Mutex<NewFiles>,
}

/// Images that were created for a VM. Dropping this value removes them, so a VM that cannot be built leaves none.
#[derive(Default)]
struct NewFiles(Vec<NewFile>);

impl Drop for NewFiles {
    fn drop(&mut self) {
        self.0.iter().for_each(NewFile::remove);
    }
}

impl Devices {
    /// Lets images that were created stay, because the VM has been built. To be called before its guest runs.
    pub(super) fn keep_new_files(&self) {
        self.new_files.lock().0.clear();
    }

    /// Makes the devices and connects them to KVM's interrupt lines and write notifications. They stop when
    /// the flag beside the memory says that a part of the memory was lost. Pages
    /// that the guest gives back are freed by whoever comes after the flag, if the VM has a balloon.
    pub(super) fn new(
        kvm: &Arc<VmFd>,
        (memory, lost, given): (&GuestMemory, Arc<AtomicBool>, Option<Arc<dyn FreePages>>),
        console: Box<dyn Write + Send>,
        spec: &VmSpec,
        sharer: &Sharer<'_>,
        hole: Option<HoleDevice>,
        mut detours: Vec<(String, Box<dyn Detour>)>,
    ) -> Result<Self, VmError> {
        let interrupt = new_event()?;
        wire_interrupt(kvm, &interrupt, SERIAL_IRQ)?;
        let serial = Serial::new(interrupt, console);
        let serial_stats = serial.stats().clone();
        let serial = Arc::new(Mutex::new(serial));
        let interrupt = new_event()?;
        wire_interrupt(kvm, &interrupt, KEYBOARD_IRQ)?;
        let keyboard = Arc::new(Mutex::new(I8042::new(interrupt)));

        let mut ports = Bus::default();
        ports.insert(SERIAL_PORT.into(), serial::PORTS.into(), serial.clone());
        ports.insert(i8042::BASE_PORT.into(), i8042::PORTS.into(), keyboard.clone());
        let power = Arc::new(Mutex::new(Power::default()));
        ports.insert(POWER_PORT.into(), power::PORTS.into(), power.clone());

        let mut mmio = Bus::default();
        let port = match hole {
            Some(HoleDevice::Doorbell(address, doorbell)) => {
                mmio.insert(address, DOORBELL_BYTES, Arc::new(Mutex::new(doorbell)));
                None
            }
            Some(HoleDevice::Port(console)) => Some(console),
            None => None,
        };
        let mut places = Places::new(kvm, memory, lost, mmio, spec.bus);
        let mut attached = Vec::with_capacity(spec.disks.len());
        let mut new_files = NewFiles::default();
        for disk in &spec.disks {
            let id = disk.id(attached.len()).into_owned();
            let policy = sharer.possible(disk);
            let config = BlockConfig {
                vm: spec.name.clone(),
                id: id.clone(),
                queues: disk.queues(),
                disk: DiskOptions {
                    path: disk.path.clone(),
                    read_only: disk.readonly,
                    format: disk.format(),
                    policy,
                    engine: Engine::Auto,
                    backing: disk.backing.clone(),
                    create: disk.create.then(|| NewImage {
                        size: disk.size.map(|size| size.0),
                        backing_format: disk.backing_format,
                    }),
                },
            };
            let failed =
                |source: Box<dyn std::error::Error + Send + Sync>| VmError::Disk { id: id.clone(), source };
            // Other VMs also read the part of a qcow2 image that comes from a backing image.
            let alone = !disk.readonly && disk.format() != Some(Format::Qcow2);
            let readers = if alone { Readers::One } else { Readers::Many };
            let number = attached.len();
            let is_cached = keep(policy).is_some();
            let here = sharer.here().filter(|_| is_cached).map(|SharedMemory { blocks, slots, .. }| {
                let (blocks, memory) = (blocks.clone(), memory.clone());
                let blocks = DiskBlocks::new(blocks, policy, readers, number, memory, slots.to_vec());
                CacheAccess::Here(Arc::new(blocks))
            });
            let far = sharer.far(disk).filter(|_| is_cached).map(|(FarMemory { vm, slots, .. }, layer)| {
                let (vm, memory) = ((Arc::clone(vm.0), vm.1), memory.clone());
                let blocks = FarBlocks::new(vm, (number, layer), policy, memory, slots.to_vec());
                CacheAccess::Far(Arc::new(blocks))
            });
            let blocks = here.or(far);
            let cache = blocks.clone().map(|blocks| match blocks {
                CacheAccess::Here(blocks) => blocks as Arc<dyn BlockCache>,
                CacheAccess::Far(blocks) => blocks.cache(),
            });
            let mut block = Block::open(&config, cache).map_err(|source| failed(source.into()))?;
            new_files.0.extend(block.new_file().cloned());
            if let Some(SharedMemory { hints, slots, .. }) = sharer.here() {
                block.set_read_observer(Arc::new(DiskHints::new(hints.clone(), slots.to_vec())));
            }
            block.limiter().set(disk.limits);
            let notices =
                block.notices().iter().cloned().chain(sharer.without_cache(&id, disk.cache(), policy));
            attached.push(Disk {
                id: id.clone(),
                stats: block.stats(),
                limiter: block.limiter(),
                size: block.size(),
                notices: notices.collect(),
                policy,
                blocks,
            });
            places.attach(block, |source| failed(source.into()))?;
        }
        if let Some(console) = port {
            places.attach(console, VmError::Port)?;
        }
        let mut networks = Vec::with_capacity(spec.networks.len());
        for (number, described) in spec.networks.iter().enumerate() {
            let (device, network) = network::open(&spec.name, number, described)?;
            if let Some(at) = detours.iter().position(|(id, _)| *id == network.id) {
                device.set_detour(detours.swap_remove(at).1);
            }
            let what = "a network device";
            places.attach(device, |source| VmError::Device { what, source })?;
            networks.push(network);
        }
        let mut vsock = None;
        if let Some(described) = &spec.vsock {
            let device = Vsock::new(&spec.name, described.cid(), &described.uds).map_err(VmError::Vsock)?;
            vsock = Some(device.stats());
            places.attach(device, |source| VmError::Device { what: "the socket device", source })?;
        }
        let mut rng = None;
        if spec.rng.enabled {
            let device = Rng::new(&spec.name, spec.rng.limits);
            rng = Some(device.stats());
            places.attach(device, |source| VmError::Device { what: "the entropy device", source })?;
        }
        let mut balloon = None;
        if let Some((described, pages)) = spec.balloon().zip(given) {
            let device = Balloon::new(&spec.name, balloon_config(described), pages);
            balloon = Some(device.control());
            places.attach(device, |source| VmError::Device { what: "the memory balloon", source })?;
        }
        let mmio = places.into_bus(&mut ports);
        let disks = attached;
        let new_files = Mutex::new(new_files);
        Ok(Self {
            ports,
            mmio,
            serial,
            serial_stats,
            keyboard,
            power,
            disks,
            networks,
            vsock,
            rng,
            balloon,
            new_files,
        })
    }

    pub(super) fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port.into(), data);
    }

    pub(super) fn port_write(&self, port: u16, data: &[u8]) {
        self.ports.write(port.into(), data);
    }

    pub(super) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }

    pub(super) fn mmio_write(&self, address: u64, data: &[u8]) {
        self.mmio.write(address, data);
    }

    /// Returns how the VM ends because of writes to `port`: the keyboard controller's reset command, or soft off. Each
    /// vCPU that asks gets the answer, so none goes on in a guest that another one has ended.
    pub(super) fn requested_end(&self, port: u16) -> Option<VmEnd> {
        let controller = i8042::BASE_PORT..i8042::BASE_PORT + i8042::PORTS;
        let management = POWER_PORT..POWER_PORT + power::PORTS;
        if controller.contains(&port) && self.keyboard.lock().wants_reset() {
            Some(VmEnd::Reset)
        } else if management.contains(&port) && self.power.lock().is_off() {
            Some(VmEnd::PowerOff)
        } else {
            None
        }
    }

    /// Notes for the guest that the power button was pressed. The caller raises the interrupt.
    pub(super) fn press_power_button(&self) {
        self.power.lock().press_button();
    }

    /// Whether the guest has ever read that the power button was pressed.
    pub(super) fn has_read_of_button(&self) -> bool {
        self.power.lock().has_read_of_button()
    }

    /// Notes for the guest that the VM generation ID is another one. The caller raises the interrupt.
    pub(super) fn tell_new_generation(&self) {
        self.power.lock().tell_new_generation();
    }

    pub(super) fn keyboard_in_use(&self) -> bool {
        self.keyboard.lock().in_use()
    }

    pub(super) fn press_ctrl_alt_del(&self) -> bool {
        self.keyboard.lock().press_ctrl_alt_del()
    }

    pub(super) fn serial_input(&self, data: &[u8]) -> usize {
        self.serial.lock().input(data)
    }

    pub(super) fn set_serial_room_event(&self, event: EventFd) {
        self.serial.lock().set_room_event(event);
    }

    pub(super) fn serial_stats(&self) -> &Arc<SerialStats> {
        &self.serial_stats
    }

    pub(super) fn disks(&self) -> &[Disk] {
        &self.disks
    }

    pub(super) fn networks(&self) -> &[Network] {
        &self.networks
    }

    pub(super) fn vsock_stats(&self) -> Option<&Arc<VsockStats>> {
        self.vsock.as_ref()
    }

    pub(super) fn rng_stats(&self) -> Option<&Arc<RngStats>> {
        self.rng.as_ref()
    }

    pub(super) fn balloon(&self) -> Option<&Arc<BalloonControl>> {
        self.balloon.as_ref()
    }
}

fn balloon_config(described: &BalloonSpec) -> BalloonConfig {
    BalloonConfig {
        // The description has made sure that it is not more than the VM's memory.
        target: u32::try_from(described.size.0 / FRAME_BYTES).unwrap_or(u32::MAX),
        deflate_on_oom: described.deflate_on_oom,
        reporting: described.reporting,
        hinting: described.hinting,
        stats_interval: described.stats_interval,
    }
}

impl Sharer<'_> {
    /// Returns a remark for the user on a disk that gets another policy than the one that is wanted.
    fn without_cache(&self, id: &str, wanted: CachePolicy, policy: CachePolicy) -> Option<String> {
        let (reason, effect) = match self {
            _ if policy == wanted => return None,
            Sharer::Elsewhere(FarMemory { has_cache: true, .. }) => (
                "the block cache, which VMs in worker processes (--vms-per-worker) have for read-only disks and for the \
                 bases of overlays (backing=) alone",
                "every read goes to the disk",
            ),
            Sharer::Elsewhere(_) => (
                "the block cache, which is out of reach of VMs in worker processes (--vms-per-worker)",
                "every read goes to the disk",
            ),
            _ => ("the sharing engine, which does not run", "the kernel's page cache is used"),
        };
        Some(format!("disk {id}: the cache policy {wanted} needs {reason}: {effect}"))
    }
}

pub(super) fn new_event() -> Result<EventFd, VmError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(VmError::Event)
}

pub(super) fn wire_interrupt(kvm: &VmFd, event: &EventFd, irq: u32) -> Result<(), VmError> {
    kvm.register_irqfd(event, irq).map_err(VmError::kvm("connect an interrupt line"))
}
