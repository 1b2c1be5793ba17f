//! All checks of the project in order, with a summary at the end.
//!
//! The remaining checks run even after a failed one.

use crate::artifacts::Artifacts;
use crate::cache::Cache;
use crate::suite::{self, Choice, Results};
use crate::{deb, deny, lab, node, process, promtool, python, setup};
use anyhow::{Context, Result, bail};
use std::fs::OpenOptions;
use std::time::{Duration, Instant};

/// The variable that, set to 1, skips tests that need KVM if there is none.
pub const WITHOUT_KVM: &str = "SAMEPAGE_TESTS_WITHOUT_KVM";

/// Runs all checks and returns whether all passed. Without tests that boot guests, no guests are built. If
/// only some tests are chosen, the source is not checked.
pub fn run(choice: &Choice) -> bool {
    let quick = choice.quick;
    let mut report = Report::default();
    let kvm = kvm();
    if quick {
        println!("quick: no guests are built or booted");
    } else if let Err(error) = &kvm {
        println!("warning: {error:#}");
        if std::env::var(WITHOUT_KVM).is_ok_and(|value| value == "1") {
            println!("warning: {WITHOUT_KVM}=1: tests that need KVM are skipped");
        } else {
            println!("warning: tests that need KVM will fail; {WITHOUT_KVM}=1 skips them");
        }
    }
    if !quick && kvm.is_ok() {
        report.step("packages", setup::install);
        if let Err(error) = setup::install_packages(&[setup::BROWSER]) {
            println!("warning: tests that need a browser are skipped: {error:#}");
        }
        report.step("guests", || Artifacts::build().map(drop));
        if let Err(error) = Cache::of_user().and_then(|cache| python::build(&cache)) {
            println!("warning: tests that need Python programs are skipped: {error:#}");
        }
        if let Err(error) = Cache::of_user().and_then(|cache| node::build(&cache)) {
            println!("warning: tests that need JavaScript programs are skipped: {error:#}");
        }
        if let Err(error) = Cache::of_user().and_then(|cache| promtool::build(&cache)) {
            println!("warning: tests that need promtool are skipped: {error:#}");
        }
        if let Err(error) = deb::install() {
            println!("warning: tests of the Debian package are skipped: {error:#}");
        }
    }
    if choice.filter.is_none() {
        check_source(&mut report);
    }
    let mut tests = Results::default();
    report.step("tests", || suite::run(choice, &mut tests));
    if choice.filter.is_none() && !quick {
        run_lab(&mut report);
    }
    report.summarise(&tests)
}

fn check_source(report: &mut Report) {
    report.step("format", || component("fmt", "rustfmt", &["fmt", "--all", "--check"]));
    report.step("lint", || {
        let lint = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
        component("clippy", "clippy", &lint)
    });
    report.step("docs", document);
    dependencies(report);
}

/// Runs guests on hardware virtualisation, which is emulated: all scripts if the user wants them, or a short one.
fn run_lab(report: &mut Report) {
    if std::env::var_os(lab::WANTED).is_some_and(|value| value == "1") {
        return report.step("lab", lab::check);
    }
    match lab::prepare_short() {
        Ok(()) => report.step("short lab", lab::check_short),
        Err(error) => report.left_out("short lab", &format!("{error:#}")),
    }
}

/// Builds the documentation of all items. Fails at broken links.
fn document() -> Result<()> {
    // The readers are developers, who have the private items too, so links to those are allowed.
    let flags = "-D warnings -A rustdoc::private_intra_doc_links";
    let document = ["doc", "--workspace", "--no-deps", "--document-private-items", "--locked"];
    process::run(process::cargo().args(document).env("RUSTDOCFLAGS", flags))
}

/// Checks the dependencies, if the tool and its database of advisories are available.
fn dependencies(report: &mut Report) {
    if !deny::is_installed() {
        return report.left_out("licences", deny::HOW_TO_INSTALL);
    }
    report.step("licences", deny::check_licences);
    match deny::fetch_advisories() {
        Ok(()) => report.step("advisories", deny::check_advisories),
        Err(error) => report.left_out("advisories", &format!("{error:#}")),
    }
}

/// Fails if this process cannot create VMs.
fn kvm() -> Result<()> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").context("/dev/kvm can't be opened").map(drop)
}

/// Runs a component of Cargo that is installed separately.
fn component(subcommand: &str, name: &str, arguments: &[&str]) -> Result<()> {
    if !process::succeeds(process::cargo().args([subcommand, "--version"])) {
        bail!("`cargo {subcommand}` is missing; install it with: rustup component add {name}");
    }
    process::run(process::cargo().args(arguments))
}

/// The result of a step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    LeftOut,
}

/// The results of all steps.
#[derive(Default)]
struct Report {
    steps: Vec<(&'static str, Verdict, Duration)>,
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
        let verdict = if result.is_ok() { Verdict::Passed } else { Verdict::Failed };
        self.steps.push((name, verdict, elapsed));
    }

    /// Records a step that is not possible on this host. It does not affect the result.
    fn left_out(&mut self, name: &'static str, why: &str) {
        println!("\n== {name}: left out: {why}");
        self.steps.push((name, Verdict::LeftOut, Duration::ZERO));
    }

    /// Prints the results of each step and of all tests. Returns whether all passed.
    fn summarise(&self, tests: &Results) -> bool {
        println!("\n== summary");
        for (name, verdict, elapsed) in &self.steps {
            let word = match verdict {
                Verdict::Passed => "ok",
                Verdict::Failed => "FAILED",
                Verdict::LeftOut => "left out",
            };
            println!("{name:<10} {word:<8} {:>7.1} s", elapsed.as_secs_f64());
        }
        for test in &tests.failures {
            println!("failed: {test}");
        }
        println!("{} passed, {} failed, {} skipped", tests.passed, tests.failed, tests.skipped);
        tests.failed == 0 && self.steps.iter().all(|(_, verdict, _)| *verdict != Verdict::Failed)
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

    #[test]
    fn a_step_that_is_left_out_fails_nothing() {
        let mut report = Report::default();
        report.left_out("advisories", "no network");
        assert!(report.summarise(&Results::default()));
    }
}
