//! The measured program.

use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Returns the path of `samepage`: beside this program, or else in the search path.
///
/// # Errors
/// Fails if this program cannot find itself.
pub(crate) fn path() -> Result<PathBuf> {
    let beside = env::current_exe().context("find this program")?.with_file_name("samepage");
    Ok(if beside.exists() { beside } else { "samepage".into() })
}

/// Runs a command to its end, and returns its output.
///
/// # Errors
/// Fails if the command cannot be started, does not succeed, or prints invalid UTF-8.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {name}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} failed: {}: {}", output.status, said.trim_end());
    String::from_utf8(output.stdout).with_context(|| format!("read what {name} printed"))
}
