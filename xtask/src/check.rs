//! Every check of the project, one after the other, with a summary at the end.
//!
//! A check that fails does not keep the others from running.

use crate::artifacts::Artifacts;
use crate::cache::Cache;
use crate::{process, python, setup};
use anyhow::{Context, Result, bail};
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
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
        if let Err(error) = setup::install_packages(&[setup::BROWSER]) {
            println!("warning: tests that need a browser are left out: {error:#}");
        }
        report.step("guests", || Artifacts::build().map(drop));
        if let Err(error) = Cache::of_user().and_then(|cache| python::build(&cache)) {
            println!("warning: tests that need programs in Python are left out: {error:#}");
        }
    }
    report.step("format", || component("fmt", "rustfmt", &["fmt", "--all", "--check"]));
    report.step("lint", || {
        let lint = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
        component("clippy", "clippy", &lint)
    });
    let mut tests = Tests::default();
    report.step("tests", || test(quick, &mut tests));
    report.summarise(&tests)
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

fn test(quick: bool, tests: &mut Tests) -> Result<()> {
    let mut command = process::cargo();
    command.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
    if quick {
        command.args(["--exclude", GUEST_TESTS]);
    }
    let mut child = command.stdout(Stdio::piped()).spawn().context("starting cargo test")?;
    let output = child.stdout.take().context("reading what cargo test prints")?;
    let counted = follow(output, tests);
    let status = child.wait().context("waiting for cargo test")?;
    counted.context("passing on what cargo test prints")?;
    if !status.success() {
        bail!("cargo test failed: {status}");
    }
    if tests.passed == 0 {
        bail!("cargo test reported no test");
    }
    Ok(())
}

/// Passes on what `cargo test` prints and gathers its results.
fn follow(output: ChildStdout, tests: &mut Tests) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    for line in BufReader::new(output).split(b'\n') {
        let mut line = line?;
        tests.add_line(&String::from_utf8_lossy(&line));
        line.push(b'\n');
        stdout.write_all(&line)?;
    }
    Ok(())
}

/// The results of all test programs.
#[derive(Debug, Default)]
struct Tests {
    passed: u64,
    failed: u64,
    skipped: u64,
    failures: Vec<String>,
}

impl Tests {
    fn add_line(&mut self, line: &str) {
        if let Some((passed, failed, skipped)) = closing_line(line) {
            self.passed += passed;
            self.failed += failed;
            self.skipped += skipped;
        } else if let Some(test) = line.strip_prefix("test ").and_then(|line| line.strip_suffix("... FAILED"))
        {
            self.failures.push(test.trim_end().to_owned());
        }
    }
}

/// Reads how many tests passed, failed and were skipped from the closing line of a test program:
/// `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; ...`.
fn closing_line(line: &str) -> Option<(u64, u64, u64)> {
    let (_, results) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |what: &str| -> Option<u64> {
        results.split("; ").find_map(|part| part.strip_suffix(what))?.trim().parse().ok()
    };
    Some((count("passed")?, count("failed")?, count("ignored")? + count("filtered out")?))
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
    fn summarise(&self, tests: &Tests) -> bool {
        println!("\n== summary");
        for (name, ok, elapsed) in &self.steps {
            println!("{name:<10} {:<6} {:>7.1} s", if *ok { "ok" } else { "FAILED" }, elapsed.as_secs_f64());
        }
        for test in &tests.failures {
            println!("failed: {test}");
        }
        println!("{} passed, {} failed, {} skipped", tests.passed, tests.failed, tests.skipped);
        tests.failed == 0 && self.steps.iter().all(|(_, ok, _)| *ok)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_added_up() {
        let mut tests = Tests::default();
        for line in [
            "test a::b ... ok",
            "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s",
            "test c::d ... FAILED",
            "test padded    ... FAILED",
            "test result: FAILED. 7 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
            "test result: what",
            "",
        ] {
            tests.add_line(line);
        }
        assert_eq!((tests.passed, tests.failed, tests.skipped), (12, 3, 3));
        assert_eq!(tests.failures, ["c::d", "padded"]);
    }

    #[test]
    fn one_failed_step_fails_all() {
        let mut report = Report::default();
        report.step("good", || Ok(()));
        assert!(report.summarise(&Tests::default()));
        assert!(!report.summarise(&Tests { failed: 1, ..Tests::default() }));
        report.step("bad", || bail!("on purpose"));
        assert!(!report.summarise(&Tests::default()));
    }
}
