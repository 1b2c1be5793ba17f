//! Validates the VMs of a file, each alone and all together.

use super::{Loading, Place, Planned};
use crate::conflicts::{self, Part, Uses};
use crate::error::HostError;
use crate::validated::{self, validate};
use samepage_machine::boot::BootError;
use samepage_machine::config::{ConfigError, Validated};
use samepage_spec::VmSpec;
use samepage_text::names::NameError;

impl Loading {
    /// Validates the VMs, and returns those without faults.
    pub(super) fn check(&mut self) -> Vec<Validated> {
        let planned = std::mem::take(&mut self.vms);
        let mut uses = Vec::with_capacity(planned.len());
        let mut validated = Vec::with_capacity(planned.len());
        for vm in &planned {
            match validate(vm.spec.clone(), None) {
                Ok(vm) => {
                    uses.push(Uses::of(vm.config()));
                    validated.push(vm);
                }
                Err(invalid) => {
                    uses.push(invalid.uses);
                    invalid.faults.into_iter().for_each(|fault| self.fault(vm, fault));
                }
            }
        }
        for conflict in conflicts::conflicts(&uses) {
            let pointer = match conflict.part {
                Part::Name => "/name".to_owned(),
                Part::Disk(number) => format!("/disks/{number}/path"),
                Part::Network(number) => format!("/networks/{number}"),
                Part::Vsock => "/vsock/uds".into(),
                Part::Console => "/console/file".to_owned(),
            };
            let hint = conflict.error.hint_of_templates().unwrap_or_default();
            self.vm_mistake(&planned[conflict.vm], &pointer, format!("{}{hint}", conflict.error));
        }
        validated
    }

    fn fault(&mut self, vm: &Planned, fault: ConfigError) {
        match fault {
            // The missing name has already been reported.
            ConfigError::Name(NameError::Vm(_)) if vm.is_unnamed => return,
            ConfigError::Boot(BootError::Kernel { .. }) if vm.has_no_kernel => return,
            _ => {}
        }
        let place = place(&fault, &vm.spec);
        let text = match fault {
            ConfigError::Name(NameError::Vm(_)) => fault.to_string(),
            source => HostError::Config { vm: vm.spec.name.clone(), source }.to_string(),
        };
        self.vm_mistake(vm, &place, text);
    }

    /// Records a mistake in a VM, at a place in its description.
    fn vm_mistake(&mut self, vm: &Planned, pointer: &str, text: String) {
        let place = self.entries[vm.entry].place_of(pointer);
        self.mistake(&place, Some(&vm.spec.name), text);
    }
}

/// Returns the place of an error's cause in a VM's description, as a JSON pointer.
fn place(error: &ConfigError, spec: &VmSpec) -> String {
    match error {
        ConfigError::Name(NameError::Disk(id)) | ConfigError::DuplicateDiskId(id) => {
            let disk = spec.disks.iter().rposition(|disk| disk.id.as_ref() == Some(id));
            disk.map_or_else(|| "/disks".to_owned(), |number| format!("/disks/{number}/id"))
        }
        _ => validated::place(error).unwrap_or_default().to_owned(),
    }
}

/// The places of an entry for VMs and of its fields.
#[derive(Debug)]
pub(super) struct EntryPlaces {
    /// The entry.
    pub(super) entry: Place,
    /// The fields of the entry and of its defaults.
    pub(super) fields: Vec<(&'static str, Place)>,
    /// The indexes of its disks in the list of the file.
    pub(super) disks: Vec<usize>,
}

impl EntryPlaces {
    /// Returns the place of a part of a VM's description.
    fn place_of(&self, pointer: &str) -> Place {
        let mut parts = pointer.split('/').skip(1);
        let field = parts.next().unwrap_or_default();
        let Some((_, (source, place))) = self.fields.iter().find(|(name, _)| *name == field) else {
            return self.entry.clone();
        };
        let mut place = place.clone();
        for (depth, part) in parts.enumerate() {
            // Disks with invalid syntax are not among the VM's disks.
            let number = part.parse::<usize>().ok().filter(|_| field == "disks" && depth == 0);
            let part =
                number.and_then(|number| self.disks.get(number)).map_or(part.to_owned(), usize::to_string);
            place = format!("{place}/{part}");
        }
        (*source, place)
    }
}
