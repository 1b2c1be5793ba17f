//! `samepage bench`: runs the benchmarks, a separate program.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

const PROGRAM: &str = "samepage-bench";

/// Replaces this program by the benchmarks' program: the one in the same folder, or the one in the search path.
///
/// # Errors
/// Fails if it is not installed or cannot be started.
pub(crate) fn main(arguments: &[OsString]) -> Result<ExitCode> {
    let beside = env::current_exe().context("find this program")?.with_file_name(PROGRAM);
    let program = if beside.exists() { beside } else { PathBuf::from(PROGRAM) };
    let error = Command::new(&program).args(arguments).exec();
    if error.kind() == io::ErrorKind::NotFound {
        bail!(
            "the benchmarks are a program of their own, {PROGRAM}, which is not installed: build it with \
             `cargo build --release --package {PROGRAM}`, and put it beside samepage or into a folder of $PATH"
        );
    }
    Err(error).with_context(|| format!("start {}", program.display()))
}
