//! The configuration of a VM, and its validation.

use std::collections::HashSet;
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use samepage_devices::disk::limit::RateLimits;
use samepage_devices::disk::{CachePolicy, Format};
use samepage_hole::PARAMETER;
use samepage_hole::port::PARAMETER_VALUE;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::engine::Mode;
use samepage_sharing::service::{Participation, Sharing};
pub use samepage_spec::{HugePages, MemoryHole};
use samepage_text::names::{NameError, check_disk_id, check_group, check_name};
use thiserror::Error;

use crate::boot::{BootError, ImageSource, load};
use crate::vm::devices::{MAX_DISKS, mmio_parameters};
use crate::x86::layout::{HoleRange, MAX_RAM, MIN_RAM};

/// A virtual disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// An image file or a block device.
    pub path: PathBuf,
    /// Whether the disk is read-only.
    pub read_only: bool,
    /// The name of the disk within the VM, which the guest sees as the serial number.
    pub id: String,
    /// The format of the image. `None` detects the format, and refuses the image if that is unsafe.
    pub format: Option<Format>,
    /// Which of its blocks the host keeps in memory, and where.
    pub cache: CachePolicy,
    /// Limits per second.
    pub limits: RateLimits,
    /// The number of queues that the device offers.
    pub queues: usize,
}

impl Default for DiskConfig {
    /// Returns a writable disk with one queue, no limits and the default policy. It still needs a path and a
    /// name.
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            read_only: false,
            id: String::new(),
            format: None,
            cache: CachePolicy::default(),
            limits: RateLimits::default(),
            queues: 1,
        }
    }
}

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

/// The configuration of a VM.
#[derive(Debug)]
pub struct VmConfig {
    /// The name, unique in the process: letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// The kernel: vmlinux with or without a PVH note, or bzImage.
    pub kernel: ImageSource,
    /// The initial RAM disk.
    pub initrd: Option<ImageSource>,
    /// The kernel's command line. Parameters for the disks and the memory hole are appended.
    pub cmdline: String,
    /// Guest RAM in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// The size of the pages that back guest RAM.
    pub hugepages: HugePages,
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// The serial console.
    pub console: ConsoleConfig,
    /// The engine that shares the guest's memory, from before the start to the end. `None` for a VM that shares
    /// no memory.
    pub sharing: Option<Arc<Sharing>>,
    /// The group of VMs with which it shares memory, and which pages are shared.
    pub participation: Participation,
    /// How the guest publishes what its pages are used for. Without effect for a VM that shares no memory.
    pub memory_hole: MemoryHole,
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
    /// More disks than interrupt lines.
    #[error("{0} disks: a VM can have {MAX_DISKS} at most")]
    TooManyDisks(usize),
    /// More disks than interrupt lines, one of which is for the port of the memory hole.
    #[error(
        "{0} disks: a VM whose memory hole is a port can have {most} at most, since the port takes the place of \
         a disk; set the memory hole to on or off",
        most = MAX_DISKS - 1
    )]
    TooManyDisksForPort(usize),
    /// Two disks of a VM with one name.
    #[error("two disks are named {0}; give one of them another id=NAME")]
    DuplicateDiskId(String),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
}

impl VmConfig {
    /// Returns a VM with 256 MiB of memory, which it does not share, no disks and no console.
    pub fn new(name: impl Into<String>, kernel: ImageSource) -> Self {
        Self {
            name: name.into(),
            kernel,
            initrd: None,
            cmdline: String::new(),
            memory_bytes: 256 << 20,
            hugepages: HugePages::Off,
            disks: Vec::new(),
            console: ConsoleConfig::Off,
            sharing: None,
            participation: Participation::default(),
            memory_hole: MemoryHole::default(),
        }
    }

    /// Returns the place of the guest's memory hole, if it gets one.
    pub(crate) fn hole(&self) -> Option<HoleRange> {
        let mapped = self.memory_hole == MemoryHole::On && self.sharing.is_some();
        mapped.then(|| HoleRange::of(self.memory_bytes))
    }

    /// Whether the guest publishes page types through a port.
    pub(crate) fn has_port(&self) -> bool {
        self.memory_hole == MemoryHole::Port && self.sharing.is_some()
    }

