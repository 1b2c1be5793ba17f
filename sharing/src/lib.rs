//! The sharing engine of samepage: finds identical pages of running VMs and lets them share one
//! frame of memory. It knows pages and frames, and nothing of KVM, virtio or HTTP.
//!
//! - [`ram`]: guest RAM, private anonymous memory of 4 KiB pages.
//! - [`store`]: the frames, pages of a sealed memory file, each counted while guests refer to it.
//! - [`space`]: one VM's RAM under management; the window that protects, compares and remaps.
//! - [`engine`]: what is done next; `follow` and `passes`: which pages to look at; `search`: what to
//!   merge them with; `index`: where content is looked up.
//! - [`changes`], [`rest`]: which pages were written, and which have come to rest.
//! - [`service`]: the engine on a thread of its own, under a ceiling of CPU time.
//! - [`audit`]: recounts everything from the kernel's page maps and compares it with the books.
//! - [`calls`], [`uffd`], [`pagemap`], [`content`], [`budget`]: the kernel's side of it.

pub mod audit;
pub mod budget;
pub mod calls;
pub mod changes;
pub mod content;
pub mod engine;
pub(crate) mod follow;
pub(crate) mod index;
pub(crate) mod members;
pub mod pagemap;
pub(crate) mod passes;
pub mod ram;
pub mod rest;
pub(crate) mod search;
pub mod service;
pub mod space;
pub mod statistics;
pub mod store;
pub mod uffd;

pub use ram::{PAGE_SIZE, Ram};
