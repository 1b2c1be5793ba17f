//! What happens where guest RAM is mapped: the only folder that changes mappings.

pub(crate) mod backing;
pub mod calls;
pub mod content;
pub mod loss;
pub(crate) mod page_types;
pub mod pagemap;
pub mod ram;
pub mod space;
pub mod store;
pub mod uffd;
pub mod wakes;
pub(crate) mod window;