    /// Returns the command line for the kernel: the configured one, with parameters for the disks and the
    /// memory hole before the arguments for init.
    pub fn kernel_command_line(&self) -> String {
        self.command_line(self.sharing.is_some())
    }

    /// Returns the same for a VM that shares memory, or does not.
    fn command_line(&self, is_shared: bool) -> String {
        let mut added = mmio_parameters(
            self.disks.len() + usize::from(is_shared && self.memory_hole == MemoryHole::Port),
        );
        match self.memory_hole {
            MemoryHole::On if is_shared => {
                let hole = HoleRange::of(self.memory_bytes);
                added.push_str(&format!(" {PARAMETER}={}@{:#x}", hole.bytes, hole.start));
            }
            MemoryHole::Port if is_shared => added.push_str(&format!(" {PARAMETER}={PARAMETER_VALUE}")),
            _ => {}
        }
        match self.cmdline.split_once(" -- ") {
            Some((kernel, init)) => format!("{kernel}{added} -- {init}"),
            None => format!("{}{added}", self.cmdline).trim_start().to_owned(),
        }
    }

    /// Validates the values, and that the images are sound and fit into the memory. Starts nothing. The command line
    /// has to leave room for the memory hole's parameter, whether the process shares memory or not.
    ///
    /// # Errors
    /// Fails with all faults of the configuration.
    pub fn validate(self) -> Result<Validated, Vec<ConfigError>> {
        let faults = self.faults();
        if faults.is_empty() { Ok(Validated(self)) } else { Err(faults) }
    }

    fn faults(&self) -> Vec<ConfigError> {
        let memory = check_memory(self.memory_bytes);
        // Whether images fit into memory that cannot be is no question.
        let room = if memory.is_ok() { self.memory_bytes } else { MAX_RAM };
        // A hole lies above memory, so there is none above memory that cannot be.
        let command_line = self.command_line(memory.is_ok());
        let name = check_name(&self.name).map_err(ConfigError::from);
        let group = check_group(&self.participation.group).map_err(ConfigError::from);
        let mut faults: Vec<_> = [name, memory, group].into_iter().filter_map(Result::err).collect();
        if self.disks.len() > MAX_DISKS {
            faults.push(ConfigError::TooManyDisks(self.disks.len()));
        } else if self.disks.len() == MAX_DISKS && self.memory_hole == MemoryHole::Port {
            faults.push(ConfigError::TooManyDisksForPort(self.disks.len()));
        }
        let mut ids = HashSet::new();
        for disk in &self.disks {
            faults.extend(check_disk_id(&disk.id).err().map(ConfigError::from));
            if !ids.insert(&disk.id) {
                faults.push(ConfigError::DuplicateDiskId(disk.id.clone()));
            }
        }
        let added = command_line.len().saturating_sub(self.cmdline.len());
        let images = load::faults(&self.kernel, self.initrd.as_ref(), &command_line, added, room);
        faults.extend(images.into_iter().map(ConfigError::Boot));
        faults
    }
}

/// A configuration without faults. Machines are built from nothing else.
#[derive(Debug)]
pub struct Validated(VmConfig);

impl Validated {
    /// Returns the configuration.
    pub fn config(&self) -> &VmConfig {
        &self.0
    }

    pub(crate) fn into_config(self) -> VmConfig {
        self.0
    }

    /// Has an engine share the VM's memory.
    pub fn share_with(&mut self, sharing: Option<Arc<Sharing>>) {
        self.0.sharing = sharing;
    }

    /// Changes which pages of the VM's memory are shared.
    pub fn set_mode(&mut self, mode: Mode) {
        self.0.participation.mode = mode;
    }

    /// Backs the VM's memory with small pages.
    pub fn use_small_pages(&mut self) {
        self.0.hugepages = HugePages::Off;
    }

    /// Sends a copy of the console's output to a writer that never waits.
    pub fn copy_console(&mut self, copy: Box<dyn Write + Send>) {
        let to = Box::new(std::mem::take(&mut self.0.console));
        self.0.console = ConsoleConfig::Copied { to, copy };
    }
}

impl TryFrom<VmConfig> for Validated {
    type Error = ConfigError;

