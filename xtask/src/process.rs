//! Runs other programs, with errors that name the command.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Runs `command` to its end.
///
/// # Errors
/// Fails if it cannot be started or does not succeed.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {}", shown(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs `command` to its end and returns its output.
///
/// # Errors
/// Fails if it cannot be started, does not succeed, or prints invalid UTF-8.
pub fn output(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("starting {}", shown(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed: {}: {}", shown(command), output.status, said.trim_end());
    }
    String::from_utf8(output.stdout).with_context(|| format!("reading what {} printed", shown(command)))
}

/// Returns whether `command` can be started and succeeds. Its output is dropped.
pub fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Returns a command of a tool for administrators. It may be in a folder that is not in the path of other users.
pub(crate) fn admin_tool(name: &str) -> Command {
    let mut command = Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// Returns the Cargo that runs this program, or the one in the path.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::project_root());
    command
}

/// Builds with Cargo, shows its progress, and returns its messages, which are JSON objects on a line each.
///
/// # Errors
/// Fails if the build fails.
pub fn build(arguments: &[&str]) -> Result<String> {
    let mut command = cargo();
    command.args(arguments).arg("--message-format=json-render-diagnostics");
    output(command.stderr(Stdio::inherit()))
}

/// Returns the path of the program with this name, from Cargo's messages.
pub fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut programs = messages.filter_map(|message| Some(message.get("executable")?.as_str()?.into()));
    programs.find(|path: &PathBuf| path.ends_with(name))
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_returned() -> Result<()> {
        assert_eq!(output(Command::new("echo").arg("a b"))?, "a b\n");
        Ok(())
    }

    #[test]
    fn failures_name_the_command() {
        let error = output(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).expect_err("it failed");
        assert_eq!(error.to_string(), "sh -c echo why >&2; exit 3 failed: exit status: 3: why");
        let error = run(Command::new("/nonexistent").arg("x")).expect_err("it failed");
        assert_eq!(error.to_string(), "starting /nonexistent x");
        assert!(!succeeds(&mut Command::new("false")));
        assert!(succeeds(&mut Command::new("true")));
    }

    #[test]
    fn the_program_is_found_in_what_cargo_says() {
        let messages = concat!(
            "{\"reason\":\"compiler-artifact\",\"executable\":null}\n",
            "{\"reason\":\"compiler-artifact\",\"executable\":\"/t/release/samepage\"}\n",
            "{\"reason\":\"compiler-artifact\",\"executable\":\"/t/release/samepage-bench\"}\n",
            "{\"reason\":\"build-finished\",\"success\":true}\n",
        );
        assert_eq!(executable(messages, "samepage"), Some("/t/release/samepage".into()));
        assert_eq!(executable(messages, "samepage-bench"), Some("/t/release/samepage-bench".into()));
        assert_eq!(executable("warning: what\n", "samepage"), None);
    }
}
