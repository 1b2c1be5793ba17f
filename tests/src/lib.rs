//! The common parts of the integration tests: guests with consoles to wait for, the program as users run it,
//! counts of a process's resources, and a harness that reports a missing KVM clearly.

pub mod agent;
pub mod api;
pub mod browser;
pub mod console;
pub mod disks;
pub mod guests;
pub mod harness;
pub mod limited;
pub mod process;
pub mod program;
pub mod progress;
pub mod proxy;
pub mod shared;
pub mod terminal;
