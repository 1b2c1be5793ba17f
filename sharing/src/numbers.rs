//! Kinds of numbers that several folders use.

/// Number of a page among the pages of all VMs of an engine.
pub(crate) type Place = u32;
