//! One virtual machine on KVM: what it is made from, how its kernel is booted, how it runs and how it ends.
//!
//! - [`Hypervisor`] is the host's KVM, opened once.
//! - [`VmConfig`] says what a VM is to be like, [`Vm`] is one.
//! - [`huge_pages`] says whether its memory can be backed with huge pages.
//!
//! Guests are not trusted: what they send (registers, descriptors, requests) and the images they boot
//! from are checked, and what is wrong ends the one VM it belongs to. Nothing here knows of other VMs, of
//! clients or of HTTP.

pub mod boot;
pub mod config;
mod console;
pub mod huge_pages;
pub mod hypervisor;
pub mod vm;
pub mod x86;

pub use boot::ImageSource;
pub use config::{ConsoleConfig, DiskConfig, HugePages, MemoryHole, Validated, VmConfig};
pub use hypervisor::Hypervisor;
pub use vm::{CrashReport, Vm, VmEnd, VmError, VmHandle, VmState};
