//! samepage: a virtual machine monitor on KVM that hosts many VMs in one process and lets them share
//! identical memory.
//!
//! - [`Hypervisor`] is the host's KVM, opened once.
//! - [`VmConfig`] says what a VM is to be like, [`Vm`] is one.
//! - [`fleet`] runs several of them and collects their ends.
//! - [`oracle`] says what sharing could save in given memory, without running anything.
//! - [`host_limits`] says how much memory may be promised to guests.
//! - [`huge_pages`] says whether their memory can be backed with huge pages.
//!
//! Guests are not trusted: what they send (registers, descriptors, requests) and the images they boot
//! from are checked, and what is wrong ends the one VM it belongs to.

pub mod api;
pub mod boot;
pub mod by_type;
pub mod config;
pub mod console;
pub mod counted;
pub mod fleet;
pub mod host_limits;
pub mod huge_pages;
pub mod hypervisor;
mod log_file;
pub mod oracle;
pub mod poll;
pub mod signals;
pub mod statistics;
pub mod vm;
pub mod web;
pub mod x86;

pub use boot::ImageSource;
pub use config::{ConsoleConfig, DiskConfig, MemoryHole, VmConfig};
pub use fleet::Fleet;
pub use huge_pages::HugePages;
pub use hypervisor::Hypervisor;
pub use vm::{CrashReport, Vm, VmEnd, VmError, VmHandle, VmState};
