//! The configuration of a VM, and its validation.

use std::collections::HashSet;
use std::fmt;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use samepage_devices::net::Detour;
use samepage_hole::PARAMETER;
use samepage_hole::port::PARAMETER_VALUE;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::engine::Mode;
use samepage_sharing::remote::serve::Vms;
use samepage_sharing::service::{Discarded, Sharing};
pub use samepage_spec::{
    BalloonSpec, DiskSpec, HugePages, MemoryHole, NetworkSpec, RngSpec, Size, VirtioBus, VmSpec, VsockSpec,
};
use samepage_text::names::{NameError, check_disk_id, check_group, check_name, check_network_id};
use thiserror::Error;

use crate::boot::{BootError, ImageSource, Unpacked, load};
use crate::numa;
use crate::seed::{self, SEED_ID, SeedError};
use crate::vm::devices::{MAX_DISKS, most_disks};
use crate::vm::network::MAX_NETWORKS;
use crate::vm::virtio::mmio_parameters;
use crate::x86::layout::{HoleRange, MAX_RAM, MIN_RAM};

/// The target of a guest's serial console.
#[derive(Default)]
pub enum ConsoleConfig {
    /// Standard output, byte by byte.
    Stdio,
    /// Standard output line by line, each line after the VM's name.
    PrefixedStdio,
    /// A file, which is created or truncated.
    File(PathBuf),
    /// Nowhere.
    #[default]
    Off,
    /// Another target, and a copy to a writer that never waits.
    Copied {
        /// The other target.
        to: Box<ConsoleConfig>,
        /// Gets each byte first.
        copy: Box<dyn Write + Send>,
    },
    /// Any other writer. The vCPU's thread waits for each write.
    Sink(Box<dyn Write + Send>),
}

impl fmt::Debug for ConsoleConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConsoleConfig::Stdio => f.write_str("Stdio"),
            ConsoleConfig::PrefixedStdio => f.write_str("PrefixedStdio"),
            ConsoleConfig::File(path) => f.debug_tuple("File").field(path).finish(),
            ConsoleConfig::Off => f.write_str("Off"),
            ConsoleConfig::Copied { to, .. } => f.debug_tuple("Copied").field(to).finish(),
            ConsoleConfig::Sink(_) => f.write_str("Sink"),
        }
    }
}

impl ConsoleConfig {
    /// Returns the file of the target, if it is a file.
    pub fn file(&self) -> Option<&Path> {
        match self {
            ConsoleConfig::File(path) => Some(path),
            ConsoleConfig::Copied { to, .. } => to.file(),
            _ => None,
        }
    }
}

/// The configuration of a VM: its description, and what no description can hold.
#[derive(Debug)]
pub struct VmConfig {
    /// The description.
    pub spec: VmSpec,
    /// A kernel that the program itself holds, instead of the file in the description.
    pub embedded_kernel: Option<ImageSource>,
    /// The serial console, instead of the file in the description.
    pub console: ConsoleConfig,
    /// The engine that shares the guest's memory, from before the start to the end. `None` for a VM that shares
    /// no memory.
    pub sharing: Option<Arc<Sharing>>,
    /// The engine of another process that shares the guest's memory. A VM has this or `sharing`, or neither.
    pub elsewhere: Option<Elsewhere>,
    /// Services of this process that the guest reaches by its network devices, each with the name of the device.
    pub detours: Vec<(String, Box<dyn Detour>)>,
}

/// The way to an engine in another process.
#[derive(Clone)]
pub struct Elsewhere {
    /// The memory that this process offers to that engine.
    pub vms: Arc<Vms>,
    /// Called when the guest has published what its pages are for.
    pub ring: Arc<dyn Fn() + Send + Sync>,
    /// The process of the engine serves disks from its block cache. It connects them before the guest runs.
    pub has_cache: bool,
    /// Frees pages that the guest gives back.
    pub pages: Arc<dyn PageOrders>,
}

/// The way to have an engine in another process free pages.
pub trait PageOrders: Send + Sync {
    /// Frees the first of these pages. Returns once that is done, or once it is certain that the engine does nothing
    /// more about them. The pages before the next one read as zeros, or as what the guest had in them.
    fn free(&self, pages: Range<u32>) -> Discarded;
}

impl fmt::Debug for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Elsewhere").field("vms", &self.vms).finish_non_exhaustive()
    }
}

