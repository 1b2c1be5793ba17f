//! Every check of the project, one after the other, with a summary at the end.
//!
//! A check that fails does not keep the others from running.

use crate::artifacts::Artifacts;
use crate::{process, setup};
use anyhow::{Context, Result, bail};
use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
use std::ops::AddAssign;
use std::process::{ChildStdout, Stdio};
use std::time::{Duration, Instant};

/// Says, if set to 1, that tests which need KVM are to be left out where there is none.
pub const WITHOUT_KVM: &str = "SAMEPAGE_TESTS_WITHOUT_KVM";
/// The crate with the tests that boot guests.
const GUEST_TESTS: &str = "samepage-tests";

/// Runs all checks and returns whether all passed. `quick` leaves out the tests that boot guests,
/// and with them the building of guests.
pub fn run(quick: bool) -> bool {
    let mut report = Report::default();
    let kvm = kvm();
    if quick {
        println!("quick: no guests are built or booted");
    } else if let Err(error) = &kvm {
        println!("warning: {error:#}");
        if std::env::var(WITHOUT_KVM).is_ok_and(|value| value == "1") {
            println!("warning: {WITHOUT_KVM}=1: tests that need KVM are left out");
        } else {
            println!("warning: tests that need KVM will fail; {WITHOUT_KVM}=1 leaves them out");
        }
    }
    if !quick && kvm.is_ok() {
        report.step("packages", setup::install);
        report.step("guests", || Artifacts::build().map(drop));
    }
    report.step("format", || component("fmt", "rustfmt", &["fmt", "--all", "--check"]));
    report.step("lint", || {
        let lint = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
        component("clippy", "clippy", &lint)
    });
    let mut counts = Counts::default();
    report.step("tests", || test(quick, &mut counts));
    report.summarise(counts)
}

/// Whether this process can create virtual machines.
fn kvm() -> Result<()> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").context("/dev/kvm can't be opened").map(drop)
}

/// Runs a part of Cargo that is installed separately.
fn component(subcommand: &str, name: &str, arguments: &[&str]) -> Result<()> {
    if !process::succeeds(process::cargo().args([subcommand, "--version"])) {
        bail!("`cargo {subcommand}` is missing; install it with: rustup component add {name}");
    }
    process::run(process::cargo().args(arguments))
}

fn test(quick: bool, counts: &mut Counts) -> Result<()> {
    let mut command = process::cargo();
    command.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
    if quick {
        command.args(["--exclude", GUEST_TESTS]);
    }
    let mut child = command.stdout(Stdio::piped()).spawn().context("starting cargo test")?;
    let output = child.stdout.take().context("reading what cargo test prints")?;
    let counted = count(output, counts);
    let status = child.wait().context("waiting for cargo test")?;
    counted.context("passing on what cargo test prints")?;
    if !status.success() {
        bail!("cargo test failed: {status}");
    }
    Ok(())
}

/// Passes on what `cargo test` prints and adds up its results.
fn count(output: ChildStdout, counts: &mut Counts) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    for line in BufReader::new(output).split(b'\n') {
        let mut line = line?;
        *counts += std::str::from_utf8(&line).ok().and_then(Counts::of_line).unwrap_or_default();
        line.push(b'\n');
        stdout.write_all(&line)?;
    }
    Ok(())
}

/// How many tests there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Counts {
    /// Reads the closing line of a test program:
    /// `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; ...`.
    fn of_line(line: &str) -> Option<Self> {
        let (_, results) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let count = |what: &str| {
            let number = results.split("; ").find_map(|part| part.strip_suffix(what))?;
            number.trim().parse().ok()
        };
        Some(Self {
            passed: count("passed")?,
            failed: count("failed")?,
            skipped: count("ignored")? + count("filtered out")?,
        })
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// What became of each step.
#[derive(Default)]
struct Report {
    steps: Vec<(&'static str, bool, Duration)>,
}

impl Report {
    fn step(&mut self, name: &'static str, step: impl FnOnce() -> Result<()>) {
        println!("\n== {name}");
        let start = Instant::now();
        let result = step();
        let elapsed = start.elapsed();
        match &result {
            Ok(()) => println!("== {name}: ok in {:.1} s", elapsed.as_secs_f64()),
            Err(error) => println!("== {name}: FAILED after {:.1} s: {error:#}", elapsed.as_secs_f64()),
        }
        self.steps.push((name, result.is_ok(), elapsed));
    }

    /// Prints the outcome of each step and of all tests; returns whether all is well.
    fn summarise(&self, counts: Counts) -> bool {
        println!("\n== summary");
        for (name, ok, elapsed) in &self.steps {
            println!("{name:<10} {:<6} {:>7.1} s", if *ok { "ok" } else { "FAILED" }, elapsed.as_secs_f64());
        }
        println!("{counts}");
        counts.failed == 0 && self.steps.iter().all(|(_, ok, _)| *ok)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_added_up() {
        let mut counts = Counts::default();
        for line in [
            "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s",
            "test a::b ... ok",
            "test result: FAILED. 7 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
            "test result: what",
            "",
        ] {
            counts += Counts::of_line(line).unwrap_or_default();
        }
        assert_eq!(counts.to_string(), "12 passed, 3 failed, 3 skipped");
    }

    #[test]
    fn one_failed_step_fails_all() {
        let mut report = Report::default();
        report.step("good", || Ok(()));
        assert!(report.summarise(Counts::default()));
        assert!(!report.summarise(Counts { failed: 1, ..Counts::default() }));
        report.step("bad", || bail!("on purpose"));
        assert!(!report.summarise(Counts::default()));
    }
}
