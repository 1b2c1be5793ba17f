//! QEMU's leanest machine, beside which samepage is measured.

use std::path::Path;
use std::process::{Command, Stdio};

/// QEMU's program.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";
/// The machine: no firmware tables, no legacy devices but a serial port.
const MACHINE: [&str; 11] = [
    "-M",
    "microvm,pit=off,rtc=off,pic=off,acpi=off",
    "-accel",
    "kvm",
    "-cpu",
    "host,-arch-capabilities",
    "-nodefaults",
    "-nographic",
    "-serial",
    "stdio",
    "-no-reboot",
];

/// The command by which QEMU runs a guest with so much memory, in MiB.
pub(super) fn command(kernel: &Path, mib: u64, command_line: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(MACHINE).args(["-m", &format!("{mib}M"), "-kernel"]).arg(kernel);
    command.args(["-append", command_line]);
    command
}

/// What QEMU says of its version, in one line.
///
/// # Errors
/// Where it is not installed: what to do.
pub(super) fn version() -> Result<String, String> {
    let output = Command::new(PROGRAM).arg("--version").stdin(Stdio::null()).output();
    let output =
        output.map_err(|error| format!("{PROGRAM}: {error}; Debian's package is qemu-system-x86"))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}
