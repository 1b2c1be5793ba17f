//! Memory of VMs in other processes: the engine's half has numbers, and a *worker*, which holds the VMs, has their
//! memory.
//!
//! A worker and the engine have one connection, a pair of sockets that keep messages apart, and one [`buffer`] of
//! memory that both have mapped. The engine asks, and the worker answers; pages and long lists are in the buffer.
//!
//! - [`messages`]: what both say, as plain data.
//! - [`worker`]: the engine's end, which knows the worker's process and notices its end.
//! - [`memory`] and [`log`]: a VM of the worker's, as the engine reaches it.
//! - [`ahead`]: what the logs of VMs said that were read with another one's.
//! - [`serve`]: the worker's end.
//!
//! # Who trusts whom
//! The worker trusts the engine, which alone writes frames; the worker can only read them. The engine believes a worker
//! about the worker's own VMs. It checks every number that it is told. An answer that makes no sense ends the worker.
//!
//! # When a worker dies
//! It may die at any point: in a window, or with an answer on its way. Whether its pages were mapped then is not known,
//! and does not matter: nothing is done about it before the process has ended, and with it all of its mappings. So a
//! frame that the engine counts as shared by a dead worker's VM can be given up at once, like any other.

pub(crate) mod ahead;
pub(crate) mod buffer;
pub(crate) mod log;
pub(crate) mod memory;
pub(crate) mod messages;
pub mod serve;
pub(crate) mod socket;
pub mod worker;
