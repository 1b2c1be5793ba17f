//! The program that is measured.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// Where `samepage` is: beside this program, or where the search path leads to.
///
/// # Errors
/// When this program cannot be found itself.
pub(crate) fn path() -> Result<PathBuf> {
    let beside = env::current_exe().context("find this program")?.with_file_name("samepage");
    Ok(if beside.exists() { beside } else { "samepage".into() })
}
