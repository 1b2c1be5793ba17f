//! Sets of pages, and tables that grow and shrink in small steps.

pub(crate) mod pieces;
pub(crate) mod segments;
pub(crate) mod sets;
