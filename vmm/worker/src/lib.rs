//! Machines wherever they are: in this process, or in worker processes.
//!
//! [`machine`] is what a machine can do, wherever it is. [`pool`] starts worker processes and builds machines in them,
//! [`serve`] is what such a process does. They speak over a socket ([`messages`], `wire`). The engine that shares
//! memory stays with the managing process, and asks workers for what it needs over a connection of its own.
//!
//! A worker that ends takes its VMs along and nobody else: what it had mapped is given back when its process is gone.
//! Where the managing process has a folder for its [`state`], its workers outlive it, and the next one takes them over.

pub mod adopt;
pub(crate) mod disks;
pub(crate) mod elsewhere;
pub mod machine;
pub(crate) mod messages;
pub mod pool;
pub mod process;
pub mod report;
pub mod serve;
pub mod state;
pub(crate) mod wire;
