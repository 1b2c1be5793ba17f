//! The description of a VM, and its choices.
//!
//! Each is one type, which the command line, JSON and the machine have in common. The names of values are the
//! same everywhere. The engine and the device models use these types without clap and without the API's schema,
//! which are features.

mod balloon;
mod cloud_init;
mod cpu;
mod disk;
mod hole;
mod network;
mod publish;
mod rng;
mod size;
mod vm;
mod vsock;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use balloon::{BalloonSpec, MAX_STATS_INTERVAL};
pub use cloud_init::CloudInitSpec;
pub use cpu::{Cpu, MAX_VCPUS, THREADS_OF_A_CORE};
pub use disk::{DiskSpec, MAX_QUEUES, RateLimits};
pub use hole::MemoryHole;
pub use network::{Mac, NetworkSpec};
pub use publish::{HostPort, Publish};
pub use rng::RngSpec;
pub use size::Size;
#[cfg(feature = "schema")]
pub use size::schema::{
    optional_balloon as optional_balloon_schema, optional_memory as optional_memory_schema,
};
pub use vm::{
    ConsoleSpec, DEFAULT_COMMAND_LINE, DEFAULT_GROUP, MAX_RAM, MIN_RAM, MemoryWeight, PAGE_SIZE, SharingSpec,
    VmSpec,
};
pub use vsock::VsockSpec;

/// Which pages of a VM's memory are shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum SharingMode {
    /// All identical pages.
    #[default]
    #[cfg_attr(feature = "clap", value(alias = "on"))]
    Full,
    /// Pages of zeros alone, whose memory is freed. Nothing is shared with other VMs.
    Zero,
    /// None.
    Off,
}

/// The size of the pages that back a VM's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = HugePagesSpec))]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Pages of 4 KiB where memory is shared; otherwise what the host is set to.
    #[default]
    Off,
    /// Transparent huge pages of 2 MiB for hot memory, and pages of 4 KiB for cold, shared memory.
    Thp,
}

/// How a VM's virtio devices are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum VirtioBus {
    /// Each device has registers of its own, at an address that the kernel is told.
    #[default]
    Mmio,
    /// On a PCI bus, with message-signalled interrupts (MSI-X).
    Pci,
}

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = FormatSpec))]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The file holds the disk's bytes, and nothing else.
    Raw,
    /// QEMU's format of sparse images, snapshots and overlays.
    Qcow2,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(format!("unknown format {text:?}; use raw or qcow2")),
        }
    }
}

/// Which disk blocks the host keeps in its memory, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = CacheSpec))]
#[serde(rename_all = "lowercase")]
pub enum CachePolicy {
    /// The block cache keeps blocks that no guest holds.
    #[default]
    Exclusive,
    /// The block cache keeps blocks, except those that sharing finds in guests.
    Scrub,
    /// The block cache keeps blocks, whether guests hold them or not.
    Inclusive,
    /// The host keeps no blocks.
    None,
    /// The kernel's page cache keeps blocks.
    Buffered,
}

impl CachePolicy {
    /// All policies, by name.
    const NAMES: [(&'static str, Self); 5] = [
        ("exclusive", Self::Exclusive),
        ("scrub", Self::Scrub),
        ("inclusive", Self::Inclusive),
        ("none", Self::None),
        ("buffered", Self::Buffered),
    ];

    /// Whether the block cache keeps blocks of such a disk.
    #[must_use]
    pub fn wants_cache(self) -> bool {
        matches!(self, Self::Exclusive | Self::Scrub | Self::Inclusive)
    }
}

impl fmt::Display for CachePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, policy)| policy == self).map_or("", |(name, _)| name);
        f.write_str(name)
    }
}

impl FromStr for CachePolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let policy = Self::NAMES.iter().find(|(name, _)| *name == text).map(|&(_, policy)| policy);
        policy.ok_or_else(|| {
            format!("unknown cache policy {text:?}; use exclusive, scrub, inclusive, none or buffered")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_and_formats_have_the_same_names_as_typed_as_shown_and_in_json() {
        for (name, policy) in CachePolicy::NAMES {
            assert_eq!((name.parse(), policy.to_string().as_str()), (Ok(policy), name));
            assert_eq!(serde_json::to_value(policy).unwrap(), name);
        }
        for format in [Format::Raw, Format::Qcow2] {
            let name = serde_json::to_value(format).unwrap();
            assert_eq!(name.as_str().unwrap().parse(), Ok(format));
        }
        assert!("vmdk".parse::<Format>().is_err() && "writeback".parse::<CachePolicy>().is_err());
    }
}
