//! Licences, sources and advisories of the crates that samepage uses, as `deny.toml` allows them.
//!
//! `cargo deny` is not installed here, since it takes minutes to build. Its advisories come from a repository on
//! the network. Where either is missing the check is left out, and the summary says so.

use crate::process;
use anyhow::{Context, Result};
use std::process::Command;

/// What to do where [`is_installed`] says no.
pub const HOW_TO_INSTALL: &str =
    "`cargo deny` is missing; install it with: cargo install --locked cargo-deny";

/// Whether Cargo finds `cargo deny`.
#[must_use]
pub fn is_installed() -> bool {
    process::succeeds(process::cargo().args(["deny", "--version"]))
}

/// Checks licences, banned crates and the places that crates come from.
///
/// # Errors
/// `deny.toml` does not allow a crate. `cargo deny` has printed which one.
pub fn check_licences() -> Result<()> {
    process::run(deny().args(["check", "licenses", "bans", "sources"]))
}

/// Gets the newest database of advisories.
///
/// # Errors
/// The database cannot be had, for lack of a network for example.
pub fn fetch_advisories() -> Result<()> {
    process::output(deny().args(["fetch", "db"])).context("getting the database of advisories").map(drop)
}

/// Checks that no crate has an open advisory.
///
/// # Errors
/// A crate has one. `cargo deny` has printed it.
pub fn check_advisories() -> Result<()> {
    process::run(deny().args(["check", "advisories"]))
}

fn deny() -> Command {
    let mut command = process::cargo();
    command.args(["deny", "--locked"]);
    command
}
