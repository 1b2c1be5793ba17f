//! What happens where guest RAM is mapped: the only folder that reads guests' pages and changes mappings. The folders
//! above reach one VM's memory through [`guest::GuestMemory`] alone.

pub mod calls;
pub mod content;
pub(crate) mod frame_view;
pub mod guest;
pub mod local;
pub mod loss;
pub mod pagemap;
pub mod ram;
pub mod uffd;
pub mod wakes;
pub(crate) mod window;
