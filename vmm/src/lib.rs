//! samepage: a virtual machine monitor on KVM that hosts many VMs in one process and lets them share
//! identical memory.
//!
//! - [`fleet`] runs several VMs and collects their ends.
//! - [`host_limits`] says how much memory may be promised to guests.

pub mod api;
pub mod fleet;
pub mod host_limits;
pub mod statistics;

pub use fleet::Fleet;
