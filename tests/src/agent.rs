//! The output of a Linux guest's agent on its console.

use crate::guests::Guest;

/// Waits for the agent's line about a command, and returns its figures.
///
/// # Panics
/// Panics if the command fails, or if no line comes.
pub fn said(guest: &Guest, command: &str) -> String {
    guest.console.wait_for(command, |line| {
        let said = line.strip_prefix("samepage-agent: ")?;
        assert!(!said.contains(" failed: "), "{line}");
        said.strip_prefix(command).map(str::to_owned)
    })
}

/// Returns a figure of the agent.
///
/// # Panics
/// Panics if the figure is missing.
pub fn figure(figures: &str, name: &str) -> f64 {
    let value = figures.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let value = value.unwrap_or_else(|| panic!("no {name} in {figures:?}"));
    value.parse().unwrap_or_else(|error| panic!("{name} in {figures:?}: {error}"))
}
