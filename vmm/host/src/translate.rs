//! From what clients say of a VM to what machines are made from, and back.

use samepage_api_types::disk_spec::{CacheSpec, DiskSpec, FormatSpec, LimitsSpec};
use samepage_api_types::spec::{HoleSpec, HugePagesSpec, SharingMode, Size, VmSpec};
use samepage_devices::disk::limit::RateLimits;
use samepage_devices::disk::{CachePolicy, Format};
use samepage_machine::boot::{BootError, ImageError, ImageSource};
use samepage_machine::config::{ConfigError, ConsoleConfig, DiskConfig, MemoryHole, VmConfig};
use samepage_machine::huge_pages::HugePages;
use samepage_sharing::engine::Mode;
use samepage_sharing::service::Participation;
use samepage_text::names::NameError;

/// What has the same meaning for clients and for machines.
pub trait Translate<To> {
    /// The same in the other's words.
    fn translate(self) -> To;
}

/// A description that a VM can be made from.
pub trait ToConfig {
    /// The configuration of the VM, before it is said which engine shares its memory.
    fn to_config(&self) -> VmConfig;
}

impl ToConfig for VmSpec {
    fn to_config(&self) -> VmConfig {
        VmConfig {
            initrd: self.initrd.clone().map(ImageSource::Path),
            cmdline: self.cmdline.clone(),
            memory_bytes: self.memory.0,
            hugepages: self.hugepages.translate(),
            disks: self.disks.iter().enumerate().map(|(number, disk)| disk_config(disk, number)).collect(),
            console: self.console.file.clone().map_or(ConsoleConfig::Off, ConsoleConfig::File),
            participation: Participation {
                group: self.sharing.group.clone(),
                mode: self.sharing.mode.translate(),
            },
            memory_hole: self.memory_hole.translate(),
            ..VmConfig::new(self.name.clone(), ImageSource::Path(self.kernel.clone()))
        }
    }
}

/// The disk's configuration, where it is a VM's disk of this number.
fn disk_config(spec: &DiskSpec, number: usize) -> DiskConfig {
    let defaults = DiskConfig::default();
    DiskConfig {
        path: spec.path.clone(),
        read_only: spec.readonly,
        id: spec.id.clone().unwrap_or_else(|| format!("disk{number}")),
        format: spec.format.map(Translate::translate),
        cache: spec.cache.map_or(defaults.cache, Translate::translate),
        limits: spec.limits.translate(),
        queues: spec.queues.unwrap_or(defaults.queues),
    }
}

impl Translate<RateLimits> for LimitsSpec {
    fn translate(self) -> RateLimits {
        let limits = self;
        RateLimits { bytes: limits.rate.map(|size| size.0), operations: limits.iops }
    }
}

impl Translate<LimitsSpec> for RateLimits {
    fn translate(self) -> LimitsSpec {
        let limits = self;
        LimitsSpec { rate: limits.bytes.map(Size), iops: limits.operations }
    }
}

/// Says for each name of ours which of the machine's it is, and back.
macro_rules! same_names {
    ($ours:ident, $theirs:ident: $($name:ident),+) => {
        impl Translate<$theirs> for $ours {
            fn translate(self) -> $theirs {
                match self { $($ours::$name => $theirs::$name),+ }
            }
        }

        impl Translate<$ours> for $theirs {
            fn translate(self) -> $ours {
                match self { $($theirs::$name => $ours::$name),+ }
            }
        }
    };
}

same_names!(FormatSpec, Format: Raw, Qcow2);
same_names!(CacheSpec, CachePolicy: Exclusive, Scrub, Inclusive, None, Buffered);
same_names!(SharingMode, Mode: Full, Zero, Off);
same_names!(HugePagesSpec, HugePages: Off, Thp);
same_names!(HoleSpec, MemoryHole: Off, On, Port);

