//! Errors of the host about disks. They go to the operator of the host, and not only to the guest.

use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::events::EventLog;
use samepage_api_types::events::Happening;
use samepage_worker::machine::Machine;

/// A handler of disk errors. It is called with a sentence, and a disk's worker waits until it returns.
pub type DiskErrorHandler = Box<dyn Fn(&str) + Send + Sync>;

/// Passes disk errors on to the event log and to a handler.
#[derive(Default)]
pub(crate) struct DiskErrors {
    events: Arc<EventLog>,
    handler: OnceLock<DiskErrorHandler>,
}

impl fmt::Debug for DiskErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskErrors").finish_non_exhaustive()
    }
}

impl DiskErrors {
    pub(crate) fn new(events: Arc<EventLog>) -> Self {
        Self { events, handler: OnceLock::new() }
    }

    /// Sets the handler. Only the first call has an effect.
    pub(crate) fn set_handler(&self, handler: DiskErrorHandler) {
        let _ = self.handler.set(handler);
    }

    /// Passes on the errors of a VM's disks from now on.
    pub(crate) fn watch(self: &Arc<Self>, vm: &dyn Machine) {
        let (disk_errors, name) = (Arc::clone(self), vm.name().to_owned());
        vm.observe_disk_errors(Arc::new(move |disk, message| disk_errors.tell(&name, disk, message)));
    }

    fn tell(&self, vm: &str, disk: &str, message: &str) {
        if let Some(handler) = self.handler.get() {
            handler(&format!("VM {vm}: disk {disk}: {message}"));
        }
        let (vm, disk, message) = (vm.to_owned(), disk.to_owned(), message.to_owned());
        self.events.tell(Happening::Disk { vm, disk, message });
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    #[test]
    fn errors_go_to_the_event_log_and_to_the_handler() {
        let events = Arc::<EventLog>::default();
        let disk_errors = DiskErrors::new(Arc::clone(&events));
        disk_errors.tell("web", "root", "flush: no");
        assert_eq!(events.last(), 1);
        let told = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&told);
        disk_errors.set_handler(Box::new(move |text| heard.lock().push(text.to_owned())));
        disk_errors.tell("web", "root", "flush: no");
        assert_eq!(*told.lock(), ["VM web: disk root: flush: no"]);
        assert_eq!(events.last(), 2);
    }
}
