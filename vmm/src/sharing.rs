//! The sharing engine as a guard of guest memory.

use std::any::Any;
use std::error::Error;

use samepage_sharing::service::Sharing;

use crate::vm::guard::{GuardMemory, MemoryAccess};

impl GuardMemory for Sharing {
    fn attach(&self, access: MemoryAccess) -> Result<Box<dyn Any + Send>, Box<dyn Error + Send + Sync>> {
        let vm = access.vm.clone();
        let lost = move |error: &_| vm.fail(format!("its memory was lost while it was shared: {error}"));
        Ok(Box::new(self.add(access.memory.ram().clone(), Box::new(lost))?))
    }
}