/// A fault in a VM's configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The name of the VM, of the group or of a disk.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Two VMs with one name.
    #[error("two VMs are named {0}; names are unique in a process")]
    DuplicateName(String),
    /// The size of RAM.
    #[error("{bytes} bytes of memory: {reason}")]
    Memory {
        /// The configured size.
        bytes: u64,
        /// What the size must be.
        reason: &'static str,
    },
    /// More disks than a VM can have.
    #[error(
        "{count} disks: a VM can have {most} at most{hint}",
        hint = if *most == MAX_DISKS { ", or more with the bus pci" } else { "" }
    )]
    TooManyDisks {
        /// The number of disks.
        count: usize,
        /// The upper limit on the VM's bus.
        most: usize,
    },
    /// More network devices than a VM can have.
    #[error("{0} network devices: a VM can have {MAX_NETWORKS} at most")]
    TooManyNetworks(usize),
    /// Two network devices of a VM with one name.
    #[error("two network devices are named {0}; give one of them another id=NAME")]
    DuplicateNetworkId(String),
    /// A value that the schema of descriptions does not allow.
    #[error("{reason}")]
    Value {
        /// The place in the description, as a JSON pointer.
        place: String,
        /// The value and its fault.
        reason: String,
    },
    /// Two disks of a VM with one name.
    #[error("two disks are named {0}; give one of them another id=NAME")]
    DuplicateDiskId(String),
    /// The disk for cloud-init.
    #[error(transparent)]
    CloudInit(#[from] SeedError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
}

impl From<VmSpec> for VmConfig {
    /// Returns a VM that shares no memory, and whose console goes where the description says.
    fn from(spec: VmSpec) -> Self {
        let console = spec.console.file.clone().map_or(ConsoleConfig::Off, ConsoleConfig::File);
        Self { spec, embedded_kernel: None, console, sharing: None, elsewhere: None, detours: Vec::new() }
    }
}

impl VmConfig {
    /// Returns a VM with 256 MiB of memory, which it does not share, no virtio devices, no console and an empty
    /// command line.
    pub fn new(name: impl Into<String>, kernel: ImageSource) -> Self {
        let (path, embedded_kernel) = match kernel {
            ImageSource::Path(path) => (path, None),
            ImageSource::Bytes { name, .. } => (PathBuf::from(name), Some(kernel)),
        };
        let rng = RngSpec { enabled: false, ..RngSpec::default() };
        let spec = VmSpec { cmdline: String::new(), rng, ..VmSpec::new(name, path) };
        Self { embedded_kernel, ..Self::from(spec) }
    }

    /// Returns the kernel: vmlinux with or without a PVH note, or bzImage.
    pub(crate) fn kernel(&self) -> ImageSource {
        self.embedded_kernel.clone().unwrap_or_else(|| self.spec.kernel.clone().into())
    }

    /// Returns the initial RAM disk.
    pub(crate) fn initrd(&self) -> Option<ImageSource> {
        self.spec.initrd.clone().map(ImageSource::Path)
    }

    /// Whether an engine of this or of another process shares the guest's memory.
    pub(crate) fn is_shared(&self) -> bool {
        self.sharing.is_some() || self.elsewhere.is_some()
    }

    /// Returns the place of the guest's memory hole, if it gets one.
    pub(crate) fn hole(&self) -> Option<HoleRange> {
        let mapped = self.spec.memory_hole == MemoryHole::On && self.is_shared();
        mapped.then(|| HoleRange::of(self.spec.memory.0))
    }

    /// Whether the guest publishes page types through a port.
    pub(crate) fn has_port(&self) -> bool {
        self.spec.memory_hole == MemoryHole::Port && self.is_shared()
    }

    /// Returns the number of virtio-mmio devices of a VM that shares memory, or does not.
    pub(crate) fn mmio_device_count(&self, is_shared: bool) -> usize {
        if self.spec.bus == VirtioBus::Pci {
            return 0;
        }
        let VmSpec { networks, vsock, memory_hole, rng, .. } = &self.spec;
        let port = is_shared && *memory_hole == MemoryHole::Port;
        let others = [port, vsock.is_some(), rng.enabled, self.spec.balloon().is_some()].map(usize::from);
        self.disk_count() + networks.len() + others.iter().sum::<usize>()
    }

    /// Returns the number of disks, with that for cloud-init.
    fn disk_count(&self) -> usize {
        self.spec.disks.len() + usize::from(self.spec.cloud_init.is_some())
    }

