//! The control socket: VMs of this process made, watched and steered over HTTP.
//!
//! - [`lifecycle`] is the table of what a VM can be asked for in which state.
//! - [`spec`] says what a VM is to be like; clients and configuration files share it.
//! - [`manager`] makes VMs and does what they are asked for; it knows no HTTP.
//! - [`server`] listens to the socket, and with [`http`] to a port for browsers; `routes` has the resources, [`views`] what they answer and [`problem`] what they
//!   answer when something is wrong.
//!
//! The description that clients get is generated from these types: [`openapi`]. For people it is in
//! `docs/api.md`.

pub mod backlog;
pub mod config_file;
pub mod events;
mod explain;
mod extract;
mod filter;
pub mod http;
pub mod listener;
pub mod manager;
mod maps;
mod metrics;
mod negotiate;
pub mod patient;
mod problem;
pub mod record;
mod rendered;
mod routes;
mod sampling;
pub mod schema;
pub mod server;
pub mod translate;
pub mod trouble;
mod views;

pub use extract::MAX_BODY;
pub use manager::{Common, Manager, ManagerError};
pub use routes::openapi;
pub use server::{Doors, Server, ServerError};
