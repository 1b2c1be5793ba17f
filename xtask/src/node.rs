//! JavaScript programs for tests: a generator of clients in TypeScript, and its compiler.
//!
//! They are installed from npm into an entry of the cache, with fixed versions. If that is not possible,
//! tests that need them are skipped and counted.

use crate::cache::{Cache, Key};
use crate::{process, setup};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The packages.
const PACKAGES: [&str; 3] = ["openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3"];
/// The Debian packages with npm.
const DEBIAN: [&str; 2] = ["nodejs", "npm"];

/// Must be increased when this module installs other files from the same packages.
const RECIPE: &str = "node 1";

/// Installs the packages if the cache lacks them.
///
/// # Errors
/// Fails if npm is missing or cannot install the packages.
pub fn build(cache: &Cache) -> Result<Modules> {
    let entry = cache.get_or_build("node", &key(), |dir| {
        // On some hosts, Node.js is not a Debian package.
        if !process::succeeds(Command::new("npm").arg("--version")) {
            setup::install_packages(&DEBIAN)?;
        }
        let mut install = Command::new("npm");
        install.args(["install", "--no-save", "--no-fund", "--no-audit", "--no-update-notifier", "--silent"]);
        process::run(install.arg("--prefix").arg(dir).args(PACKAGES)).context("installing packages from npm")
    })?;
    Ok(Modules(entry))
}

/// Returns the installed packages, if the cache has them and Node.js is present.
///
/// # Errors
/// Fails if there is no cache.
pub fn find() -> Result<Option<Modules>> {
    let entry = Cache::of_user()?.find("node", &key());
    Ok(entry.filter(|_| process::succeeds(Command::new("node").arg("--version"))).map(Modules))
}

fn key() -> Key {
    PACKAGES.iter().fold(Key::new().part(RECIPE), |key, package| key.part(package))
}

/// A folder with the packages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Modules(PathBuf);

impl Modules {
    /// Returns the folder of the packages, for programs that import them.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.0.join("node_modules")
    }

    /// Returns a command of one of the programs, by its path in the folder of its package.
    #[must_use]
    pub fn program(&self, path: impl AsRef<Path>) -> Command {
        let mut program = Command::new("node");
        program.arg(self.folder().join(path));
        program
    }
}
