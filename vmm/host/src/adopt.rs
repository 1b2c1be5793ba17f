//! VMs that have outlived the process that managed them: this process manages them from now on.

use std::io;
use std::sync::Arc;

use samepage_api_types::events::Happening;
use samepage_machine::config::VmConfig;
use samepage_machine::vm::VmEnd;
use samepage_worker::adopt::{Adopted, Adoption, LeftAlone, Missed};

use crate::conflicts::Uses;
use crate::record::Record;
use crate::registry::Registry;

impl Registry {
    /// Adds VMs of other workers to this registry, as they are. Those that have ended are to be collected.
    ///
    /// # Errors
    /// Fails if the process is out of files. Then the VMs are to be [let go](samepage_worker::pool::Workers::let_go).
    pub fn adopt(&self, adoption: Adoption) -> io::Result<Vec<Arc<Record>>> {
        let Adoption { vms, left, missed } = adoption;
        for LeftAlone { worker, reason } in left {
            self.events.tell(Happening::Left { worker, message: reason });
        }
        for vm in missed {
            self.list_ended(vm)?;
        }
        vms.into_iter().map(|vm| self.adopt_one(vm)).collect()
    }

    fn adopt_one(&self, vm: Adopted) -> io::Result<Arc<Record>> {
        let record = self.new_record(vm.spec.clone())?;
        let before = vm.follow(record.backlog.sink());
        record.backlog.note_lost(before);
        self.records.lock().insert(record.name().to_owned(), Arc::clone(&record));
        self.install(&record, vm.machine())?;
        record.continue_from(vm.has_run, vm.since);
        record.list();
        let (name, state, worker) = (record.name().to_owned(), record.state(), vm.worker);
        self.events.tell(Happening::Adopted { vm: name, state, worker });
        Ok(record)
    }

    /// Lists a VM that has ended, and whose worker has ended as well.
    fn list_ended(&self, Missed { spec, end, since }: Missed) -> io::Result<()> {
        let record = self.new_record(spec)?;
        if let VmEnd::Crashed(report) = &end {
            let vm = record.name().to_owned();
            self.events.tell(Happening::Crash { vm, report: report.to_string() });
        }
        record.note_end(end, since);
        self.records.lock().insert(record.name().to_owned(), Arc::clone(&record));
        record.list();
        self.tell_state(&record);
        Ok(())
    }

    fn new_record(&self, spec: samepage_spec::VmSpec) -> io::Result<Arc<Record>> {
        let uses = Uses::of(&VmConfig::from(spec.clone()));
        Ok(Arc::new(Record::new(spec, uses, self.common.sharing.is_some())?))
    }
}
