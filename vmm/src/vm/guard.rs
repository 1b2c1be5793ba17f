//! How others take part in the life of a guest's memory.

use std::any::Any;
use std::error::Error;
use std::fmt::Debug;
use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::VmHandle;
use super::memory::VmMemory;

/// A VM's memory, for whoever is to change how it is backed while the guest runs.
#[derive(Debug, Clone)]
pub struct MemoryAccess {
    /// The memory: pages of the reservation, KVM's slots, what the VMM wrote.
    pub memory: VmMemory,
    /// KVM's VM, for the dirty log and the flags of memory slots.
    pub kvm: Arc<VmFd>,
    /// Ends the VM, should its memory be lost.
    pub vm: VmHandle,
}

/// Takes notice of a guest's memory, for example the sharing engine.
pub trait GuardMemory: Debug + Send + Sync {
    /// Called once for each VM, when its images are loaded and before its vCPUs run.
    ///
    /// What is returned is dropped when vCPUs and devices have stopped for good and the memory is still
    /// there. After that drop nobody may touch the memory: every clone of `access` is gone by then.
    ///
    /// # Errors
    /// Keep the VM from starting.
    fn attach(&self, access: MemoryAccess) -> Result<Box<dyn Any + Send>, Box<dyn Error + Send + Sync>>;
}
