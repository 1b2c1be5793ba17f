//! The tests of the workspace: builds all test programs, runs several at once, and says how far it is.
//!
//! Tests that boot guests run one to a process, since they measure what the process holds. The test programs of
//! the other crates run whole. `cargo nextest` would do most of this, but counts a test that was left out for
//! lack of KVM, a browser or a guest kernel as passed, and takes minutes to build on a fresh machine.

mod lanes;
mod outcome;
mod programs;

use std::time::Duration;

use anyhow::{Result, bail};

/// Says where the program lies that tests run, so that they need not build it.
pub const PROGRAM: &str = "SAMEPAGE_TEST_PROGRAM";
/// The crate with the tests that boot guests.
const GUEST_TESTS: &str = "samepage-tests";
/// How many of the slowest parts are named at the end.
const SLOWEST: usize = 8;

/// Which tests are run, and how.
#[derive(Debug)]
pub struct Choice {
    /// What their names hold, where not all are run.
    pub filter: Option<String>,
    /// Leave out the tests that boot guests.
    pub quick: bool,
    /// How many parts run at a time.
    pub jobs: usize,
}

/// The results of all tests.
#[derive(Debug, Default)]
pub struct Results {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
    /// Tests that were left out.
    pub skipped: u64,
    /// Names of the tests that failed.
    pub failures: Vec<String>,
    /// What each part took.
    pub(crate) times: Vec<(Duration, String)>,
}

/// Builds all tests and runs those chosen.
///
/// # Errors
/// The tests do not build, one failed, or there was none.
pub fn run(choice: &Choice, results: &mut Results) -> Result<()> {
    let mut parts = programs::build(choice.quick)?;
    if let Some(filter) = &choice.filter {
        parts.retain(|part| part.name.contains(filter));
    }
    lanes::run(parts, choice.jobs, results)?;
    results.times.sort_by(|one, other| other.cmp(one));
    println!("slowest:");
    for (time, name) in results.times.iter().take(SLOWEST) {
        println!("{:>7.1} s  {name}", time.as_secs_f64());
    }
    if results.failed > 0 {
        bail!("{} tests failed", results.failed);
    }
    if results.passed == 0 {
        bail!("no test was run");
    }
    Ok(())
}
