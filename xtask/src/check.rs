//! Every check of the project, one after the other, with a summary at the end.
//!
//! A check that fails does not keep the others from running.

use crate::artifacts::Artifacts;
use crate::cache::Cache;
use crate::suite::{self, Choice, Results};
use crate::{node, process, promtool, python, setup};
use anyhow::{Context, Result, bail};
use std::fs::OpenOptions;
use std::time::{Duration, Instant};

/// Says, if set to 1, that tests which need KVM are to be left out where there is none.
pub const WITHOUT_KVM: &str = "SAMEPAGE_TESTS_WITHOUT_KVM";

/// Runs all checks and returns whether all passed. Where the tests that boot guests are left out, no guests are
/// built; where some tests are chosen, format and lint are not checked.
pub fn run(choice: &Choice) -> bool {
    let quick = choice.quick;
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
        if let Err(error) = Cache::of_user().and_then(|cache| node::build(&cache)) {
            println!("warning: tests that need programs in JavaScript are left out: {error:#}");
        }
        if let Err(error) = Cache::of_user().and_then(|cache| promtool::build(&cache)) {
            println!("warning: tests that need promtool are left out: {error:#}");
        }
    }
    if choice.filter.is_none() {
        check_source(&mut report);
    }
    let mut tests = Results::default();
    report.step("tests", || suite::run(choice, &mut tests));
    report.summarise(&tests)
}

fn check_source(report: &mut Report) {
    report.step("format", || component("fmt", "rustfmt", &["fmt", "--all", "--check"]));
    report.step("lint", || {
        let lint = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
        component("clippy", "clippy", &lint)
    });
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
    fn summarise(&self, tests: &Results) -> bool {
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
    fn one_failed_step_fails_all() {
        let mut report = Report::default();
        report.step("good", || Ok(()));
        assert!(report.summarise(&Results::default()));
        assert!(!report.summarise(&Results { failed: 1, ..Results::default() }));
        report.step("bad", || bail!("on purpose"));
        assert!(!report.summarise(&Results::default()));
    }
}
