//! A VM in a worker, with what the next managing process has to know.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use samepage_machine::vm::{Vm, VmEnd, VmState};
use samepage_spec::VmSpec;

use crate::messages::{Answer, Description, Moment};
use crate::report::DeviceReport;

/// One VM.
pub(super) struct Held {
    pub(super) spec: VmSpec,
    pub(super) has_run: bool,
    /// When the VM came into its state.
    pub(super) since: Moment,
    /// Whether the managing process was told of the VM.
    is_told: Arc<AtomicBool>,
    notices: Vec<String>,
    built: Moment,
    body: Body,
}

/// The machine, or what is left of it.
enum Body {
    Machine(Arc<Vm>),
    /// It has ended while nobody managed the worker, and its memory is free.
    Ended(Box<Ended>),
}

struct Ended {
    end: VmEnd,
    cpu_nanoseconds: u64,
    devices: DeviceReport,
}

impl Held {
    /// Returns a VM that nobody knows until `is_told`.
    pub(super) fn new(spec: VmSpec, notices: Vec<String>, vm: Arc<Vm>, is_told: &Arc<AtomicBool>) -> Self {
        let (now, is_told) = (Moment::now(), Arc::clone(is_told));
        Self { spec, has_run: false, since: now, is_told, notices, built: now, body: Body::Machine(vm) }
    }

    /// Whether a managing process knows of the VM.
    pub(super) fn is_told(&self) -> bool {
        self.is_told.load(Ordering::Acquire)
    }

    /// Returns the machine, if it is there.
    pub(super) fn vm(&self) -> Option<&Arc<Vm>> {
        match &self.body {
            Body::Machine(vm) => Some(vm),
            Body::Ended(_) => None,
        }
    }

    /// Returns how the VM has ended, if it has.
    pub(super) fn end(&self) -> Option<VmEnd> {
        match &self.body {
            Body::Machine(vm) => vm.end(),
            Body::Ended(ended) => Some(ended.end.clone()),
        }
    }

    /// Notes what is to be known of a VM that has ended. Returns its machine, which is not needed any more.
    pub(super) fn let_go(&mut self) -> Option<Arc<Vm>> {
        let Body::Machine(vm) = &self.body else { return None };
        let ended =
            Ended { end: vm.end()?, cpu_nanoseconds: cpu_nanoseconds(vm), devices: DeviceReport::of(vm) };
        match std::mem::replace(&mut self.body, Body::Ended(Box::new(ended))) {
            Body::Machine(vm) => Some(vm),
            Body::Ended(_) => None,
        }
    }

    pub(super) fn look(&self) -> Answer {
        match &self.body {
            Body::Machine(vm) => Answer::Looked {
                cpu_nanoseconds: cpu_nanoseconds(vm),
                devices: Box::new(DeviceReport::of(vm)),
            },
            Body::Ended(ended) => Answer::Looked {
                cpu_nanoseconds: ended.cpu_nanoseconds,
                devices: Box::new(ended.devices.clone()),
            },
        }
    }

    pub(super) fn describe(&self) -> Description {
        Description {
            spec: self.spec.clone(),
            notices: self.notices.clone(),
            has_run: self.has_run,
            runs: self.vm().is_some_and(|vm| vm.state() == VmState::Running),
            built: self.built,
            since: self.since,
            end: self.end(),
        }
    }
}

fn cpu_nanoseconds(vm: &Vm) -> u64 {
    u64::try_from(vm.cpu_time().as_nanos()).unwrap_or(u64::MAX)
}
