//! What the integration tests share: guests whose consoles can be waited for, the program as its
//! users run it, counts of what a process holds, and a harness that says when KVM is missing instead
//! of failing obscurely.

pub mod agent;
pub mod api;
pub mod browser;
pub mod console;
pub mod exits;
pub mod guests;
pub mod harness;
pub mod process;
pub mod program;
pub mod proxy;
pub mod shared;
pub mod terminal;
