//! Maps errors of the registry to the problems that clients get.

use crate::problem::Refusal;
use samepage_api_types::problem::Kind;
use samepage_host::error::HostError;
use samepage_host::validated::place;
use samepage_machine::boot::BootError;
use samepage_machine::config::ConfigError;
use samepage_machine::vm::VmError;
use samepage_worker::pool::BuildError;

impl From<HostError> for Refusal {
    fn from(error: HostError) -> Self {
        let text = error.to_string();
        match error {
            HostError::NoSuchVm(_) => {
                Refusal::new(Kind::NoSuchVm, text).help("GET /vms lists the VMs")
            }
            HostError::Illegal { state, .. } => {
                let actions: Vec<_> = state.actions().map(|action| format!("`{}`", action.name())).collect();
                let help = format!("possible actions are {}", actions.join(", "));
                Refusal::new(Kind::IllegalTransition, text).help(help)
            }
            HostError::EndedMeanwhile { .. } => {
                Refusal::new(Kind::IllegalTransition, text).help("use `start` to boot the VM again")
            }
            HostError::Config { source: ConfigError::DuplicateName(_), .. } => {
                Refusal::new(Kind::DuplicateName, text)
                    .at("/name")
                    .help("give the VM another name, or delete the other VM")
            }
            HostError::Config { source, .. } | HostError::Build { source: VmError::Config(source), .. } => {
                Refusal::new(Kind::InvalidConfiguration, text).at(place(&source).unwrap_or_default())
            }
            HostError::Disk { .. } | HostError::ImageFolder { .. } => Refusal::new(Kind::InvalidConfiguration, text).at("/disks"),
            HostError::SharedDisk { .. } => Refusal::new(Kind::InUse, text).at("/disks"),
            HostError::SharedTap { .. } | HostError::SharedPort { .. } => Refusal::new(Kind::InUse, text).at("/networks"),
            HostError::SharedSocket { .. } => Refusal::new(Kind::InUse, text).at("/vsock/uds"),
            HostError::SharedConsole { .. } => Refusal::new(Kind::InUse, text).at("/console/file"),
            HostError::ConsoleFolder { .. } => {
                Refusal::new(Kind::InvalidConfiguration, text).at("/console/file")
            }
            HostError::Build { source, .. } => built(&source, text),
            HostError::Worker { source: BuildError::Refused(_), .. } => Refusal::new(Kind::InvalidConfiguration, text),
            HostError::Worker { .. } => Refusal::new(Kind::Unavailable, text),
            HostError::Watch(_) => Refusal::new(Kind::Unavailable, text),
            HostError::Overcommitted(_) => Refusal::new(Kind::Overcommitted, text),
            HostError::NotSharing(..) => Refusal::new(Kind::NotSharing, text)
                .help("start the process without --sharing off or --no-sharing; if the host cannot share memory, the process says so when it starts"),
            HostError::NotListening(_) => {
                Refusal::new(Kind::NotListening, text).help("use the console of the VM, or `kill`")
            }
            HostError::Closing => Refusal::new(Kind::Unavailable, text),
        }
    }
}

fn built(error: &VmError, text: String) -> Refusal {
    let at = match error {
        VmError::Boot(BootError::Kernel { .. }) => "/kernel",
        VmError::Boot(BootError::Initrd { .. }) => "/initrd",
        VmError::Disk { .. } => "/disks",
        VmError::Network { .. } => "/networks",
        VmError::Vsock(_) => "/vsock/uds",
        VmError::Console { .. } => "/console/file",
        VmError::Cpuid(_) => "/cpu",
        VmError::Vcpus { .. } => "/vcpus",
        // The host lacks a resource.
        _ => return Refusal::new(Kind::Unavailable, text),
    };
    Refusal::new(Kind::InvalidConfiguration, text).at(at)
}
