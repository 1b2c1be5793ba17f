//! Validates the VMs of a file, each alone and all together.

use super::{Loading, Place, Planned};
use crate::conflicts::{self, Part};
use crate::error::HostError;
use crate::validated::{self, Validated};
use samepage_api_types::spec::VmSpec;
use samepage_machine::boot::BootError;
use samepage_machine::config::ConfigError;
use samepage_text::names::NameError;

impl Loading {
    /// Validates the VMs, and returns those without faults.
    pub(super) fn check(&mut self) -> Vec<Validated> {
        let planned = std::mem::take(&mut self.vms);
        let mut uses = Vec::with_capacity(planned.len());
        let mut validated = Vec::with_capacity(planned.len());
        for vm in &planned {
            match Validated::of(vm.spec.clone(), None) {
                Ok(vm) => {
                    uses.push(vm.uses());
                    validated.push(vm);
                }
                Err(invalid) => {
                    invalid.faults.iter().for_each(|fault| self.fault(vm, fault));
                    uses.push(invalid.uses);
                }
            }
        }
        for conflict in conflicts::conflicts(&uses) {
            let pointer = match conflict.part {
                Part::Name => "/name".to_owned(),
                Part::Disk(number) => format!("/disks/{number}/path"),
                Part::Console => "/console/file".to_owned(),
            };
            let hint = conflict.error.hint_of_templates().unwrap_or_default();
            self.vm_mistake(&planned[conflict.vm], &pointer, format!("{}{hint}", conflict.error));
        }
        validated
    }

    fn fault(&mut self, vm: &Planned, fault: &HostError) {
        match fault {
            HostError::Spec { place, .. } => self.vm_mistake(vm, place, fault.to_string()),
            // The missing name has already been reported.
            HostError::Config { source: ConfigError::Name(NameError::Vm(_)), .. } if vm.is_unnamed => {}
            HostError::Config { source: ConfigError::Boot(BootError::Kernel { .. }), .. }
                if vm.has_no_kernel => {}
            HostError::Config { source, .. } => {
                let text = match source {
                    ConfigError::Name(NameError::Vm(_)) => source.to_string(),
                    _ => fault.to_string(),
                };
                self.vm_mistake(vm, &place(source, &vm.spec), text);
            }
            _ => self.vm_mistake(vm, "", fault.to_string()),
        }
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
