//! The sharing engine of samepage: finds identical pages of running VMs and lets them share one
//! frame of memory. It knows pages and frames, and nothing of KVM, virtio or HTTP.
//!
//! - [`ram`]: guest RAM, private anonymous memory of 4 KiB pages, or of huge ones as well.
//! - [`store`]: the frames, pages of a sealed memory file, each of which lives as long as it has an owner;
//!   `records` and `extents`: its books; `compact`: closes the holes in it.
//! - [`space`]: one VM's RAM under management; the window that protects, compares and remaps (`window`);
//!   `backing`: what each page is mapped from.
//! - [`engine`]: what is done next; `hinted`, `follow` and `passes`: which pages to look at; `intervals`:
//!   when; `search`: what to merge them with; `index`, `table` and `tree`: where content is looked up; `undo`: taking pages off
//!   their frames again.
//! - `huge`: which huge pages stay whole, and which are split.
//! - [`cache`]: disk blocks that the host keeps while no guest holds them.
//! - [`hints`]: what devices know about pages.
//! - [`changes`], [`rest`]: which pages were written, and which have come to rest.
//! - [`claims`]: what guests say that their pages are for; [`by_type`]: what sharing comes to by that;
//!   `give_back`: free memory goes back to the host; [`map`]: a picture of a VM's memory.
//! - [`loss`]: memory that the host cannot supply ends one VM, never the process; `lost`: such VMs leave the
//!   indexes.
//! - [`trust`]: an engine that panicked, or whose frames the host lost, does nothing more.
//! - [`service`]: engines at work; `group`: an engine for each group of VMs; `worker` and `pace`:
//!   their threads, under a ceiling of CPU time.
//! - [`pairs`]: which VMs have how much in common.
//! - [`audit`]: recounts everything from the kernel's page maps and compares it with the books.
//! - [`calls`], [`uffd`], [`wakes`], [`pagemap`], [`content`], [`budget`]: the kernel's side of it.

pub mod audit;
pub(crate) mod backing;
pub mod budget;
pub mod by_type;
pub mod cache;
pub mod calls;
pub mod changes;
pub mod claims;
pub(crate) mod compact;
pub mod content;
pub mod engine;
pub(crate) mod extents;
pub(crate) mod follow;
pub(crate) mod give_back;
pub(crate) mod group;
pub(crate) mod hinted;
pub mod hints;
pub mod holds;
pub(crate) mod huge;
pub(crate) mod index;
pub(crate) mod intervals;
pub mod loss;
pub(crate) mod lost;
pub mod map;
pub(crate) mod members;
pub(crate) mod modes;
pub(crate) mod pace;
pub mod pagemap;
pub mod pairs;
pub(crate) mod passes;
pub(crate) mod pieces;
pub mod ram;
pub(crate) mod records;
pub mod removal;
pub mod rest;
pub(crate) mod search;
pub(crate) mod segments;
pub mod service;
pub mod space;
pub mod statistics;
pub mod store;
pub(crate) mod survey;
pub(crate) mod table;
pub(crate) mod tree;
pub mod trust;
pub(crate) mod turns;
pub mod uffd;
pub(crate) mod undo;
pub mod wakes;
pub(crate) mod window;
pub(crate) mod worker;

pub use ram::{PAGE_SIZE, Ram};
