//! One virtual machine on KVM: its configuration, the boot of its kernel, its run and its end.
//!
//! - [`Hypervisor`] is the host's KVM, opened once.
//! - [`VmConfig`] describes a VM, and [`Vm`] is a VM.
//! - [`exits`] counts how often a vCPU leaves its guest.
//! - [`huge_pages`] tells whether the host can back a VM's memory with huge pages.
//!
//! Guests are not trusted. All data from guests (registers, descriptors, requests) and from kernel images is
//! checked. Invalid data ends only the VM that it belongs to. This crate knows nothing of other VMs, of
//! clients or of HTTP.

pub mod boot;
pub mod config;
mod console;
pub mod exits;
pub mod huge_pages;
pub mod hypervisor;
mod numa;
pub mod seed;
pub mod vm;
pub mod x86;

pub use boot::ImageSource;
pub use config::{ConsoleConfig, DiskSpec, HugePages, MemoryHole, Size, Validated, VmConfig, VmSpec};
pub use hypervisor::Hypervisor;
pub use vm::{CrashReport, Vm, VmEnd, VmError, VmHandle, VmState};
