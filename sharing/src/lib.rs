//! The sharing engine of samepage: finds identical pages of running VMs and lets them share one
//! frame of memory. It knows pages and frames, and nothing of KVM, virtio or HTTP.
//!
//! Each folder uses only folders above it in this list; a test reads the imports (`tests/layers.rs`).
//!
//! - `collections`: sets of pages, and tables that grow and shrink in small steps.
//! - `memory`: what happens where guest RAM is mapped. [`ram`]: private anonymous memory of 4 KiB pages, or of
//!   huge ones as well. [`guest`]: one VM's memory, as the folders below reach it. [`local`]: the same in this
//!   process, with the window that protects, compares and remaps. [`calls`], [`uffd`], [`wakes`], [`pagemap`],
//!   [`content`]: the kernel's side of it. [`loss`]: memory that the host cannot supply ends one VM, never the
//!   process.
//! - `frames`: who is on which frame. [`store`]: the frames, pages of a sealed memory file, each of which lives as
//!   long as it has an owner. [`space`]: one VM's pages, and what they are mapped from.
//! - [`changes`]: which pages were written, and which are at rest.
//! - [`remote`]: memory of VMs that other processes hold.
//! - `index`: where content is looked up, by digest or by content.
//! - `policy`: what is worth it. [`budget`] and `pressure`: mappings; `huge`: which huge pages are split;
//!   [`hints`]: what devices know about pages; [`claims`]: what guests say that their pages are for;
//!   `give_back`: free memory of guests; `compaction`: holes in the store.
//! - [`blocks`]: disk blocks that the host keeps while no guest holds them.
//! - [`engine`]: all VMs of a group and their frames; what is done next, and the tasks that do it.
//! - `inspect`: what users are told. [`statistics`], [`by_type`], [`map`], [`pairs`]; [`audit`]: recounts
//!   everything from the kernel's page maps.
//! - [`service`]: engines at work, one for each group of VMs, and their threads under a ceiling of CPU time.

pub mod blocks;
pub mod changes;
pub(crate) mod collections;
pub mod engine;
pub(crate) mod frames;
pub(crate) mod index;
pub(crate) mod inspect;
pub(crate) mod memory;
pub(crate) mod numbers;
pub(crate) mod policy;
pub mod remote;
pub mod service;

pub use engine::{holds, removal, trust};
pub use frames::{space, store};
pub use inspect::{audit, by_type, map, pairs, statistics};
pub use memory::ram::{PAGE_SIZE, Ram};
pub use memory::{calls, content, guest, local, loss, pagemap, ram, uffd, wakes};
pub use numbers::{Digest, Slot};
pub use policy::{budget, claims, hints};
