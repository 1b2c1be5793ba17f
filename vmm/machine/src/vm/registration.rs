//! A VM's memory among what this process offers to an engine of another process.

use std::io;
use std::sync::Arc;

use samepage_sharing::Ram;
use samepage_sharing::changes::ChangeLog;
use samepage_sharing::remote::serve::Vms;
use samepage_sharing::remote::worker::VmIndex;

/// The offer, until this value goes. The engine has emptied the memory by then, or is gone.
#[derive(Debug)]
pub(super) struct Registration {
    vms: Arc<Vms>,
    index: VmIndex,
}

impl Registration {
    /// Offers RAM, and what notes the writes to it.
    ///
    /// # Errors
    /// Fails if the RAM cannot be registered with userfaultfd.
    pub(super) fn new(vms: &Arc<Vms>, ram: Arc<Ram>, log: Option<Box<dyn ChangeLog>>) -> io::Result<Self> {
        Ok(Self { vms: Arc::clone(vms), index: vms.add(ram, log)? })
    }

    /// Returns the number by which the engine asks for it.
    pub(super) fn index(&self) -> VmIndex {
        self.index
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.vms.remove(self.index);
    }
}