/// Where in a VM's description a value is that cannot be, as a JSON pointer.
#[must_use]
pub fn place(error: &ConfigError) -> Option<&'static str> {
    Some(match error {
        ConfigError::Name(NameError::Vm(_)) | ConfigError::DuplicateName(_) => "/name",
        ConfigError::Memory { .. } => "/memory",
        ConfigError::Name(NameError::Group(_)) => "/sharing/group",
        ConfigError::Name(NameError::Disk(_))
        | ConfigError::TooManyDisks(_)
        | ConfigError::TooManyDisksForPort(_)
        | ConfigError::DuplicateDiskId(_) => "/disks",
        ConfigError::Boot(BootError::Kernel {
            source: ImageError::CommandLineCharacter(_) | ImageError::CommandLineTooLong { .. },
            ..
        }) => "/cmdline",
        ConfigError::Boot(BootError::Kernel { .. }) => "/kernel",
        ConfigError::Boot(BootError::Initrd { .. }) => "/initrd",
    })
}

#[cfg(test)]
mod tests {
    use samepage_api_types::{disk_spec, spec};
    use samepage_devices::virtio::block::MAX_QUEUES;
    use samepage_machine::x86::layout::{MAX_RAM, MIN_RAM};
    use samepage_sharing::PAGE_SIZE;
    use samepage_sharing::service::DEFAULT_GROUP;

    use super::*;

    fn parse(json: &str) -> Result<VmSpec, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn clients_are_told_the_bounds_of_machines() {
        assert_eq!((spec::MIN_RAM, spec::MAX_RAM, spec::PAGE_SIZE), (MIN_RAM, MAX_RAM, PAGE_SIZE));
        assert_eq!((spec::DEFAULT_GROUP, disk_spec::MAX_QUEUES), (DEFAULT_GROUP, MAX_QUEUES));
    }

    #[test]
    fn a_name_and_a_kernel_are_enough() {
        let spec = parse(r#"{"name": "web", "kernel": "/k"}"#).unwrap();
        assert_eq!(spec, VmSpec::new("web", "/k"));
        let config = spec.to_config();
        assert_eq!((config.memory_bytes, config.participation), (256 << 20, Participation::default()));
        assert_eq!(config.memory_hole, MemoryHole::On);
        for (value, written, hole) in [
            ("true", "true", MemoryHole::On),
            ("\"on\"", "true", MemoryHole::On),
            ("false", "false", MemoryHole::Off),
            ("\"off\"", "false", MemoryHole::Off),
            ("\"port\"", "\"port\"", MemoryHole::Port),
        ] {
            let spec =
                parse(&format!(r#"{{"name": "web", "kernel": "/k", "memory_hole": {value}}}"#)).unwrap();
            assert_eq!(spec.to_config().memory_hole, hole);
            assert_eq!(serde_json::to_string(&spec.memory_hole).unwrap(), written);
        }
        for wrong in ["1", "null", "\"\"", "\"Port\"", "[]"] {
            let text = format!(r#"{{"name": "web", "kernel": "/k", "memory_hole": {wrong}}}"#);
            assert!(parse(&text).is_err(), "{wrong}");
        }
    }

    #[test]
    fn disks_are_numbered_where_they_have_no_names() {
        let json =
            r#"{"name":"a","kernel":"k","disks":[{"path":"x"},{"path":"y","id":"root","readonly":true}]}"#;
        let disks = parse(json).unwrap().to_config().disks;
        assert_eq!((disks[0].id.as_str(), disks[1].id.as_str()), ("disk0", "root"));
        assert!(!disks[0].read_only && disks[1].read_only);
    }

    #[test]
    fn a_disk_says_what_it_is_to_be_and_what_is_left_out_is_as_by_default() {
        let json = r#"{"path": "x", "cache": "none", "limits": {"rate": "1M", "iops": 10}, "queues": 4}"#;
        let config = disk_config(&serde_json::from_str(json).unwrap(), 2);
        assert_eq!((config.id.as_str(), config.cache, config.queues), ("disk2", CachePolicy::None, 4));
        assert_eq!(config.limits, RateLimits { bytes: Some(1 << 20), operations: Some(10) });
        let plain = disk_config(&DiskSpec { path: "x".into(), ..DiskSpec::default() }, 0);
        let expected = DiskConfig { path: "x".into(), id: "disk0".into(), ..DiskConfig::default() };
        assert_eq!(plain, expected);
    }
}
