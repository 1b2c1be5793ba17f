//! Wakes workers of a disk that wait for an event other than their own I/O.

use std::io;
use std::sync::{Mutex, PoisonError, Weak};

use vmm_sys_util::eventfd::EventFd;

/// The workers of one disk.
#[derive(Debug, Default)]
pub(crate) struct Wakers(Mutex<Vec<Weak<EventFd>>>);

impl Wakers {
    /// Returns an event that every wake-up writes, as long as the event lives.
    pub(crate) fn register(&self) -> io::Result<std::sync::Arc<EventFd>> {
        let event = std::sync::Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        events.retain(|event| event.strong_count() > 0);
        events.push(std::sync::Arc::downgrade(&event));
        Ok(event)
    }

    /// Wakes all workers.
    pub(crate) fn wake(&self) {
        for event in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade) {
            // A full event counter is readable, and the worker needs no more than that.
            let _ = event.write(1);
        }
    }
}
