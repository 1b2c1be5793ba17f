//! Why a VM could not be built.

use std::convert::Infallible;
use std::error::Error as StdError;
use std::io;

use samepage_devices::virtio::mmio::TransportError;
use samepage_devices::virtio::vsock::VsockError;
use samepage_sharing::service::StartError;
use thiserror::Error;

use crate::boot::BootError;
use crate::config::ConfigError;

/// The reason why a VM could not be built. The caller adds the VM's name.
#[derive(Debug, Error)]
pub enum VmError {
    /// The configuration has a fault.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The kernel, the initrd or the command line has a fault.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The memory could not be reserved.
    #[error(
        "reserve {bytes} bytes of guest memory: {source}; give the VM less memory, or raise the limits on address space (ulimit -v) and commit (vm.overcommit_memory)"
    )]
    Memory {
        /// The size of the memory.
        bytes: u64,
        /// The error of the system call.
        source: io::Error,
    },
    /// The memory could not be taken from a NUMA node.
    #[error("take guest memory from node {node} of the host: {source}; leave the node out")]
    NumaNode {
        /// The number of the node.
        node: u32,
        /// The error of the system call.
        source: io::Error,
    },
    /// An ioctl of KVM failed.
    #[error("{what}: {source}{}", kvm_hint(.source))]
    Kvm {
        /// The step that failed.
        what: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
    /// More vCPUs than KVM gives to a VM.
    #[error("{asked} vCPUs: KVM gives a VM {most} at most on this host; ask for fewer")]
    Vcpus {
        /// The number in the description.
        asked: u32,
        /// The upper limit.
        most: u32,
    },
    /// CPUID could not be prepared.
    #[error("describe the processor to the guest: {0}")]
    Cpuid(String),
    /// The tables for the first instructions could not be written.
    #[error("write the guest's first tables: {0}")]
    Tables(vm_memory::GuestMemoryError),
    /// The host's kernel has no random bytes.
    #[error("get random bytes for the VM generation ID: {0}")]
    Random(io::Error),
    /// The process is out of files or threads.
    #[error("open an event: {0}; raise the limit of open files (ulimit -n)")]
    Event(io::Error),
    /// The console's file.
    #[error("open the console {path}: {source}")]
    Console {
        /// The path, or a description of the target.
        path: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// A disk.
    #[error("disk {id}: {source}")]
    Disk {
        /// The disk's name.
        id: String,
        /// The error.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A network device.
    #[error("network device {id}: {source}")]
    Network {
        /// The device's name.
        id: String,
        /// The error.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The socket device.
    #[error("socket device: {0}")]
    Vsock(#[source] VsockError),
    /// The port of the memory hole.
    #[error("make the port of the memory hole: {0}")]
    Port(#[source] TransportError),
    /// A virtio device that is no disk.
    #[error("make {what}: {source}")]
    Device {
        /// The device.
        what: &'static str,
        /// The error.
        source: TransportError,
    },
    /// The sharing engine could not accept the memory.
    #[error("share the memory: {0}; the host is out of memory or of mappings (vm.max_map_count)")]
    Sharing(#[source] StartError),
    /// The memory could not be offered to the sharing engine of another process.
    #[error(
        "offer the memory to the sharing engine: {0}; the host is out of memory or of mappings (vm.max_map_count)"
    )]
    Offer(#[source] io::Error),
    /// A thread could not be started.
    #[error(
        "start the thread of a vCPU: {0}; raise the limits on processes (ulimit -u, pids.max) and on mappings (vm.max_map_count)"
    )]
    Thread(io::Error),
}

impl From<Infallible> for VmError {
    /// A validated configuration has no errors.
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

impl VmError {
    pub(super) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| VmError::Kvm { what, source: error.into() }
    }
}

fn kvm_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => "; another hypervisor may be using the processor's virtualization",
        Some(libc::EMFILE) => "; raise the limit of open files (ulimit -n)",
        Some(libc::ENOMEM) => "; the host is out of memory or of mappings (vm.max_map_count)",
        _ => "",
    }
}
