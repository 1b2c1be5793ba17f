//! The thread that waits for the ends of VMs, and for room at their consoles.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};
use std::thread;

use parking_lot::Mutex;
use samepage_machine::vm::Vm;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::outbox::Outbox;
use crate::messages::{Told, VmNumber};

/// In the number of an event: it is the console's and not the end's.
const CONSOLE: u64 = 1 << 32;
/// Stack of the thread, in bytes.
const STACK_BYTES: usize = 64 << 10;

#[derive(Clone)]
pub(super) struct Watch {
    epoll: Arc<Epoll>,
    known: Arc<Mutex<HashMap<VmNumber, Watched>>>,
}

struct Watched {
    vm: Weak<Vm>,
    room: EventFd,
}

impl Watch {
    /// Starts the thread. It calls `on_end` when a VM has ended, and tells it then.
    pub(super) fn start(
        outbox: &Arc<Outbox>,
        on_end: impl Fn(VmNumber) + Send + 'static,
    ) -> io::Result<Self> {
        let watch = Self { epoll: Arc::new(Epoll::new()?), known: Arc::default() };
        let (watching, outbox) = (watch.clone(), Arc::clone(outbox));
        thread::Builder::new().name("ends".into()).stack_size(STACK_BYTES).spawn(move || {
            let mut events = [EpollEvent::default(); 16];
            loop {
                // Waiting fails when it is interrupted, and otherwise never.
                let count = watching.epoll.wait(-1, &mut events).unwrap_or(0);
                events[..count].iter().for_each(|event| watching.tell(event.data(), &outbox, &on_end));
            }
        })?;
        Ok(watch)
    }

    /// Watches a VM, which may have ended already.
    pub(super) fn add(&self, number: VmNumber, vm: &Arc<Vm>) -> io::Result<()> {
        let room = EventFd::new(libc_flags())?;
        vm.set_serial_room_event(room.try_clone()?);
        let data = u64::from(number.0);
        self.epoll.ctl(
            ControlOperation::Add,
            room.as_raw_fd(),
            EpollEvent::new(EventSet::IN, CONSOLE | data),
        )?;
        let end = vm.end_event().as_raw_fd();
        self.known.lock().insert(number, Watched { vm: Arc::downgrade(vm), room });
        self.epoll.ctl(ControlOperation::Add, end, EpollEvent::new(EventSet::IN, data))
    }

    /// Watches a VM no more. It may be forgotten already.
    pub(super) fn forget(&self, number: VmNumber, vm: &Vm) {
        self.forget_end(vm);
        if let Some(watched) = self.known.lock().remove(&number) {
            let _ = self.epoll.ctl(ControlOperation::Delete, watched.room.as_raw_fd(), EpollEvent::default());
        }
    }

    fn forget_end(&self, vm: &Vm) {
        // The call fails only if the file is not watched, and then there is nothing to do.
        let end = vm.end_event().as_raw_fd();
        let _ = self.epoll.ctl(ControlOperation::Delete, end, EpollEvent::default());
    }

    fn tell(&self, data: u64, outbox: &Outbox, on_end: &impl Fn(VmNumber)) {
        let number = VmNumber(data as u32);
        let vm = {
            let known = self.known.lock();
            let Some(watched) = known.get(&number) else { return };
            if data & CONSOLE != 0 {
                // Written again when there is room again.
                let _ = watched.room.read();
                outbox.send(&Told::Room { vm: number });
                return;
            }
            watched.vm.upgrade()
        };
        if let Some(vm) = vm {
            self.forget_end(&vm);
            on_end(number);
            outbox.send_after_console(number, &Told::Ended { vm: number, end: vm.wait() });
        }
    }
}

fn libc_flags() -> i32 {
    libc::EFD_NONBLOCK | libc::EFD_CLOEXEC
}
