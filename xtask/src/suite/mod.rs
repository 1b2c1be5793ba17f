//! The tests of the workspace: builds all test programs, runs several at the same time, and prints the
//! progress.
//!
//! Each test that boots guests runs in its own process, because it measures the process. The test programs of
//! the other crates run as a whole. `cargo nextest` would do most of this. But it counts tests that are
//! skipped for lack of KVM, a browser or a guest kernel as passed, and takes minutes to build on a fresh
//! machine.

mod lanes;
mod outcome;
mod programs;

use std::time::Duration;

use anyhow::{Result, bail};

/// The variable with the path of the program under test, so that tests need not build it.
pub const PROGRAM: &str = "SAMEPAGE_TEST_PROGRAM";
/// The crate with the tests that boot guests.
const GUEST_TESTS: &str = "samepage-tests";
/// Number of slow parts that are named at the end.
const SLOWEST: usize = 8;

/// The choice of tests.
#[derive(Debug)]
pub struct Choice {
    /// A part of the name of the chosen tests; `None` for all tests.
    pub filter: Option<String>,
    /// Whether to skip the tests that boot guests.
    pub quick: bool,
    /// Number of parts to run at the same time.
    pub jobs: usize,
}

/// The results of all tests.
#[derive(Debug, Default)]
pub struct Results {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
    /// Skipped tests.
    pub skipped: u64,
    /// Names of the tests that failed.
    pub failures: Vec<String>,
    /// The duration of each part.
    pub(crate) times: Vec<(Duration, String)>,
}

/// Builds all tests and runs the chosen ones.
///
/// # Errors
/// Fails if the tests do not build, if one fails, or if there is none.
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