    /// Returns the command line for the kernel: the configured one, with parameters for the disks and the
    /// memory hole before the arguments for init.
    pub fn kernel_command_line(&self) -> String {
        self.command_line(self.is_shared())
    }

    /// Returns the same for a VM that shares memory, or does not.
    fn command_line(&self, is_shared: bool) -> String {
        let VmSpec { cmdline, memory, memory_hole, .. } = &self.spec;
        let mut added = mmio_parameters(self.mmio_device_count(is_shared));
        match memory_hole {
            MemoryHole::On if is_shared => {
                let hole = HoleRange::of(memory.0);
                added.push_str(&format!(" {PARAMETER}={}@{:#x}", hole.bytes, hole.start));
            }
            MemoryHole::Port if is_shared => added.push_str(&format!(" {PARAMETER}={PARAMETER_VALUE}")),
            _ => {}
        }
        match cmdline.split_once(" -- ") {
            Some((kernel, init)) => format!("{kernel}{added} -- {init}"),
            None => format!("{cmdline}{added}").trim_start().to_owned(),
        }
    }

    /// Validates the values, and that the images are sound and fit into the memory. Starts nothing. The command line
    /// has to leave room for the memory hole's parameter, whether the process shares memory or not.
    ///
    /// # Errors
    /// Fails with all faults of the configuration.
    pub fn validate(self) -> Result<Validated, Vec<ConfigError>> {
        let (faults, unpacked) = self.check();
        if faults.is_empty() { Ok(Validated { config: self, unpacked }) } else { Err(faults) }
    }

    /// Returns all faults, and the kernel that was unpacked to find them.
    fn check(&self) -> (Vec<ConfigError>, Option<Unpacked>) {
        let VmSpec { name, cmdline, memory, disks, sharing, .. } = &self.spec;
        let checked = check_memory(memory.0);
        // Whether images fit into memory that cannot be is no question.
        let room = if checked.is_ok() { memory.0 } else { MAX_RAM };
        // A hole lies above memory, so there is none above memory that cannot be.
        let command_line = self.command_line(checked.is_ok());
        let name = check_name(name).map_err(ConfigError::from);
        let group = check_group(&sharing.group).map_err(ConfigError::from);
        let of_value = |(place, reason)| ConfigError::Value { place, reason };
        let mut faults: Vec<_> = self.spec.faults().into_iter().map(of_value).collect();
        faults.extend([name, checked, group].into_iter().filter_map(Result::err));
        let node = self.spec.host_numa_node.and_then(numa::unavailable);
        let place = || "/host_numa_node".to_owned();
        faults.extend(node.map(|reason| ConfigError::Value { place: place(), reason }));
        let (count, most) = (self.disk_count(), most_disks(self.spec.bus));
        if count > most {
            faults.push(ConfigError::TooManyDisks { count, most });
        }
        let mut ids = HashSet::new();
        if let Some(files) = &self.spec.cloud_init {
            ids.insert(SEED_ID.into());
            faults.extend(seed::check(files, &self.spec.name).err().map(ConfigError::from));
        }
        for (number, disk) in disks.iter().enumerate() {
            let id = disk.id(number);
            faults.extend(check_disk_id(&id).err().map(ConfigError::from));
            if ids.contains(&id) {
                faults.push(ConfigError::DuplicateDiskId(id.into_owned()));
            } else {
                ids.insert(id);
            }
        }
        if self.spec.networks.len() > MAX_NETWORKS {
            faults.push(ConfigError::TooManyNetworks(self.spec.networks.len()));
        }
        let mut ids = HashSet::new();
        for (number, network) in self.spec.networks.iter().enumerate() {
            let id = network.id(number);
            faults.extend(check_network_id(&id).err().map(ConfigError::from));
            if !ids.insert(id.clone()) {
                faults.push(ConfigError::DuplicateNetworkId(id.into_owned()));
            }
        }
        let added = command_line.len().saturating_sub(cmdline.len());
        let (kernel, initrd) = (self.kernel(), self.initrd());
        let images = load::check(&kernel, initrd.as_ref(), &command_line, added, room);
        faults.extend(images.faults.into_iter().map(ConfigError::Boot));
        (faults, images.unpacked)
    }
}

/// A configuration without faults. Validation is the only way to one, and machines are built from nothing else.
#[derive(Debug)]
pub struct Validated {
    config: VmConfig,
    /// Held until the machine is built, so that the kernel is unpacked once for all machines that are built together.
    unpacked: Option<Unpacked>,
}

