//! Disks in trouble: what goes wrong on the host's side is told to whoever runs the host, not to the guest
//! alone.

use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::events::EventLog;
use samepage_api_types::events::Happening;
use samepage_machine::vm::Vm;

/// Hears of trouble, a sentence at a time. Workers of disks wait for it.
pub type Teller = Box<dyn Fn(&str) + Send + Sync>;

/// Where trouble is told.
#[derive(Default)]
pub(crate) struct Troubles {
    events: Arc<EventLog>,
    teller: OnceLock<Teller>,
}

impl fmt::Debug for Troubles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Troubles").finish_non_exhaustive()
    }
}

impl Troubles {
    pub(crate) fn new(events: Arc<EventLog>) -> Self {
        Self { events, teller: OnceLock::new() }
    }

    /// Has somebody told besides those who watch events. The first who asks for it stays.
    pub(crate) fn set_teller(&self, teller: Teller) {
        let _ = self.teller.set(teller);
    }

    /// From now on hears of a VM's disks.
    pub(crate) fn watch(self: &Arc<Self>, vm: &Vm) {
        for disk in vm.disks() {
            let (troubles, vm, id) = (Arc::clone(self), vm.name().to_owned(), disk.id.clone());
            disk.stats.observe_trouble(Box::new(move |message| troubles.tell(&vm, &id, message)));
        }
    }

    fn tell(&self, vm: &str, disk: &str, message: &str) {
        if let Some(teller) = self.teller.get() {
            teller(&format!("VM {vm}: disk {disk}: {message}"));
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
    fn trouble_is_told_to_those_who_watch_and_to_one_more() {
        let events = Arc::<EventLog>::default();
        let troubles = Troubles::new(Arc::clone(&events));
        troubles.tell("web", "root", "flush: no");
        assert_eq!(events.last(), 1);
        let told = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&told);
        troubles.set_teller(Box::new(move |text| heard.lock().push(text.to_owned())));
        troubles.tell("web", "root", "flush: no");
        assert_eq!(*told.lock(), ["VM web: disk root: flush: no"]);
        assert_eq!(events.last(), 2);
    }
}
