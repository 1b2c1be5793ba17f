//! `samepage bench requests`: counts how often a guest leaves to its host, and is interrupted, for each request to a
//! disk and each frame of a network, over MMIO and over PCI.
//!
//! A Linux guest boots, reads a disk and receives a stream. Between its lines on the console, KVM counts what its vCPU
//! does. The guest's console is at ports of the machine, and virtio devices are not. So exits for ports are left out.

mod report;
mod run;

use anyhow::Result;
use clap::Args;
use samepage_machine::Hypervisor;

use super::LinuxGuest;
use crate::host::Host;
pub(crate) use report::RequestsReport;

/// The arguments of `samepage bench requests`.
#[derive(Args, Debug)]
pub(crate) struct RequestsArgs {
    #[command(flatten)]
    guest: LinuxGuest,

    /// Boots with each bus; medians are printed
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,

    /// Print the results as JSON, and nothing else
    #[arg(long)]
    pub(crate) json: bool,
}

/// Measures both buses alternately.
///
/// # Errors
/// Fails if a guest cannot be started or does not finish, and if this KVM does not count.
pub(crate) fn measure(args: &RequestsArgs) -> Result<RequestsReport> {
    let hypervisor = Hypervisor::open()?;
    let mut host = Host::look()?;
    let mut phases = Vec::new();
    for round in 0..args.runs {
        let mut buses = run::BUSES;
        if round % 2 == 1 {
            buses.reverse();
        }
        for bus in buses {
            phases.extend(run::run(&hypervisor, &args.guest, bus)?);
        }
    }
    host.look_again()?;
    RequestsReport::new(host, args.runs, &phases)
}