    /// Fails with the first fault.
    fn try_from(config: VmConfig) -> Result<Self, ConfigError> {
        match config.faults().into_iter().next() {
            None => Ok(Self(config)),
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
    use samepage_text::names::MAX_DISK_ID;

    use super::*;
    use crate::boot::test_images::pvh_elf;

    fn config() -> VmConfig {
        VmConfig::new("vm", ImageSource::Bytes { name: "test image", bytes: pvh_elf(b"\xf4").into() })
    }

    fn disk(id: &str) -> DiskConfig {
        DiskConfig { path: "/nonexistent".into(), read_only: true, id: id.into(), ..DiskConfig::default() }
    }

    fn refused(change: impl FnOnce(&mut VmConfig)) -> String {
        Validated::try_from(config()).unwrap();
        let mut config = config();
        change(&mut config);
        Validated::try_from(config).unwrap_err().to_string()
    }

    #[test]
    fn values_out_of_range_are_refused() {
        assert!(refused(|c| c.name = "a/b".into()).contains("cannot be named"));
        assert!(refused(|c| c.name = String::new()).contains("cannot be named"));
        assert!(refused(|c| c.name = "..".into()).contains("cannot be named"));
        assert!(refused(|c| c.participation.group = "a b".into()).contains("a group of VMs"));
        assert!(refused(|c| c.memory_bytes = 0).contains("at least"));
        assert!(refused(|c| c.memory_bytes = (64 << 20) + 1).contains("multiple"));
        assert!(refused(|c| c.memory_bytes = 1 << 20).contains("2M"));
        assert!(refused(|c| c.memory_bytes = 1 << 60).contains("8T"));
        assert!(refused(|c| c.disks = vec![disk("a"), disk("a")]).contains("two disks"));
        assert!(refused(|c| c.disks = vec![disk(&"x".repeat(21))]).contains("1 to 20"));
        assert_eq!(MAX_DISK_ID, MAX_ID_LEN);
        assert!(refused(|c| c.disks = (0..9).map(|n| disk(&n.to_string())).collect()).contains("8 at most"));
        let disks = || (0..8).map(|n| disk(&n.to_string())).collect();
        let with_port = refused(|c| (c.disks, c.memory_hole) = (disks(), MemoryHole::Port));
        assert!(with_port.contains("7 at most"), "{with_port}");
        assert!(refused(|c| c.kernel = ImageSource::Path("/nonexistent".into())).contains("/nonexistent"));
    }

    #[test]
    fn the_memory_hole_is_announced_where_memory_is_shared() {
        let mut config = VmConfig { cmdline: "quiet -- single".into(), ..config() };
        assert_eq!((config.hole(), config.kernel_command_line().as_str()), (None, "quiet -- single"));
        // Hosts that cannot share memory have no hole to announce.
        config.sharing = Sharing::start(Settings::default()).ok().map(Arc::new);
        if config.sharing.is_some() {
            let line = config.kernel_command_line();
            let value =
                line.strip_prefix("quiet samepage.hole=").and_then(|rest| rest.strip_suffix(" -- single"));
            let hole = HoleRange::of(config.memory_bytes);
            assert_eq!(value.and_then(parse_parameter), Some((hole.bytes, hole.start)), "{line}");
        }
        config.memory_hole = MemoryHole::Port;
        if config.sharing.is_some() {
            config.disks = vec![disk("a")];
            let devices = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
            let line = format!("quiet {devices} samepage.hole=port -- single");
            assert_eq!((config.hole(), config.kernel_command_line()), (None, line));
            config.disks.clear();
        }
        config.memory_hole = MemoryHole::Off;
        assert_eq!(config.kernel_command_line(), "quiet -- single");
    }

    #[test]
    fn disks_are_announced_before_the_arguments_of_init() {
        let mut config = config();
        config.disks = vec![disk("a")];
        assert_eq!(config.kernel_command_line(), "virtio_mmio.device=4K@0xd0000000:5");
        config.cmdline = "quiet -- single".into();
        assert_eq!(config.kernel_command_line(), "quiet virtio_mmio.device=4K@0xd0000000:5 -- single");
    }
}
