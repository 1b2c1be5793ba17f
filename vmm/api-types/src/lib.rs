//! What clients send and get over the control socket, as types: requests, views, events and problems.
//!
//! Types with their JSON and their schema, and nothing else: whoever makes VMs or shows them depends on these, and
//! they depend on neither.

pub mod by_type;
pub mod events;
pub mod lifecycle;
pub mod problem;
pub mod views;

/// The protocol that the stream of a console is upgraded to: bytes of the console, both ways.
pub const CONSOLE_PROTOCOL: &str = "samepage-console";
