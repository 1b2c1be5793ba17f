//! What an x86-64 guest finds at its start: address space, CPU identification, registers.

pub(crate) mod cpuid;
pub mod layout;
pub(crate) mod registers;
