//! Installing the Debian packages that the builds need.

use crate::process;
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

/// Everything that building guests, and testing disks and units, takes beyond the Rust toolchain.
pub const PACKAGES: [&str; 16] = [
    crate::kernel::SOURCE_PACKAGE,
    "bc",
    "bison",
    "e2fsprogs",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "libssl-dev",
    "make",
    "patch",
    "python3-venv",
    "qemu-system-x86",
    "qemu-utils",
    // Verifies units; it need not run the host.
    "systemd",
    "xz-utils",
];

/// The browser that tests of the web page use; without it they are skipped.
pub const BROWSER: &str = "chromium";

/// Installs what is missing of [`PACKAGES`], as [`install_packages`] does.
///
/// # Errors
/// Packages are missing and can't be installed; the error holds the command that would.
pub fn install() -> Result<()> {
    install_packages(&PACKAGES)
}

/// Installs what is missing of `packages` if this process may, and does nothing if all is there.
///
/// # Errors
/// Packages are missing and can't be installed; the error holds the command that would.
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
    // The package lists may be missing or too old to name files that still exist.
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
    // It fails when it doesn't know a package, and still prints those that it knows.
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n"])
        .args(packages)
        .output()
        .context("looking up installed packages with dpkg-query: guests are built on Debian")?;
    Ok(missing_from(packages, &String::from_utf8_lossy(&output.stdout)))
}

/// The packages that a `dpkg-query` listing doesn't show as installed.
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
