//! Finds the test programs that Cargo builds, and lists their tests.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{GUEST_TESTS, PROGRAM};
use crate::process;

/// A part of the tests: a process that runs one or several tests.
#[derive(Debug)]
pub(super) struct Part {
    /// The name in messages.
    pub(super) name: String,
    /// Number of tests, or 0 if only a run tells.
    pub(super) tests: usize,
    pub(super) command: Command,
}

/// A test program that Cargo has built.
#[derive(Debug)]
struct Program {
    package: String,
    target: String,
    folder: PathBuf,
    executable: PathBuf,
}

/// Builds the test programs and lists their tests. Tests that boot guests come first, because they take
/// longest.
pub(super) fn build(quick: bool) -> Result<Vec<Part>> {
    let mut build = vec!["test", "--no-run", "--workspace", "--locked"];
    if quick {
        build.extend(["--exclude", GUEST_TESTS]);
    }
    let messages = process::build(&build).context("building the tests")?;
    let (guests, others): (Vec<_>, Vec<_>) =
        messages.lines().filter_map(program).partition(|program| program.package == GUEST_TESTS);
    let mut parts = Vec::new();
    // Build once for all processes that use it.
    let samepage = if guests.is_empty() { PathBuf::new() } else { build_program()? };
    for program in guests {
        let tests = program.tests()?;
        parts.extend(tests.iter().map(|test| program.one(test)));
    }
    for part in &mut parts {
        part.command.env(PROGRAM, &samepage);
    }
    parts.push(examples());
    for program in others {
        parts.push(program.whole()?);
    }
    parts.retain(|part| part.tests > 0 || part.name == EXAMPLES);
    Ok(parts)
}

/// Builds the program and its benchmarks, with the same features of dependencies as the tests. Returns its
/// path.
fn build_program() -> Result<PathBuf> {
    let programs = ["--bin", "samepage", "--bin", "samepage-bench"];
    let messages = process::build(&[&["build", "--workspace", "--locked"][..], &programs].concat())?;
    process::executable(&messages, "samepage").context("cargo build names no program")
}

/// The examples in documentation.
const EXAMPLES: &str = "examples in documentation";

fn examples() -> Part {
    let mut command = process::cargo();
    command.args(["test", "--doc", "--workspace", "--locked", "--quiet"]);
    Part { name: EXAMPLES.into(), tests: 0, command }
}

/// Parses a message of Cargo. Returns `None` if it is not about a test program.
fn program(line: &str) -> Option<Program> {
    let message: Value = serde_json::from_str(line).ok()?;
    let executable = message["executable"].as_str()?;
    if message["profile"]["test"] != true {
        return None;
    }
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?;
    // The ID is `path+file:///folder#name@version`, or has no name if that is the folder's name.
    let (_, id) = message["package_id"].as_str()?.rsplit_once('#')?;
    let package = id.split_once('@').map_or_else(
        || folder.file_name().map(|name| name.to_string_lossy().into_owned()),
        |(name, _)| Some(name.to_owned()),
    )?;
    Some(Program {
        package,
        target: message["target"]["name"].as_str()?.to_owned(),
        folder: folder.to_owned(),
        executable: executable.into(),
    })
}

impl Program {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.executable);
        // In the same way as Cargo starts tests.
        command.current_dir(&self.folder).env("CARGO_MANIFEST_DIR", &self.folder);
        command
    }

    fn tests(&self) -> Result<Vec<String>> {
        let listed = process::output(self.command().args(["--list", "--format", "terse"]))?;
        Ok(listed.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
    }

    fn whole(&self) -> Result<Part> {
        let name = if self.package.replace('-', "_") == self.target.replace('-', "_") {
            String::new()
        } else {
            format!("::{}", self.target)
        };
        Ok(Part {
            name: format!("{}{name}", self.package),
            tests: self.tests()?.len(),
            command: self.command(),
        })
    }

    fn one(&self, test: &str) -> Part {
        let mut command = self.command();
        command.args(["--exact", test]);
        Part { name: format!("{}::{test}", self.target), tests: 1, command }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_test_programs() {
        let message = |id: &str, test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"{id}","manifest_path":"/a/tests/Cargo.toml",
                "target":{{"name":"linux"}},"profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let found = program(&message("path+file:///a/tests#samepage-tests@0.1.0", true, r#""/x""#))
            .expect("a program");
        assert_eq!((found.package.as_str(), found.target.as_str()), (GUEST_TESTS, "linux"));
        assert_eq!((found.folder, found.executable), ("/a/tests".into(), "/x".into()));
        let found = program(&message("path+file:///a/tests#0.1.0", true, r#""/x""#)).expect("a program");
        assert_eq!(found.package, "tests");
        assert!(program(&message("path+file:///a/tests#0.1.0", false, r#""/x""#)).is_none());
        assert!(program(&message("path+file:///a/tests#0.1.0", true, "null")).is_none());
        assert!(program("warning: no JSON").is_none());
    }
}
