//! Runs tests that need KVM: one after the other, since each of them measures the process, and
//! counted as ignored where KVM may be missing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use samepage::Hypervisor;

/// Tests are skipped, visibly, where this is set to 1 and KVM cannot be used.
pub const WITHOUT_KVM: &str = "SAMEPAGE_TESTS_WITHOUT_KVM";

/// A test: its name and what it does.
pub type Test = (&'static str, fn());

/// Runs tests that need KVM. Without KVM they fail with the reason, or are ignored where
/// [`WITHOUT_KVM`] asks for it.
#[must_use]
pub fn run(tests: &[Test]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Mappings, memory and descriptors of the process are what these tests count.
    arguments.test_threads = Some(1);
    let missing = Hypervisor::open().err().map(|error| error.to_string());
    let skip = missing.is_some() && std::env::var_os(WITHOUT_KVM).is_some_and(|value| value == "1");
    let trials = tests
        .iter()
        .map(|&(name, test)| {
            let missing = missing.clone();
            Trial::test(name, move || match missing {
                Some(reason) => Err(format!("needs KVM: {reason} ({WITHOUT_KVM}=1 skips such tests)").into()),
                None => catch_unwind(AssertUnwindSafe(test)).map_err(|panic| Failed::from(text(&*panic))),
            })
            .with_ignored_flag(skip)
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panicked".into())
}
