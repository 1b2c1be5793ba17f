//! QEMU's smallest machine, with which samepage is compared.

use std::path::Path;
use std::process::{Command, Stdio};

/// QEMU's program.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";
/// The machine: no firmware tables, and a serial port as the only legacy device.
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

/// Returns the command by which QEMU runs a guest with this memory in MiB.
pub(super) fn command(kernel: &Path, mib: u64, command_line: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(MACHINE).args(["-m", &format!("{mib}M"), "-kernel"]).arg(kernel);
    command.args(["-append", command_line]);
    command
}

/// Returns QEMU's version in one line.
///
/// # Errors
/// Fails with advice if QEMU is not installed.
pub(super) fn version() -> Result<String, String> {
    let output = Command::new(PROGRAM).arg("--version").stdin(Stdio::null()).output();
    let output =
        output.map_err(|error| format!("{PROGRAM}: {error}; Debian's package is qemu-system-x86"))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}
