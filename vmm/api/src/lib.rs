//! The control socket: VMs of this process made, watched and steered over HTTP.
//!
//! [`server`] listens to the socket, and with [`http`] to a port for browsers. `routes` has the resources, `views`
//! what they answer and `problem` what they answer when something is wrong.
//!
//! The description that clients get is generated from the types of `samepage-api-types`: [`openapi`]. For people it
//! is in `docs/api.md`.

mod error_mapping;
mod extract;
mod filter;
pub mod http;
pub mod listener;
mod maps;
mod metrics;
mod negotiate;
mod problem;
mod response_cache;
mod routes;
mod sampling;
pub mod server;
mod views;
pub mod write_timeout;

pub use extract::MAX_BODY;
pub use routes::openapi;
