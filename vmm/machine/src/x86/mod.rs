//! What an x86-64 guest finds at its start: address space, CPU identification, registers, and how
//! its interrupts are wired.

pub(crate) mod cpuid;
pub mod layout;
pub(crate) mod mptable;
pub(crate) mod registers;
