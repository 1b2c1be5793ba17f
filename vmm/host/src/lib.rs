//! All VMs of a process: created, acted on, counted, and listed also when they have ended.
//!
//! - [`registry`] has the VMs, makes them, counts them and collects their ends; [`record`] is one VM and
//!   outlives its machines. `actions` has the actions on VMs, and `adopt` takes VMs of an earlier process over.
//! - [`conflicts`] finds files that VMs cannot have in common, [`error`] has the errors of all of these.
//! - [`validated`] validates the description of a VM, [`config_file`] reads descriptions.
//! - [`events`] is the log of events, [`statistics`] counts what VMs use and share.
//! - [`governor`] holds VMs before they run out of memory together.
//! - [`host_limits`] measures how much memory may be promised to guests.
//!
//! Nothing here knows HTTP, which is in `samepage-api`.

mod actions;
mod adopt;
pub mod backlog;
mod build;
pub mod config_file;
pub mod conflicts;
pub mod disk_errors;
pub mod ends;
pub mod engine;
pub mod error;
pub mod events;
pub mod governor;
pub mod host_limits;
pub mod record;
pub mod registry;
pub mod schema;
pub mod statistics;
pub mod stats_writer;
pub mod stdin;
pub mod validated;
