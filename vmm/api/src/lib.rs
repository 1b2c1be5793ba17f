//! The control socket: creates, shows and controls VMs of this process over HTTP.
//!
//! [`server`] listens to the socket, and with [`http`] to a port for browsers. `routes` has the resources,
//! `views` their responses, and `problem` the responses to errors.
//!
//! The OpenAPI description is generated from the types of `samepage-api-types`: [`openapi`]. `docs/api.md`
//! describes the API for people.

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
