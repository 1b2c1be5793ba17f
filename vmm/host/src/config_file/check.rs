//! What is wrong with the VMs of a file, each by itself and all together.

use super::{Loading, Place, Planned};
use crate::conflicts::{self, Part, Uses};
use crate::translate;
use crate::translate::ToConfig;
use samepage_api_types::spec::VmSpec;
use samepage_machine::boot::BootError;
use samepage_machine::config::ConfigError;
use samepage_text::names::NameError;

impl Loading {
    /// Checks the VMs.
    pub(super) fn check(&mut self) {
        let planned = std::mem::take(&mut self.vms);
        let mut uses = Vec::with_capacity(planned.len());
        for vm in &planned {
            let config = vm.spec.to_config();
            for (pointer, reason) in vm.spec.faults() {
                self.vm_mistake(vm, &pointer, format!("VM {}: {reason}", vm.spec.name));
            }
            for error in config.faults() {
                // What is not there has been told.
                let told = match &error {
                    ConfigError::Name(NameError::Vm(_)) => vm.unnamed,
                    ConfigError::Boot(BootError::Kernel { .. }) => vm.without_kernel,
                    _ => false,
                };
                let text = match error {
                    ConfigError::Name(NameError::Vm(_)) => error.to_string(),
                    _ => format!("VM {}: {error}", vm.spec.name),
                };
                if !told {
                    self.vm_mistake(vm, &place(&error, &vm.spec), text);
                }
            }
            uses.push(Uses::of(&config));
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
        self.vms = planned;
    }

    /// Notes what is wrong with a VM, at a place in its description.
    fn vm_mistake(&mut self, vm: &Planned, pointer: &str, text: String) {
        let place = self.entries[vm.entry].place_of(pointer);
        self.mistake(&place, Some(&vm.spec.name), text);
    }
}

/// Where in a VM's description the cause of an error is, as a JSON pointer.
fn place(error: &ConfigError, spec: &VmSpec) -> String {
    match error {
        ConfigError::Name(NameError::Disk(id)) | ConfigError::DuplicateDiskId(id) => {
            let disk = spec.disks.iter().rposition(|disk| disk.id.as_ref() == Some(id));
            disk.map_or_else(|| "/disks".to_owned(), |number| format!("/disks/{number}/id"))
        }
        _ => translate::place(error).unwrap_or_default().to_owned(),
    }
}

/// An entry for VMs, and where its fields come from.
#[derive(Debug)]
pub(super) struct EntryPlaces {
    /// The entry itself.
    pub(super) entry: Place,
    /// Each field that it or its defaults have.
    pub(super) fields: Vec<(&'static str, Place)>,
    /// The places of its disks in the list of the file.
    pub(super) disks: Vec<usize>,
}

impl EntryPlaces {
    /// Where a part of a VM's description comes from.
    fn place_of(&self, pointer: &str) -> Place {
        let mut parts = pointer.split('/').skip(1);
        let field = parts.next().unwrap_or_default();
        let Some((_, (source, place))) = self.fields.iter().find(|(name, _)| *name == field) else {
            return self.entry.clone();
        };
        let mut place = place.clone();
        for (depth, part) in parts.enumerate() {
            // Disks that are wrong in their form are not among the VM's.
            let number = part.parse::<usize>().ok().filter(|_| field == "disks" && depth == 0);
            let part =
                number.and_then(|number| self.disks.get(number)).map_or(part.to_owned(), usize::to_string);
            place = format!("{place}/{part}");
        }
        (*source, place)
    }
}