impl Validated {
    /// Returns the configuration.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Returns the description.
    pub fn spec(&self) -> &VmSpec {
        &self.config.spec
    }

    /// Returns the description alone, for another process.
    pub fn into_spec(self) -> VmSpec {
        self.config.spec
    }

    /// Returns the configuration, and what makes loading its kernel cheap.
    pub(crate) fn into_parts(self) -> (VmConfig, Option<Unpacked>) {
        (self.config, self.unpacked)
    }

    /// Has an engine share the VM's memory.
    pub fn share_with(&mut self, sharing: Option<Arc<Sharing>>) {
        self.config.sharing = sharing;
    }

    /// Takes the target of the console out, which is off then.
    pub fn take_console(&mut self) -> ConsoleConfig {
        std::mem::take(&mut self.config.console)
    }

    /// Changes which pages of the VM's memory are shared.
    pub fn set_mode(&mut self, mode: Mode) {
        self.config.spec.sharing.mode = mode;
    }

    /// Backs the VM's memory with small pages, whatever its description said.
    pub fn use_small_pages(&mut self) {
        self.config.spec.hugepages = HugePages::Off;
    }

    /// Has services of this process answer the guest at network devices with these names.
    pub fn answer_at(&mut self, detours: Vec<(String, Box<dyn Detour>)>) {
        self.config.detours = detours;
    }

    /// Sends a copy of the console's output to a writer that never waits.
    pub fn copy_console(&mut self, copy: Box<dyn Write + Send>) {
        let to = Box::new(std::mem::take(&mut self.config.console));
        self.config.console = ConsoleConfig::Copied { to, copy };
    }
}

impl TryFrom<VmConfig> for Validated {
    type Error = ConfigError;

    /// Fails with the first fault.
    fn try_from(config: VmConfig) -> Result<Self, ConfigError> {
        let (faults, unpacked) = config.check();
        match faults.into_iter().next() {
            None => Ok(Self { config, unpacked }),
            Some(fault) => Err(fault),
        }
    }
}

/// Checks the size of a VM's memory, in bytes.
pub fn check_memory(bytes: u64) -> Result<(), ConfigError> {
    let reason = if !bytes.is_multiple_of(PAGE_SIZE as u64) {
        "it must be a multiple of the page size, 4096"
    } else if bytes < MIN_RAM {
        "a VM needs 2M at least; is a unit missing, as in 512M?"
    } else if bytes > MAX_RAM {
        "a VM can address less than 8T"
    } else {
        return Ok(());
    };
    Err(ConfigError::Memory { bytes, reason })
}

#[cfg(test)]
mod tests {
    use samepage_devices::virtio::block::MAX_ID_LEN;
    use samepage_hole::parse_parameter;
    use samepage_sharing::engine::Settings;
    use samepage_spec::RateLimits;
    use samepage_text::names::MAX_DISK_ID;

    use super::*;
    use crate::boot::test_images::pvh_elf;

    fn config() -> VmConfig {
        VmConfig::new("vm", ImageSource::Bytes { name: "test image", bytes: pvh_elf(b"\xf4").into() })
    }

    fn disk(id: &str) -> DiskSpec {
        DiskSpec { path: "/nonexistent".into(), readonly: true, id: Some(id.into()), ..DiskSpec::default() }
    }

    fn refused(change: impl FnOnce(&mut VmConfig)) -> String {
        Validated::try_from(config()).unwrap();
        let mut config = config();
        change(&mut config);
        Validated::try_from(config).unwrap_err().to_string()
    }

