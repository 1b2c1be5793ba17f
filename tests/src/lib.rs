//! What the integration tests share: guests whose consoles can be waited for, counts of what a
//! process holds, and a harness that says when KVM is missing instead of failing obscurely.

pub mod console;
pub mod guests;
pub mod harness;
pub mod process;
