//! How far the VMs of a process with a control socket have come, and waiting for it.

use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::api::Host;
use crate::console::TIME_LIMIT;

/// Waits until a condition holds.
///
/// # Panics
/// Panics if the condition does not become true.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < TIME_LIMIT, "{what} did not come about");
        // Other processes have no events for this one.
        std::thread::sleep(Duration::from_millis(20));
    }
    if begun.elapsed() > Duration::from_secs(10) {
        println!("{what} took {} s", begun.elapsed().as_secs());
    }
}

/// Returns the last round in which a guest has verified all its memory, as its console says.
#[must_use]
pub fn round_in(console: &str) -> u64 {
    let number = |line: &str| line.strip_prefix("round=")?.split(' ').next()?.parse().ok();
    console.lines().rev().find_map(number).unwrap_or(0)
}

impl Host {
    /// Returns a VM's state.
    ///
    /// # Panics
    /// Panics if there is no such VM.
    #[must_use]
    pub fn state(&self, vm: &str) -> String {
        self.done("GET", &format!("/vms/{vm}"), None)["state"].as_str().expect("a state").to_owned()
    }

    /// Returns how many pages sharing saves.
    ///
    /// # Panics
    /// Panics if the process gives no statistics.
    #[must_use]
    pub fn shared(&self) -> u64 {
        self.done("GET", "/sharing", None)["statistics"]["pages_sharing"].as_u64().expect("a number")
    }

    /// Returns the last round in which a guest has verified all its memory.
    ///
    /// # Panics
    /// Panics if there is no such VM.
    #[must_use]
    pub fn round(&self, vm: &str) -> u64 {
        round_in(&self.console(vm))
    }

    /// Ends the process, whose guests have found no wrong byte, and whose books were right at each end. Returns its
    /// folder.
    ///
    /// # Panics
    /// Panics if a guest or an audit has found a fault, or if the process ends with another status.
    pub fn end_sound(self, status: i32) -> TempDir {
        for vm in self.done("GET", "/vms", None).as_array().expect("a list") {
            assert_sound(&self.console(vm["name"].as_str().expect("a name")));
        }
        let (finished, folder) = self.end_and_keep();
        assert_eq!(finished.status.code(), Some(status), "{}", finished.stderr);
        let audits: Vec<_> = finished.stderr.lines().filter(|line| line.contains("audit of")).collect();
        assert!(
            !audits.is_empty() && audits.iter().all(|line| line.ends_with("passed")),
            "{}",
            finished.stderr
        );
        folder
    }
}

/// Asserts that a guest has found no wrong byte in its memory, and none on its disk.
///
/// # Panics
/// Panics with the console if it has.
pub fn assert_sound(console: &str) {
    let wrong = console.lines().find(|line| line.contains("corrupt=") && !line.contains("corrupt=0"));
    assert!(wrong.is_none() && !console.contains("blk-corrupt"), "{console}");
}
