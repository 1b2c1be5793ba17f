//! What is worth it: the tables and rules of each policy, which know nothing of the engine.

pub mod budget;
pub mod claims;
pub(crate) mod compaction;
pub(crate) mod give_back;
pub mod hints;
pub(crate) mod huge;
pub(crate) mod pressure;
