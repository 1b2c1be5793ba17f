//! From the description of a VM to a validated configuration of its machine.
//!
//! Descriptions come from the command line, from JSON and from files. Each is validated once, and only a
//! [`Validated`] one can be added to the registry.

use samepage_api_types::disk_spec::DiskSpec;
use samepage_api_types::spec::VmSpec;
use samepage_machine::boot::{BootError, ImageError, ImageSource};
use samepage_machine::config::{self, ConfigError, ConsoleConfig, DiskConfig, VmConfig};
use samepage_sharing::service::Participation;
use samepage_text::names::NameError;

use crate::conflicts::Uses;
use crate::error::HostError;
use crate::limits;

/// A description without faults, and the configuration of its machine.
#[derive(Debug)]
pub struct Validated {
    spec: VmSpec,
    config: config::Validated,
}

/// A description with faults.
#[derive(Debug)]
pub struct Invalid {
    /// The description.
    pub spec: VmSpec,
    /// The files that the VM would use.
    pub uses: Uses,
    /// The faults, at least one: [`HostError::Spec`] and [`HostError::Config`].
    pub faults: Vec<HostError>,
}

impl Validated {
    /// Validates a description. The console goes where `console` says, or where the description says.
    ///
    /// # Errors
    /// Fails with the description and all its faults.
    pub fn of(spec: VmSpec, console: Option<ConsoleConfig>) -> Result<Self, Box<Invalid>> {
        let mut config = config_of(&spec);
        config.console = console.unwrap_or(config.console);
        let uses = Uses::of(&config);
        let vm = || spec.name.clone();
        let of_spec = |(place, reason)| HostError::Spec { vm: vm(), place, reason };
        let mut faults: Vec<_> = spec.faults().into_iter().map(of_spec).collect();
        match config.validate() {
            Ok(config) if faults.is_empty() => Ok(Self { spec, config }),
            validated => {
                let of_config = validated.err().unwrap_or_default();
                faults.extend(of_config.into_iter().map(|source| HostError::Config { vm: vm(), source }));
                Err(Box::new(Invalid { spec, uses, faults }))
            }
        }
    }

    /// The description.
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// Returns the description alone, for another process.
    pub fn into_spec(self) -> VmSpec {
        self.spec
    }

    /// Returns the files that the VM uses.
    pub fn uses(&self) -> Uses {
        Uses::of(self.config.config())
    }

    /// Backs the VM's memory with small pages, whatever its description said.
    pub fn use_small_pages(&mut self) {
        self.spec.hugepages = config::HugePages::Off;
        self.config.use_small_pages();
    }

    pub(crate) fn into_parts(self) -> (VmSpec, config::Validated) {
        (self.spec, self.config)
    }
}

impl From<Box<Invalid>> for HostError {
    /// The first fault.
    fn from(invalid: Box<Invalid>) -> Self {
        let Invalid { spec, faults, .. } = *invalid;
        let nothing =
            || Self::Spec { vm: spec.name, place: String::new(), reason: "it has a fault".to_owned() };
        faults.into_iter().next().unwrap_or_else(nothing)
    }
}

fn config_of(spec: &VmSpec) -> VmConfig {
    VmConfig {
        initrd: spec.initrd.clone().map(ImageSource::Path),
        cmdline: spec.cmdline.clone(),
        memory_bytes: spec.memory.0,
        hugepages: spec.hugepages,
        disks: spec.disks.iter().enumerate().map(|(number, disk)| disk_config(disk, number)).collect(),
        console: spec.console.file.clone().map_or(ConsoleConfig::Off, ConsoleConfig::File),
        participation: Participation { group: spec.sharing.group.clone(), mode: spec.sharing.mode },
        memory_hole: spec.memory_hole,
        ..VmConfig::new(spec.name.clone(), ImageSource::Path(spec.kernel.clone()))
    }
}

/// Returns the configuration of a VM's disk of this number, with defaults for what its description omits.
fn disk_config(spec: &DiskSpec, number: usize) -> DiskConfig {
    let defaults = DiskConfig::default();
    DiskConfig {
        path: spec.path.clone(),
        read_only: spec.readonly,
        id: spec.id.clone().unwrap_or_else(|| format!("disk{number}")),
        format: spec.format,
        cache: spec.cache.unwrap_or_default(),
        limits: limits::of_device(spec.limits),
        queues: spec.queues.unwrap_or(defaults.queues),
    }
}

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
    use samepage_devices::disk::CachePolicy;
    use samepage_devices::disk::limit::RateLimits;
    use samepage_devices::virtio::block::MAX_QUEUES;
    use samepage_machine::MemoryHole;
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
        let config = config_of(&spec);
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
            assert_eq!(config_of(&spec).memory_hole, hole);
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
        let disks = config_of(&parse(json).unwrap()).disks;
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
