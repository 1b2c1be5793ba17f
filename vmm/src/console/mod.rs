//! The guest's console on the host: where its output goes, and how a terminal becomes its input.

pub mod escape;
pub(crate) mod sink;
pub mod terminal;
