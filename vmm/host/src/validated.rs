//! The validation of a VM's description.
//!
//! Descriptions come from the command line, from JSON and from files. Each is validated once, and only a
//! [`Validated`] one can be added to the registry.

use samepage_machine::boot::{BootError, ImageError};
use samepage_machine::config::{ConfigError, ConsoleConfig, Validated, VmConfig};
use samepage_spec::VmSpec;
use samepage_text::names::NameError;

use crate::conflicts::Uses;
use crate::error::HostError;

/// A description with faults.
#[derive(Debug)]
pub struct Invalid {
    /// The VM's name.
    pub name: String,
    /// The files that the VM would use.
    pub uses: Uses,
    /// The faults, at least one.
    pub faults: Vec<ConfigError>,
}

/// Validates a description. The console goes where `console` says, or where the description says.
///
/// # Errors
/// Fails with all faults of the description.
pub fn validate(spec: VmSpec, console: Option<ConsoleConfig>) -> Result<Validated, Box<Invalid>> {
    let mut config = VmConfig::from(spec);
    config.console = console.unwrap_or(config.console);
    let (name, uses) = (config.spec.name.clone(), Uses::of(&config));
    config.validate().map_err(|faults| Box::new(Invalid { name, uses, faults }))
}

impl From<Box<Invalid>> for HostError {
    /// The first fault.
    fn from(invalid: Box<Invalid>) -> Self {
        let Invalid { name, faults, .. } = *invalid;
        let nothing = || ConfigError::Value { place: String::new(), reason: "it has a fault".to_owned() };
        Self::Config { vm: name, source: faults.into_iter().next().unwrap_or_else(nothing) }
    }
}

/// Where in a VM's description a value is that cannot be, as a JSON pointer.
#[must_use]
pub fn place(error: &ConfigError) -> Option<&str> {
    Some(match error {
        ConfigError::Value { place, .. } => place,
        ConfigError::Name(NameError::Vm(_)) | ConfigError::DuplicateName(_) => "/name",
        ConfigError::Memory { .. } => "/memory",
        ConfigError::Name(NameError::Group(_)) => "/sharing/group",
        ConfigError::Name(NameError::Disk(_))
        | ConfigError::TooManyDisks { .. }
        | ConfigError::DuplicateDiskId(_) => "/disks",
        ConfigError::CloudInit(_) => "/cloud_init",
        ConfigError::Name(NameError::Network(_))
        | ConfigError::TooManyNetworks(_)
        | ConfigError::DuplicateNetworkId(_) => "/networks",
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
    use samepage_devices::virtio::block::MAX_QUEUES;
    use samepage_machine::MemoryHole;
    use samepage_machine::x86::layout::{MAX_RAM, MIN_RAM};
    use samepage_sharing::PAGE_SIZE;
    use samepage_spec::SharingSpec;

    use super::*;

    fn parse(json: &str) -> Result<VmSpec, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn clients_are_told_the_bounds_of_machines() {
        assert_eq!(
            (samepage_spec::MIN_RAM, samepage_spec::MAX_RAM, samepage_spec::PAGE_SIZE),
            (MIN_RAM, MAX_RAM, PAGE_SIZE)
        );
        assert_eq!(samepage_spec::MAX_QUEUES, MAX_QUEUES);
    }

    #[test]
    fn a_name_and_a_kernel_are_enough() {
        let spec = parse(r#"{"name": "web", "kernel": "/k"}"#).unwrap();
        assert_eq!(spec, VmSpec::new("web", "/k"));
        assert_eq!((spec.memory.0, spec.sharing), (256 << 20, SharingSpec::default()));
        assert_eq!(spec.memory_hole, MemoryHole::On);
        for (value, written, hole) in [
            ("true", "true", MemoryHole::On),
            ("\"on\"", "true", MemoryHole::On),
            ("false", "false", MemoryHole::Off),
            ("\"off\"", "false", MemoryHole::Off),
            ("\"port\"", "\"port\"", MemoryHole::Port),
        ] {
            let spec =
                parse(&format!(r#"{{"name": "web", "kernel": "/k", "memory_hole": {value}}}"#)).unwrap();
            assert_eq!(spec.memory_hole, hole);
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
        let disks = parse(json).unwrap().disks;
        assert_eq!((disks[0].id(0).as_ref(), disks[1].id(1).as_ref()), ("disk0", "root"));
        assert!(!disks[0].readonly && disks[1].readonly);
    }
}
