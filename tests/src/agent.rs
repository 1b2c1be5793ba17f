//! What the agent of a Linux guest says on its console.

use crate::guests::Guest;

/// Waits for the agent's line on a command, and gives its figures.
///
/// # Panics
/// Where the command fails, or says nothing for long.
pub fn said(guest: &Guest, command: &str) -> String {
    guest.console.wait_for(command, |line| {
        let said = line.strip_prefix("samepage-agent: ")?;
        assert!(!said.contains(" failed: "), "{line}");
        said.strip_prefix(command).map(str::to_owned)
    })
}

/// A figure of the agent's.
///
/// # Panics
/// Where it is not there.
pub fn figure(figures: &str, name: &str) -> f64 {
    let value = figures.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let value = value.unwrap_or_else(|| panic!("no {name} in {figures:?}"));
    value.parse().unwrap_or_else(|error| panic!("{name} in {figures:?}: {error}"))
}
