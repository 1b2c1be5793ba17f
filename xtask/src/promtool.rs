//! Prometheus' checker of metrics, for a test.
//!
//! Debian's package contains the whole server. Only the program is unpacked from it into an entry of the
//! cache, so no server is installed or started.

use crate::cache::{Cache, Key};
use crate::process;
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::process::Command;

const PACKAGE: &str = "prometheus";
/// The path of the program in the package.
const PROGRAM: &str = "usr/bin/promtool";

/// Must be increased when this module unpacks other files from the package.
const RECIPE: &str = "promtool 1";

/// Unpacks the program if neither the host nor the cache has it.
///
/// # Errors
/// Fails if Debian's packages are not available.
pub fn build(cache: &Cache) -> Result<()> {
    if on_path() {
        return Ok(());
    }
    cache.get_or_build("promtool", &key(), |dir| {
        let download = || process::run(Command::new("apt-get").args(["download", PACKAGE]).current_dir(dir));
        // The package lists may be missing or outdated.
        download()
            .or_else(|_| process::run(Command::new("apt-get").arg("update")).and_then(|()| download()))
            .context("downloading Debian's package of Prometheus")?;
        let unpack =
            "dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool && rm prometheus_*.deb";
        process::run(Command::new("sh").args(["-ec", unpack]).current_dir(dir))?;
        ensure!(dir.join(PROGRAM).is_file(), "the package {PACKAGE} has no {PROGRAM}");
        Ok(())
    })?;
    Ok(())
}

/// Returns the program, if the host or the cache has it.
#[must_use]
pub fn find() -> Option<PathBuf> {
    if on_path() {
        return Some("promtool".into());
    }
    let entry = Cache::of_user().ok()?.find("promtool", &key())?;
    Some(entry.join(PROGRAM))
}

fn on_path() -> bool {
    process::succeeds(Command::new("promtool").arg("--version"))
}

fn key() -> Key {
    Key::new().part(RECIPE)
}
