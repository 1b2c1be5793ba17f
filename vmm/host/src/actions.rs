//! Actions on VMs: start, pause, resume, reset, stop, delete, change what is shared.

use std::sync::Arc;

use samepage_api_types::events::Happening;
use samepage_api_types::lifecycle::{Action, State};
use samepage_machine::vm::VmState;
use samepage_spec::SharingMode;
use samepage_worker::machine::Machine;

use crate::error::HostError;
use crate::record::{Cause, Record, Turn};
use crate::registry::Registry;
use crate::validated::validate;

impl Registry {
    /// Carries out an action, and returns the VM's state afterwards. After [`Action::Stop`], the caller waits for
    /// the guest, asks it again as [`TimeToEnd`] says, and kills the VM.
    ///
    /// [`TimeToEnd`]: samepage_machine::vm::TimeToEnd
    ///
    /// # Errors
    /// Fails if the VM's state does not allow the action, or if the machine cannot be built again. Then the VM has
    /// ended.
    pub fn act(&self, turn: &Turn, action: Action) -> Result<State, HostError> {
        let record = turn.record();
        let state = self.check(record, action)?;
        match action {
            Action::Start if state == State::Created => self.run(record, action)?,
            Action::Start => {
                record.wait_collected();
                self.boot(record, action)?;
            }
            Action::Resume => self.run(record, action)?,
            Action::Pause => {
                let vm = self.machine(record, action)?;
                vm.pause();
                if vm.state() == VmState::Ended {
                    let name = record.name().to_owned();
                    return Err(HostError::EndedMeanwhile { vm: name, action, end: vm.wait() });
                }
                record.note_change();
                self.tell_state(record);
            }
            Action::Reset => {
                let _operation = self.operation();
                self.end(record, Cause::Reset);
                self.boot(record, action)?;
            }
            Action::Shutdown => {
                if !self.machine(record, action)?.press_ctrl_alt_del() {
                    return Err(HostError::NotListening(record.name().to_owned()));
                }
            }
            Action::Stop => {
                if state == State::Paused {
                    self.run(record, action)?;
                }
                // A guest that does not listen gets the time too, because it may end for other reasons.
                let vm = self.machine(record, action)?;
                if !vm.ask_to_end() {
                    vm.press_ctrl_alt_del();
                }
            }
            Action::Kill => self.end(record, Cause::Killed),
        }
        Ok(record.state())
    }

    /// Returns the VM's state if it allows an action.
    ///
    /// # Errors
    /// Fails if it does not.
    pub fn check(&self, record: &Record, action: Action) -> Result<State, HostError> {
        let state = record.state();
        match state.after(action) {
            Some(_) => Ok(state),
            None => Err(HostError::Illegal { vm: record.name().to_owned(), state, action }),
        }
    }

    fn machine(&self, record: &Record, action: Action) -> Result<Arc<dyn Machine>, HostError> {
        let illegal = || HostError::Illegal { vm: record.name().to_owned(), state: record.state(), action };
        record.vm().ok_or_else(illegal)
    }

    fn run(&self, record: &Record, action: Action) -> Result<(), HostError> {
        let vm = self.machine(record, action)?;
        record.note_started();
        vm.start();
        self.memory.look();
        let reason = (action == Action::Reset).then(|| Cause::Reset.to_string());
        self.tell_state_because(record, reason.or_else(|| record.reason()));
        Ok(())
    }

    /// Builds a machine again, and starts it.
    fn boot(&self, record: &Arc<Record>, action: Action) -> Result<(), HostError> {
        let _operation = self.operation();
        {
            let _one_after_another = self.reserving.lock();
            if self.is_closing() {
                return Err(HostError::Closing);
            }
            self.check_together(std::slice::from_ref(record))?;
            record.begin_boot();
        }
        // The files may have changed since the boot before.
        let validated = validate(record.spec.clone(), None).map_err(HostError::from);
        let built = validated.and_then(|vm| {
            let config = self.complete(vm, record);
            self.build(vec![config], std::slice::from_ref(record))
        });
        if let Err(error) = built {
            record.abandon_boot(error.to_string());
            self.tell_state(record);
            return Err(error);
        }
        if self.is_closing()
            && let Some(vm) = record.vm()
        {
            vm.request_stop();
        }
        self.run(record, action)
    }

    /// Ends a VM's machine, if it has one, and waits until the machine is freed.
    pub fn end(&self, record: &Record, cause: Cause) {
        if let Some(vm) = record.vm() {
            record.note_cause(cause);
            vm.request_stop();
            vm.wait();
        }
        record.wait_collected();
    }

    /// Deletes a VM and frees all that it holds.
    pub fn delete(&self, turn: &Turn) {
        // This notifies the main loop of the end of the operation, which leaves memory to free.
        let _operation = self.operation();
        let record = turn.record();
        self.end(record, Cause::Deleted);
        let removed = {
            let mut known = self.records.lock();
            let same = known.get(record.name()).is_some_and(|present| Arc::ptr_eq(present, record));
            if same { known.remove(record.name()) } else { None }
        };
        if removed.is_some() {
            record.delist();
            record.backlog.close();
            self.events.tell(Happening::Deleted { vm: record.name().to_owned() });
        }
    }

    /// Changes which pages of a VM's memory are shared, now and after further boots.
    ///
    /// # Errors
    /// Fails if this process shares no memory.
    pub fn set_mode(&self, turn: &Turn, mode: SharingMode) -> Result<(), HostError> {
        let record = turn.record();
        if self.common.sharing.is_none() {
            return Err(HostError::NotSharing(record.name().to_owned(), "this process shares none"));
        }
        record.set_mode(mode);
        self.note_change();
        if let Some(vm) = record.vm() {
            vm.note_mode(mode);
            if let Some(membership) = vm.membership() {
                membership.set_mode(mode);
            }
        }
        Ok(())
    }
}
