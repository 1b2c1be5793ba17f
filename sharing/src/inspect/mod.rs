//! What users are told about VMs that share: statistics, pictures, and an audit of all metadata.

pub mod audit;
pub mod by_type;
pub mod map;
pub mod pairs;
pub mod statistics;
pub(crate) mod survey;
