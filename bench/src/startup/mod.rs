//! `samepage bench startup`: measures the time until a guest's first output, and a VM's memory in addition to
//! its own. Compares them with QEMU's microvm with the same guests, alternately.

pub(crate) mod guest;
mod measure;
mod report;
mod rounds;
mod smaps;

use anyhow::Result;
use clap::Args;
use samepage_machine::Hypervisor;

use super::monitor::Samepage;
use super::program;
pub(crate) use report::StartupReport;

/// The arguments of `samepage bench startup`.
#[derive(Args, Debug)]
pub(crate) struct StartupArgs {
    /// Starts of each monitor and guest
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,

    /// Numbers of VMs for the measurement of memory
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_value = "1,2,16,64",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) vms: Vec<u32>,

    /// Rounds of 32 VMs that start, share and end, before the remaining memory is measured
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,

    /// How samepage attaches its virtio devices, of which each VM has one: on a PCI bus, or without
    #[arg(long, value_name = "BUS", default_value = "mmio", value_parser = ["mmio", "pci"])]
    pub(crate) bus: String,

    /// Print the results as JSON, and nothing else
    #[arg(long)]
    pub(crate) json: bool,
}

/// Measures start-up times, then memory.
///
/// # Errors
/// Fails without KVM or QEMU, and if a monitor does not start its guest.
pub(super) fn measure(args: &StartupArgs) -> Result<StartupReport> {
    Hypervisor::open()?;
    let samepage = Samepage { program: program::path()?, bus: args.bus.clone() };
    measure::startup(args, &samepage, &guest::Files::write()?)
}
