//! From what went wrong to what clients are told.

use crate::problem::Refusal;
use samepage_api_types::problem::Kind;
use samepage_host::fleet::FleetError;
use samepage_host::manager::ManagerError;
use samepage_host::translate::place;
use samepage_machine::boot::BootError;
use samepage_machine::config::ConfigError;
use samepage_machine::vm::VmError;

impl From<ManagerError> for Refusal {
    fn from(error: ManagerError) -> Self {
        let text = error.to_string();
        match error {
            ManagerError::NoSuchVm(_) => {
                Refusal::new(Kind::NoSuchVm, text).help("GET /vms lists those there are")
            }
            ManagerError::Illegal { state, .. } => {
                let actions: Vec<_> = state.actions().map(samepage_api_types::lifecycle::Action::name).collect();
                let help = format!("what is {} can be asked to {}", state.name(), actions.join(", "));
                Refusal::new(Kind::IllegalTransition, text).help(help)
            }
            ManagerError::EndedMeanwhile { .. } => {
                Refusal::new(Kind::IllegalTransition, text).help("ask it to start")
            }
            ManagerError::Fleet(error) => explain_fleet(&error, text),
            ManagerError::Spec { place, .. } => Refusal::new(Kind::InvalidConfiguration, text).at(place),
            ManagerError::Overcommitted(_) => Refusal::new(Kind::Overcommitted, text),
            ManagerError::NotSharing(..) => Refusal::new(Kind::NotSharing, text)
                .help("the process was told to share none (run --sharing off, serve --no-sharing), or its host cannot, which it said when it was started"),
            ManagerError::NotListening(_) => {
                Refusal::new(Kind::NotListening, text).help("use its console, or kill it")
            }
            ManagerError::Closing => Refusal::new(Kind::Unavailable, text),
        }
    }
}

fn explain_fleet(error: &FleetError, text: String) -> Refusal {
    match error {
        FleetError::Config { source: ConfigError::DuplicateName(_), .. } => {
            Refusal::new(Kind::DuplicateName, text)
                .at("/name")
                .help("give it another name, or delete the other")
        }
        FleetError::Config { source, .. } => {
            Refusal::new(Kind::InvalidConfiguration, text).at(place(source).unwrap_or_default())
        }
        FleetError::Disk { .. } => Refusal::new(Kind::InvalidConfiguration, text).at("/disks"),
        FleetError::SharedDisk { .. } => Refusal::new(Kind::InUse, text).at("/disks"),
        FleetError::SharedConsole { .. } => Refusal::new(Kind::InUse, text).at("/console/file"),
        FleetError::ConsoleFolder { .. } => {
            Refusal::new(Kind::InvalidConfiguration, text).at("/console/file")
        }
        FleetError::Build { source, .. } => match source {
            VmError::Config(source) => {
                Refusal::new(Kind::InvalidConfiguration, text).at(place(source).unwrap_or_default())
            }
            VmError::Boot(BootError::Kernel { .. }) => {
                Refusal::new(Kind::InvalidConfiguration, text).at("/kernel")
            }
            VmError::Boot(BootError::Initrd { .. }) => {
                Refusal::new(Kind::InvalidConfiguration, text).at("/initrd")
            }
            VmError::Disk { .. } => Refusal::new(Kind::InvalidConfiguration, text).at("/disks"),
            VmError::Console { .. } => Refusal::new(Kind::InvalidConfiguration, text).at("/console/file"),
            // The host is out of something.
            _ => Refusal::new(Kind::Unavailable, text),
        },
        FleetError::Watch(_) => Refusal::new(Kind::Unavailable, text),
    }
}
