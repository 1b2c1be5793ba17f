//! The description of a VM.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cpu::{self, one_vcpu};
#[cfg(feature = "schema")]
use crate::size::schema::memory as memory_schema;
use crate::{
    BalloonSpec, CloudInitSpec, Cpu, DiskSpec, HugePages, MemoryHole, NetworkSpec, RngSpec, SharingMode,
    Size, VirtioBus, VsockSpec,
};

/// The group of VMs whose descriptions name none.
pub const DEFAULT_GROUP: &str = "default";
/// Bounds of a VM's memory in bytes, which is a multiple of [`PAGE_SIZE`].
pub const MIN_RAM: u64 = 2 << 20;
/// The upper bound.
pub const MAX_RAM: u64 = (1 << 43) - (4 << 30);
/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;
/// The default command line of the kernel.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 reboot=k panic=-1";

fn default_command_line() -> String {
    DEFAULT_COMMAND_LINE.to_owned()
}

/// The weight of a VM against others when memory is short: 1 to 10,000, by default 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct MemoryWeight(u32);

impl Default for MemoryWeight {
    fn default() -> Self {
        Self(100)
    }
}

impl TryFrom<u32> for MemoryWeight {
    type Error = String;

    fn try_from(weight: u32) -> Result<Self, String> {
        if (1..=10_000).contains(&weight) {
            Ok(Self(weight))
        } else {
            Err(format!("the weight for memory is {weight}; use 1 to 10000"))
        }
    }
}

impl From<MemoryWeight> for u32 {
    fn from(weight: MemoryWeight) -> Self {
        weight.0
    }
}

/// The description of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The name, unique in the process: letters, digits, `.`, `_` and `-`.
    #[cfg_attr(
        feature = "schema",
        schema(
            pattern = "^(\\.*[A-Za-z0-9_-][A-Za-z0-9._-]*|\\.{3,})$",
            min_length = 1,
            max_length = 64,
            example = "web-0"
        )
    )]
    pub name: String,
    /// The kernel: a vmlinux (x86-64 ELF, with or without PVH entry) or a bzImage. Relative paths begin at the
    /// working directory of the process.
    #[cfg_attr(feature = "schema", schema(value_type = String, min_length = 1, example = "/srv/vmlinux"))]
    pub kernel: PathBuf,
    /// The initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line. Parameters for the disks and the memory hole are appended, and the whole line
    /// must not exceed the kernel's limit.
    #[serde(default = "default_command_line")]
    #[cfg_attr(
        feature = "schema",
        schema(default = json!(DEFAULT_COMMAND_LINE), pattern = "^[\\t -~]*$", max_length = 2047)
    )]
    pub cmdline: String,
    /// The size of the memory.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(schema_with = memory_schema))]
    pub memory: Size,
    /// The number of vCPUs.
    #[serde(default = "one_vcpu")]
    #[cfg_attr(feature = "schema", schema(minimum = 1, maximum = 254, default = 1))]
    pub vcpus: u32,
    /// Whether the guest sees each two vCPUs as the threads of one core, rather than each as a core.
    #[serde(default)]
    pub smt: bool,
    /// The processor features that the guest is told of. Clones, and guests that move between unlike hosts, need a
    /// profile that all these hosts have.
    #[serde(default)]
    pub cpu: Cpu,
    /// The size of the pages that back the memory.
    #[serde(default)]
    pub hugepages: HugePages,
    /// The host's NUMA node whose memory the VM prefers. By default the kernel chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(maximum = 1023))]
    pub host_numa_node: Option<u32>,
    /// The weight of the VM against others when memory is short and VMs take turns.
    #[serde(default)]
    #[cfg_attr(
        feature = "schema",
        schema(value_type = u32, minimum = 1, maximum = 10000, default = 100)
    )]
    pub memory_weight: MemoryWeight,
    /// How virtio devices are attached.
    #[serde(default)]
    pub bus: VirtioBus,
    /// The disks, in the order in which the guest finds them. Up to 8, or 24 on PCI.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schema(max_items = 24))]
    pub disks: Vec<DiskSpec>,
    /// What cloud-init in the guest is told, on a disk after the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInitSpec>,
    /// The network devices, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schema(max_items = 4))]
    pub networks: Vec<NetworkSpec>,
    /// The device over which programs of guest and host talk without a network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockSpec>,
    /// The device with random bytes of the host. By default a VM has one.
    #[serde(default)]
    pub rng: RngSpec,
    /// The device by which the guest gives memory back to the host. By default a VM has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonSpec>,
    /// Where the console goes, besides the backlog that clients read.
    #[serde(default)]
    pub console: ConsoleSpec,
    /// How the VM shares memory.
    #[serde(default)]
    pub sharing: SharingSpec,
    /// How an agent in the guest publishes what pages are used for. Without effect if the process shares no
    /// memory.
    #[serde(default)]
    pub memory_hole: MemoryHole,
    /// Whether the VM is started when it is created. By default, VMs of configuration files are started, and
    /// VMs that clients create are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<bool>,
}

/// Where a console goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ConsoleSpec {
    /// A file for a copy of the console. The file is created or truncated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub file: Option<PathBuf>,
}

