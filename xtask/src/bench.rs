//! Builds and runs the benchmarks and the programs they need: `samepage bench` from a working copy.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::artifacts::Artifacts;
use crate::{process, setup};

/// The program whose presence shows that QEMU is installed.
const QEMU: &str = "qemu-system-x86_64";

/// Runs a benchmark. The first argument is its name.
///
/// # Errors
/// Fails if the benchmark fails, or if a program that it needs is missing or does not build.
pub fn run(arguments: &[OsString]) -> Result<()> {
    let name = arguments.first().and_then(|name| name.to_str()).unwrap_or_default();
    if name == "startup" && !process::succeeds(Command::new(QEMU).arg("--version")) {
        setup::install_packages(&["qemu-system-x86"])?;
    }
    let mut command = Command::new(build()?);
    command.args(arguments);
    let is_help = arguments.iter().any(|argument| argument == "--help" || argument == "-h");
    if ["lookahead", "types", "requests"].contains(&name) && !is_help {
        let Artifacts { kernel, initramfs, disk } = Artifacts::build()?;
        command.arg("--kernel").arg(kernel).arg("--initrd").arg(initramfs).arg("--disk").arg(disk);
    }
    if name == "unpack" && !is_help {
        command.arg("--kernel").arg(Artifacts::build()?.kernel);
    }
    process::run(&mut command)
}

/// Builds samepage and its benchmarks with the release profile. Returns the path of the benchmarks.
fn build() -> Result<PathBuf> {
    let build = ["build", "--release", "--package", "samepage", "--package", "samepage-bench", "--bins"];
    let messages = process::build(&build)?;
    match process::executable(&messages, "samepage-bench") {
        Some(path) => Ok(path),
        None => bail!("cargo {} built no program; run it by hand to see why", build.join(" ")),
    }
}
