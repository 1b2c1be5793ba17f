//! A folder with a kernel for one test, and command lines that work in it.

use std::fmt::Display;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use samepage_resources::DEMO_GUEST;
use samepage_resources::demo::plan::Plan;
use samepage_resources::demo::report::Report;
use samepage_tests::program::{self, Running};
use tempfile::TempDir;

/// The demo guest's file in a [`Scratch`].
pub(crate) const KERNEL: &str = "demo.elf";

pub(crate) struct Scratch {
    folder: TempDir,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("make a folder");
        // Some tests run the program as another user.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("open the folder");
        let scratch = Self { folder };
        scratch.write(KERNEL, DEMO_GUEST);
        scratch
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap_or_else(|error| panic!("write {name}: {error}"));
    }

    /// Creates a sparse file of this size.
    pub(crate) fn sparse(&self, name: &str, bytes: u64) {
        let file = File::create(self.path(name)).and_then(|file| file.set_len(bytes));
        file.unwrap_or_else(|error| panic!("make {name}: {error}"));
    }

    pub(crate) fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path(name))
    }

    pub(crate) fn read_text(&self, name: &str) -> String {
        let text = fs::read_to_string(self.path(name));
        text.unwrap_or_else(|error| panic!("read {name}: {error}"))
    }

    /// Returns a command of the program with these arguments, in this folder.
    pub(crate) fn samepage(&self, arguments: &[&str]) -> Command {
        let mut command = program::command(arguments);
        command.current_dir(self.folder());
        command
    }

    /// Returns a command of `samepage run` with the demo guest in 16 MiB, its command line, and more
    /// arguments.
    pub(crate) fn run(&self, cmdline: impl Display, more: &[&str]) -> Command {
        let mut command = self.samepage(&["run", "--kernel", KERNEL, "--memory", "16M"]);
        command.arg("--cmdline").arg(cmdline.to_string()).args(more);
        command
    }

    /// Starts the same command.
    pub(crate) fn start(&self, cmdline: impl Display, more: &[&str]) -> Running {
        Running::start(self.run(cmdline, more))
    }
}

/// A guest with little memory, which it verifies twice.
pub(crate) fn short() -> Plan {
    Plan { pages: Some(256), rounds: 2, ..Plan::default() }
}

/// The same guest, until it is asked to finish.
pub(crate) fn endless() -> Plan {
    Plan { rounds: 0, every_ms: 20, ..short() }
}

/// Returns the guest's report in a line, which may begin with the VM's name.
pub(crate) fn report(line: &str) -> Option<Report> {
    let text = line.strip_prefix('[').and_then(|line| line.split_once("] ")).map_or(line, |(_, text)| text);
    Report::parse(text).ok()
}

/// Asserts that a guest has verified all of its memory, and found no fault.
pub(crate) fn assert_verified(console: &str) {
    let mut ends = console.lines().filter_map(report).filter_map(|report| match report {
        Report::Done { corrupt, .. } => Some(corrupt),
        _ => None,
    });
    assert_eq!((ends.next(), ends.next()), (Some(0), None), "{console}");
    assert!(!console.contains("corrupt page"), "{console}");
}
