//! Installs the Debian packages that the builds need.

use crate::process;
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

/// The packages for building guests and for testing disks, ACPI tables and units, in addition to the Rust toolchain.
pub const PACKAGES: [&str; 21] = [
    crate::kernel::SOURCE_PACKAGE,
    "acpica-tools",
    "bc",
    "bison",
    "e2fsprogs",
    "flex",
    "gcc",
    "iproute2",
    "libc6-dev",
    "libelf-dev",
    "libssl-dev",
    "make",
    // For Debian images, which the lab builds, and which users build.
    "mmdebstrap",
    // For reading the disk of cloud-init.
    "mtools",
    // For networks without privileges.
    "passt",
    "patch",
    "python3-venv",
    "qemu-system-x86",
    "qemu-utils",
    // For verifying units. It need not run on the host.
    "systemd",
    "xz-utils",
];

/// The browser for tests of the web page. Without it, these tests are skipped.
pub const BROWSER: &str = "chromium";

/// Installs the missing packages of [`PACKAGES`], like [`install_packages`].
///
/// # Errors
/// Fails if packages are missing and cannot be installed. The error contains the command for it.
pub fn install() -> Result<()> {
    install_packages(&PACKAGES)
}

/// Installs the missing ones of `packages` if this process may do so. Does nothing if none is missing.
///
/// # Errors
/// Fails if packages are missing and cannot be installed. The error contains the command for it.
pub fn install_packages(packages: &[&str]) -> Result<()> {
    let missing = missing_packages(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    let install = format!("apt-get install --yes --no-install-recommends {}", missing.join(" "));
    if !is_root()? {
        bail!("packages are missing; install them with:\n    sudo apt-get update && sudo {install}");
    }
    eprintln!("installing {}", missing.join(" "));
    let attempt = || process::run(apt_get().args(install.split(' ').skip(1)));
    if attempt().is_ok() {
        return Ok(());
    }
    // The package lists may be missing, or name files that no longer exist.
    process::run(apt_get().arg("update")).and_then(|()| attempt()).with_context(|| {
        format!("installing packages with: {install}\n(they are those of Debian 12, \"bookworm\")")
    })
}

/// Whether this process may install packages.
pub(crate) fn is_root() -> Result<bool> {
    Ok(fs::metadata("/proc/self").context("looking up the user of this process")?.uid() == 0)
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn missing_packages<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    // The call fails for unknown packages, but still prints the known ones.
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n"])
        .args(packages)
        .output()
        .context("looking up installed packages with dpkg-query: guests are built on Debian")?;
    Ok(missing_from(packages, &String::from_utf8_lossy(&output.stdout)))
}

/// Returns the packages that are not installed according to a `dpkg-query` listing.
fn missing_from<'a>(packages: &[&'a str], listing: &str) -> Vec<&'a str> {
    let installed: Vec<&str> = listing.lines().filter_map(|line| line.strip_suffix(" installed")).collect();
    packages.iter().copied().filter(|package| !installed.contains(package)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let all: String = PACKAGES.iter().map(|package| format!("{package} installed\n")).collect();
        assert!(missing_from(&PACKAGES, &all).is_empty());
        assert_eq!(missing_from(&PACKAGES, &all.replace("make installed", "make config-files")), ["make"]);
        assert_eq!(missing_from(&PACKAGES, "").len(), PACKAGES.len());
    }
}
