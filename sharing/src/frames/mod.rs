//! Who is on which frame: numbers alone, and the store that the frames are in. No guest memory is read or mapped here.

pub(crate) mod backing;
pub(crate) mod page_types;
pub mod space;
pub mod store;
