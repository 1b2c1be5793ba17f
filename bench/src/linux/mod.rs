//! Linux guests that boot and work, from a kernel, an initial RAM file system and a disk that
//! `cargo xtask artifacts` builds.

pub(crate) mod lookahead;
pub(crate) mod types;

use std::path::PathBuf;
use std::process::Command;

use clap::Args;
use samepage_resources::guest_kernel::COMMAND_LINE;

/// What a Linux guest boots from. `cargo xtask bench` gives all of it.
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
    /// Has a command of samepage run so many of them, which do this work and end, and tell its statistics.
    fn run(&self, command: &mut Command, vms: usize, mib: u32, work: &str, cpu: f64) {
        command.arg("run").arg("--kernel").arg(&self.kernel).arg("--initrd").arg(&self.initrd);
        command.args(["--cmdline", &format!("{COMMAND_LINE} agent={work}"), "--console", "stdio"]);
        command.args(["--memory", &format!("{mib}M"), "--count", &vms.to_string()]);
        command.args(["--sharing-cpu", &cpu.to_string(), "--stats", "-"]);
    }
}
