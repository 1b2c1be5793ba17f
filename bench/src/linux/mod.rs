//! Linux guests that boot and work, from a kernel, an initial RAM file system and a disk that
//! `cargo xtask artifacts` builds.

pub(crate) mod lookahead;
pub(crate) mod requests;
mod series;
pub(crate) mod types;

use std::path::PathBuf;
use std::process::Command;

use clap::Args;
use samepage_resources::guest_kernel::COMMAND_LINE;

/// Number of guests in each run.
const VMS: usize = 2;
/// Memory of each guest, in MiB.
const GUEST_MIB: u32 = 64;

/// The files of a Linux guest. `cargo xtask bench` provides all of them.
#[derive(Args, Clone, Debug)]
pub(crate) struct LinuxGuest {
    /// The guests' kernel, an ELF image with a PVH entry point
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,

    /// The guests' initial RAM file system, with samepage's agent as init
    #[arg(long, value_name = "FILE")]
    initrd: PathBuf,

    /// An image with the files that the guests read
    #[arg(long, value_name = "FILE")]
    disk: PathBuf,
}

impl LinuxGuest {
    /// Adds arguments to a command of samepage: run [`VMS`] guests that do this work and end, with this limit of CPU
    /// time for sharing in percent of a core, and print statistics.
    fn run(&self, command: &mut Command, work: &str, cpu: f64) {
        command.arg("run").arg("--kernel").arg(&self.kernel).arg("--initrd").arg(&self.initrd);
        command.args(["--cmdline", &format!("{COMMAND_LINE} agent={work}"), "--console", "stdio"]);
        command.args(["--memory", &format!("{GUEST_MIB}M"), "--count", &VMS.to_string()]);
        command.args(["--sharing-cpu", &cpu.to_string(), "--stats", "-"]);
    }
}
