//! Reads the result of a part of the tests from its output.

use std::time::Duration;

use super::Results;

/// A part that has ended.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) name: String,
    pub(super) output: String,
    /// The exit of the process: successful, or the reason why not.
    pub(super) ended: Result<(), String>,
    pub(super) took: Duration,
}

impl Outcome {
    /// Adds the outcome to the results. Returns whether the part succeeded.
    pub(super) fn add_to(&self, results: &mut Results) -> bool {
        let mut counted = 0;
        for line in self.output.lines() {
            if let Some((passed, failed, skipped)) = closing_line(line) {
                results.passed += passed;
                results.failed += failed;
                results.skipped += skipped;
                counted += failed;
            } else if let Some(test) =
                line.strip_prefix("test ").and_then(|line| line.strip_suffix("... FAILED"))
            {
                let test = test.trim_end();
                let name = if self.name.ends_with(test) {
                    self.name.clone()
                } else {
                    format!("{}::{test}", self.name)
                };
                results.failures.push(name);
            }
        }
        if let Err(why) = &self.ended
            && counted == 0
        {
            // The process ended before its closing line.
            results.failed += 1;
            results.failures.push(format!("{} ({why})", self.name));
        }
        results.times.push((self.took, self.name.clone()));
        self.ended.is_ok() && counted == 0
    }
}

/// Returns the numbers of passed, failed and skipped tests from the closing line of a test program: `test
/// result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; ...`.
///
/// Other parts run the tests that were filtered out.
fn closing_line(line: &str) -> Option<(u64, u64, u64)> {
    let (_, results) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |what: &str| -> Option<u64> {
        results.split("; ").find_map(|part| part.strip_suffix(what))?.trim().parse().ok()
    };
    Some((count("passed")?, count("failed")?, count("ignored")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(name: &str, output: &[&str], ended: Result<(), String>) -> Outcome {
        Outcome { name: name.into(), output: output.join("\n"), ended, took: Duration::ZERO }
    }

    #[test]
    fn results_are_added_up() {
        let mut results = Results::default();
        let good = [
            "test a::b ... ok",
            "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s",
            "test result: what",
            "",
        ];
        assert!(outcome("one", &good, Ok(())).add_to(&mut results));
        let bad = [
            "test c::d ... FAILED",
            "test padded    ... FAILED",
            "test result: FAILED. 7 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
        ];
        assert!(!outcome("two", &bad, Err("exit status: 101".into())).add_to(&mut results));
        assert_eq!((results.passed, results.failed, results.skipped), (12, 2, 1));
        assert_eq!(results.failures, ["two::c::d", "two::padded"]);
    }

    #[test]
    fn a_program_that_dies_is_a_failure() {
        let mut results = Results::default();
        assert!(!outcome("linux::boots", &["test boots ..."], Err("signal: 11".into())).add_to(&mut results));
        assert_eq!((results.failed, results.failures), (1, vec!["linux::boots (signal: 11)".to_owned()]));
    }
}
