//! The state of an x86-64 machine at its start: address space, CPU identification, registers and interrupt
//! wiring.

pub(crate) mod acpi;
pub(crate) mod cpuid;
mod features;
pub mod layout;
pub(crate) mod mptable;
pub(crate) mod registers;
pub(crate) mod reset_vector;
pub(crate) mod topology;
mod xsave;
