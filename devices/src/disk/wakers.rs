//! Wakes the workers of a disk that wait for something other than their own I/O.

use std::io;
use std::sync::{Mutex, PoisonError, Weak};

use vmm_sys_util::eventfd::EventFd;

/// The workers of one disk.
#[derive(Debug, Default)]
pub(crate) struct Wakers(Mutex<Vec<Weak<EventFd>>>);

impl Wakers {
    /// An event that is written whenever the workers are woken, as long as it lives.
    pub(crate) fn register(&self) -> io::Result<std::sync::Arc<EventFd>> {
        let event = std::sync::Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        events.retain(|event| event.strong_count() > 0);
        events.push(std::sync::Arc::downgrade(&event));
        Ok(event)
    }

    /// Wakes all of them.
    pub(crate) fn wake(&self) {
        for event in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade) {
            // A full event counter is readable, which is all that the worker waits for.
            let _ = event.write(1);
        }
    }
}