/// How a VM shares memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SharingSpec {
    /// Which pages are shared.
    #[serde(default)]
    pub mode: SharingMode,
    /// The group of VMs with which it shares memory.
    #[serde(default = "default_group")]
    #[cfg_attr(
        feature = "schema",
        schema(
            pattern = "^(\\.*[A-Za-z0-9_-][A-Za-z0-9._-]*|\\.{3,})$", min_length = 1, max_length = 64,
            default = json!(DEFAULT_GROUP)
        )
    )]
    pub group: String,
}

fn default_group() -> String {
    DEFAULT_GROUP.to_owned()
}

impl Default for SharingSpec {
    fn default() -> Self {
        Self { mode: SharingMode::default(), group: default_group() }
    }
}

impl VmSpec {
    /// Returns a VM with this kernel, and with defaults for all else.
    pub fn new(name: impl Into<String>, kernel: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            kernel: kernel.into(),
            initrd: None,
            cmdline: default_command_line(),
            memory: Size::default(),
            vcpus: one_vcpu(),
            smt: false,
            cpu: Cpu::default(),
            hugepages: HugePages::default(),
            host_numa_node: None,
            memory_weight: MemoryWeight::default(),
            bus: VirtioBus::default(),
            disks: Vec::new(),
            cloud_init: None,
            networks: Vec::new(),
            vsock: None,
            rng: RngSpec::default(),
            balloon: None,
            console: ConsoleSpec::default(),
            sharing: SharingSpec::default(),
            memory_hole: MemoryHole::default(),
            start: None,
        }
    }

    /// Returns values that are out of range: their places as JSON pointers, and the reasons.
    #[must_use]
    pub fn faults(&self) -> Vec<(String, String)> {
        let processors = cpu::faults(self.vcpus, self.smt).into_iter();
        let processors = processors.map(|(field, reason)| (format!("/{field}"), reason));
        let disks = self.disks.iter().enumerate();
        let disks = disks.flat_map(|(number, disk)| {
            let at = move |(field, reason)| (format!("/disks/{number}/{field}"), reason);
            disk.faults().into_iter().map(at)
        });
        let at_rng = |(field, reason)| (format!("/rng/{field}"), reason);
        let networks = self.networks.iter().enumerate().flat_map(|(number, network)| {
            let at = move |(field, reason)| (format!("/networks/{number}/{field}"), reason);
            network.faults().into_iter().map(at)
        });
        let at_balloon = |(field, reason)| (format!("/balloon/{field}"), reason);
        let balloon = self.balloon.iter().flat_map(|balloon| balloon.faults(self.memory)).map(at_balloon);
        let at_vsock = |(field, reason)| (format!("/vsock/{field}"), reason);
        processors
            .chain(disks)
            .chain(networks)
            .chain(self.vsock.iter().flat_map(VsockSpec::faults).map(at_vsock))
            .chain(self.rng.limits.faults().into_iter().map(at_rng))
            .chain(balloon)
            .collect()
    }

    /// Returns the memory balloon, if the VM has one.
    #[must_use]
    pub fn balloon(&self) -> Option<&BalloonSpec> {
        self.balloon.as_ref().filter(|balloon| balloon.enabled)
    }

    /// Makes all paths absolute, from the working directory of this process.
    ///
    /// # Errors
    /// Fails if the working directory no longer exists.
    pub fn make_absolute(&mut self) -> io::Result<()> {
        let disks = self.disks.iter_mut().flat_map(|disk| [Some(&mut disk.path), disk.backing.as_mut()]);
        let disks = disks.flatten();
        let images = self.initrd.iter_mut().chain(self.console.file.iter_mut()).chain([&mut self.kernel]);
        let seed = self.cloud_init.iter_mut().flat_map(CloudInitSpec::paths);
        let socket = self.vsock.iter_mut().map(|vsock| &mut vsock.uds);
        for path in images.chain(disks).chain(seed).chain(socket) {
            *path = std::path::absolute(&path)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<VmSpec, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_are_numbers_or_text() {
        let memory = |value: &str| parse(&format!(r#"{{"name":"a","kernel":"k","memory":{value}}}"#));
        assert_eq!(memory("4096").unwrap().memory, Size(4096));
        assert_eq!(memory("\"1G\"").unwrap().memory, Size(1 << 30));
        for wrong in ["-1", "1.5", "\"1X\"", "null", "[]", "true", "99999999999999999999999"] {
            assert!(memory(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn all_paths_become_absolute() {
        let json = r#"{"name":"a","kernel":"k","initrd":"i","console":{"file":"c"},"vsock":{"uds":"v"},
                       "disks":[{"path":"d","backing":"b"}]}"#;
        let mut spec = parse(json).unwrap();
        spec.make_absolute().unwrap();
        let VmSpec { kernel, initrd, console, vsock, disks, .. } = spec;
        let optional = [initrd, console.file, vsock.map(|vsock| vsock.uds), disks[0].backing.clone()];
        let paths = optional.into_iter().flatten().chain([kernel, disks[0].path.clone()]);
        assert_eq!(paths.filter(|path| path.is_absolute()).count(), 6);
    }

    #[test]
    fn unknown_and_double_fields_are_refused() {
        assert!(parse(r#"{"name":"a","kernel":"k","cpus":2}"#).unwrap_err().contains("unknown field"));
        assert!(parse(r#"{"name":"a","name":"b","kernel":"k"}"#).unwrap_err().contains("duplicate"));
        let disk = r#"{"name":"a","kernel":"k","disks":[{"path":"d","rw":true}]}"#;
        assert!(parse(disk).unwrap_err().contains("unknown field `rw`"));
    }
}
