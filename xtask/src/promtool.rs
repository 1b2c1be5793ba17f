//! Prometheus' checker of metrics, for a test.
//!
//! Debian has it in the package of the whole server. Only the program is taken out of that, into an entry of the
//! cache, so that no server is installed or started.

use crate::cache::{Cache, Key};
use crate::process;
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::process::Command;

const PACKAGE: &str = "prometheus";
/// The program in the package.
const PROGRAM: &str = "usr/bin/promtool";

/// To be raised when this module takes something else out of the package.
const RECIPE: &str = "promtool 1";

/// Gets the program if neither the host nor the cache has it.
///
/// # Errors
/// Debian's packages cannot be had.
pub fn build(cache: &Cache) -> Result<()> {
    if on_path() {
        return Ok(());
    }
    cache.get_or_build("promtool", &key(), |dir| {
        let download = || process::run(Command::new("apt-get").args(["download", PACKAGE]).current_dir(dir));
        // The lists may be missing or too old.
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

/// The program, if the host or the cache has it.
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
