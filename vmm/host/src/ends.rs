//! The ends of machines: one file that becomes readable when any of them has ended.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use samepage_machine::vm::VmEnd;
use samepage_worker::machine::Machine;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// A machine that has ended and is gone.
#[derive(Debug)]
pub struct Ended {
    /// The VM's name.
    pub name: String,
    /// How the machine ended.
    pub end: VmEnd,
    /// Bytes of console output that were dropped, because nobody read them.
    pub console_lost: u64,
    /// The machine was stopped for a reset, so the VM boots again.
    pub is_reset: bool,
}

/// The number of a machine, in the order in which machines were added. Never used again in a process.
pub(crate) type MachineNumber = u64;

/// Watches machines for their ends.
#[derive(Debug)]
pub(crate) struct Ends {
    epoll: Epoll,
    next: AtomicU64,
}

impl Ends {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, next: AtomicU64::new(0) })
    }

    pub(crate) fn next_number(&self) -> MachineNumber {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Watches a machine, which may have ended already.
    pub(crate) fn watch(&self, vm: &dyn Machine, number: MachineNumber) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, number);
        self.epoll.ctl(ControlOperation::Add, vm.end_event(), event)
    }

    pub(crate) fn forget(&self, vm: &dyn Machine) {
        // The call fails only if the file is not watched, and then there is nothing to do.
        let _ = self.epoll.ctl(ControlOperation::Delete, vm.end_event(), EpollEvent::default());
    }

    /// Returns machines that have ended and are still watched, up to 16. Does not wait.
    pub(crate) fn ready(&self) -> io::Result<Vec<MachineNumber>> {
        let mut events = [EpollEvent::default(); 16];
        loop {
            match self.epoll.wait(0, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                count => return Ok(events[..count?].iter().map(EpollEvent::data).collect()),
            }
        }
    }
}

impl AsRawFd for Ends {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}