    #[test]
    fn values_out_of_range_are_refused() {
        assert!(refused(|c| c.spec.name = "a/b".into()).contains("cannot be named"));
        assert!(refused(|c| c.spec.name = String::new()).contains("cannot be named"));
        assert!(refused(|c| c.spec.name = "..".into()).contains("cannot be named"));
        assert!(refused(|c| c.spec.sharing.group = "a b".into()).contains("a group of VMs"));
        assert!(refused(|c| c.spec.memory = Size(0)).contains("at least"));
        assert!(refused(|c| c.spec.memory = Size((64 << 20) + 1)).contains("multiple"));
        assert!(refused(|c| c.spec.memory = Size(1 << 20)).contains("2M"));
        assert!(refused(|c| c.spec.memory = Size(1 << 60)).contains("8T"));
        assert!(refused(|c| c.spec.disks = vec![disk("a"), disk("a")]).contains("two disks"));
        assert!(refused(|c| c.spec.disks = vec![disk(&"x".repeat(21))]).contains("1 to 20"));
        // The bounds of the schema hold for machines as well, however their descriptions were made.
        let queues = |queues| vec![DiskSpec { queues: Some(queues), ..disk("a") }];
        assert!(refused(|c| c.spec.disks = queues(0)).contains("0 queues"));
        assert!(refused(|c| c.spec.disks = queues(17)).contains("17 queues"));
        let limits = RateLimits { rate: None, iops: Some(0) };
        let limited = vec![DiskSpec { limits, ..disk("a") }];
        assert!(refused(|c| c.spec.disks = limited).contains("lets nothing through"));
        assert_eq!(MAX_DISK_ID, MAX_ID_LEN);
        assert!(
            refused(|c| c.spec.disks = (0..9).map(|n| disk(&n.to_string())).collect()).contains("8 at most")
        );
        assert!(
            refused(|c| (c.spec.kernel, c.embedded_kernel) = ("/nonexistent".into(), None))
                .contains("/nonexistent")
        );
    }

    #[test]
    fn a_disk_for_cloud_init_is_one_of_the_disks() {
        let mut config = config();
        config.spec.cloud_init = Some(samepage_spec::CloudInitSpec::default());
        assert_eq!(config.kernel_command_line(), "virtio_mmio.device=4K@0xd0000000:5");
        let with_seed = |change: &dyn Fn(&mut VmConfig)| {
            refused(|config| {
                config.spec.cloud_init = Some(samepage_spec::CloudInitSpec::default());
                change(config);
            })
        };
        assert!(with_seed(&|c| c.spec.disks = vec![disk("cidata")]).contains("two disks are named cidata"));
        let most = |c: &mut VmConfig| c.spec.disks = (0..MAX_DISKS).map(|n| disk(&n.to_string())).collect();
        assert!(with_seed(&most).contains("at most"));
        let missing = samepage_spec::CloudInitSpec { user_data: Some("/none".into()), ..Default::default() };
        assert!(refused(|c| c.spec.cloud_init = Some(missing)).contains("user data for cloud-init, /none"));
    }

    #[test]
    fn the_memory_hole_is_announced_where_memory_is_shared() {
        let mut config = config();
        config.spec.cmdline = "quiet -- single".into();
        assert_eq!((config.hole(), config.kernel_command_line().as_str()), (None, "quiet -- single"));
        // Hosts that cannot share memory have no hole to announce.
        config.sharing = Sharing::start(Settings::default()).ok().map(Arc::new);
        if config.sharing.is_some() {
            let line = config.kernel_command_line();
            let value =
                line.strip_prefix("quiet samepage.hole=").and_then(|rest| rest.strip_suffix(" -- single"));
            let hole = HoleRange::of(config.spec.memory.0);
            assert_eq!(value.and_then(parse_parameter), Some((hole.bytes, hole.start)), "{line}");
        }
        config.spec.memory_hole = MemoryHole::Port;
        if config.sharing.is_some() {
            config.spec.disks = vec![disk("a")];
            let devices = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
            let line = format!("quiet {devices} samepage.hole=port -- single");
            assert_eq!((config.hole(), config.kernel_command_line()), (None, line));
            config.spec.disks.clear();
        }
        config.spec.memory_hole = MemoryHole::Off;
        assert_eq!(config.kernel_command_line(), "quiet -- single");
    }

    #[test]
    fn a_pci_bus_announces_itself_and_has_room_for_more_disks() {
        let mut config = config();
        config.spec.bus = VirtioBus::Pci;
        config.spec.disks = (0..24).map(|n| disk(&n.to_string())).collect();
        config.spec.cmdline = "quiet -- single".into();
        assert_eq!(config.kernel_command_line(), "quiet -- single");
        config.spec.disks.push(disk("more"));
        let refused = Validated::try_from(config).unwrap_err().to_string();
        assert!(refused.contains("24 at most"), "{refused}");
    }

    #[test]
    fn disks_are_announced_before_the_arguments_of_init() {
        let mut config = config();
        config.spec.disks = vec![disk("a")];
        assert_eq!(config.kernel_command_line(), "virtio_mmio.device=4K@0xd0000000:5");
        config.spec.cmdline = "quiet -- single".into();
        assert_eq!(config.kernel_command_line(), "quiet virtio_mmio.device=4K@0xd0000000:5 -- single");
    }
}
