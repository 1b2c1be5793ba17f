//! All VMs of a process: made, asked for actions, counted, and listed also when they have ended.
//!
//! - [`manager`] makes VMs and does what they are asked for; [`record`] outlives each VM's machine.
//! - [`fleet`] has the machines that there are, and collects their ends.
//! - [`translate`] makes configurations of what clients say, [`config_file`] reads it from files.
//! - [`events`] tells what happens, [`statistics`] what VMs use and share.
//! - [`host_limits`] says how much memory may be promised to guests.
//!
//! Nothing here knows HTTP: `samepage-api` brings it to clients.

pub mod backlog;
pub mod config_file;
pub mod engine;
pub mod events;
pub mod fleet;
pub mod host_limits;
pub mod manager;
pub mod record;
pub mod schema;
pub mod statistics;
pub mod stats_writer;
pub mod stdin;
pub mod translate;
pub mod trouble;
