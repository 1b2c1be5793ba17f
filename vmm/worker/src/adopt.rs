//! Taking over workers that have outlived their managing process.

use std::collections::HashSet;
use std::fmt;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use samepage_machine::vm::VmEnd;
use samepage_spec::VmSpec;

use crate::elsewhere::{Identity, MachineElsewhere, Remote};
use crate::machine::Machine;
use crate::messages::{Answer, Description, Greeting, Hello, Moment, Order, Report, VERSION, VmNumber};
use crate::pool::Workers;
use crate::process::WorkerProcess;
use crate::state::{StateFolder, own_user};
use crate::wire;

/// How long all workers together may take for their first message, and each for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the last workers are waited for all the same.
const LEAST: Duration = Duration::from_millis(200);

/// What was found in the folder for the state.
#[derive(Debug, Default)]
pub struct Adoption {
    /// The VMs, in the order in which they were built. They may have ended.
    pub vms: Vec<Adopted>,
    /// Workers that are left alone.
    pub left: Vec<LeftAlone>,
    /// VMs that ended, and whose workers were not taken over in time.
    pub missed: Vec<Missed>,
}

/// A worker that is left alone. Its VMs go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftAlone {
    /// The number of its process.
    pub worker: u32,
    /// Why, in a sentence.
    pub reason: String,
}

impl fmt::Display for LeftAlone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "worker process {} is left alone: {}", self.worker, self.reason)
    }
}

/// A VM that has ended while no process managed it.
#[derive(Debug)]
pub struct Missed {
    /// Its description.
    pub spec: VmSpec,
    /// How it ended.
    pub end: VmEnd,
    /// When it ended.
    pub since: SystemTime,
}

/// A VM whose worker was taken over.
#[derive(Debug)]
pub struct Adopted {
    /// The number of its worker's process.
    pub worker: u32,
    /// Its description.
    pub spec: VmSpec,
    /// Whether the guest was started.
    pub has_run: bool,
    /// When the VM came into its state.
    pub since: SystemTime,
    built: Moment,
    machine: Arc<MachineElsewhere>,
}

impl Adopted {
    /// Returns the machine.
    #[must_use]
    pub fn machine(&self) -> Arc<dyn Machine> {
        Arc::clone(&self.machine) as Arc<dyn Machine>
    }

    /// Has what the worker has kept of the console's output written, and what follows. Returns how many bytes the
    /// guest has written before.
    #[must_use]
    pub fn follow(&self, console: Box<dyn Write + Send>) -> u64 {
        self.machine.remote.set_console(console);
        match self.machine.worker.ask(self.machine.identity.number, Order::Follow) {
            Ok(Answer::Following { before }) => before,
            _ => 0,
        }
    }
}

impl Workers {
    /// Takes over the workers in the folder for the state. To be called before this pool starts workers.
    ///
    /// # Errors
    /// Fails if the folder cannot be read.
    pub fn adopt(self: &Arc<Self>) -> io::Result<Adoption> {
        let mut adoption = Adoption::default();
        let Some(state) = self.state() else { return Ok(adoption) };
        let until = Instant::now() + PATIENCE;
        let mut taken = HashSet::new();
        for worker in state.workers()? {
            let adopted = connect(state, worker, until, &taken)
                .and_then(|process| self.adopt_vms(&process).inspect_err(|_| process.disconnect()));
            match adopted {
                Ok(vms) => {
                    taken.extend(vms.iter().map(|vm| vm.spec.name.clone()));
                    adoption.vms.extend(vms);
                }
                Err(reason) => adoption.left.push(LeftAlone { worker, reason }),
            }
        }
        adoption.vms.sort_by_key(|vm| vm.built);
        for (worker, report) in state.take_reports()? {
            match serde_json::from_slice::<Report>(&report) {
                Ok(report) => adoption.missed.extend(report.vms.into_iter().filter_map(missed)),
                Err(error) => {
                    let reason = format!("the report on the ends of its VMs makes no sense: {error}");
                    adoption.left.push(LeftAlone { worker, reason });
                }
            }
        }
        Ok(adoption)
    }

    fn adopt_vms(self: &Arc<Self>, process: &Arc<WorkerProcess>) -> Result<Vec<Adopted>, String> {
        let silent = || "it does not answer".to_owned();
        let numbers = match process.ask_within(VmNumber(0), Order::List, PATIENCE) {
            Some(Answer::Listed(numbers)) => numbers,
            _ => return Err(silent()),
        };
        let mut described = Vec::with_capacity(numbers.len());
        for number in numbers {
            let remote = Remote::new(Box::new(io::sink())).map_err(|error| error.to_string())?;
            let remote = Arc::new(remote);
            // Before the description, so that no end is missed.
            process.listen_for(number, &remote);
            match process.ask_within(number, Order::Describe, PATIENCE) {
                Some(Answer::Described(description)) => described.push((number, remote, *description)),
                // It was freed meanwhile.
                Some(Answer::Failed(_)) => process.forget(number),
                _ => return Err(silent()),
            }
        }
        // Nothing fails from here on: the VMs would end.
        process.places.store(described.len() as u32, Ordering::Relaxed);
        self.keep_adopted(process);
        let adopt = |(number, remote, description)| self.adopted(process, number, remote, description);
        Ok(described.into_iter().map(adopt).collect())
    }

    fn adopted(
        self: &Arc<Self>,
        process: &Arc<WorkerProcess>,
        number: VmNumber,
        remote: Arc<Remote>,
        description: Description,
    ) -> Adopted {
        let Description { spec, notices, has_run, runs, built, since, end } = description;
        remote.set_runs(runs);
        if let Some(end) = end {
            remote.tell_end(end);
        }
        let identity = Identity {
            name: spec.name.clone(),
            number,
            vcpus: spec.vcpus,
            memory_bytes: spec.memory.0,
            notices,
            is_adopted: true,
        };
        let machine = Arc::new(MachineElsewhere {
            identity,
            remote,
            membership: None,
            worker: Arc::clone(process),
            last: Mutex::default(),
            on_drop: self.leaving(process),
        });
        Adopted { worker: process.id(), spec, has_run, since: since.time(), built, machine }
    }
}

fn missed(description: Description) -> Option<Missed> {
    let Description { spec, end, since, .. } = description;
    Some(Missed { spec, end: end?, since: since.time() })
}

/// Connects to a worker. Fails with the reason in a sentence.
fn connect(
    state: &Arc<StateFolder>,
    id: u32,
    until: Instant,
    taken: &HashSet<String>,
) -> Result<Arc<WorkerProcess>, String> {
    let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    // Open before the worker says anything: whoever answers then has this number.
    let process = i32::try_from(id).ok().and_then(Pid::from_raw).ok_or("its number is that of no process")?;
    let handle = pidfd_open(process, PidfdFlags::empty()).map_err(io::Error::from);
    let handle = handle.map_err(failed("find the process"))?;
    let stream = UnixStream::connect(state.socket(id)).map_err(failed("connect to its socket"))?;
    let socket = OwnedFd::from(stream);
    let peer = socket_peercred(&socket).map_err(io::Error::from).map_err(failed("look at its socket"))?;
    if peer.uid.as_raw() != own_user() || peer.pid != process {
        return Err("another process answers at its socket".to_owned());
    }
    let limit = |limit| {
        set_socket_timeout(&socket, Timeout::Recv, limit)
            .map_err(io::Error::from)
            .map_err(failed("wait for it"))
    };
    limit(Some(until.saturating_duration_since(Instant::now()).max(LEAST)))?;
    let other = socket.try_clone().map_err(failed("connect to its socket"))?;
    let (mut sender, mut receiver) = wire::split(other).map_err(failed("connect to its socket"))?;
    let silent = "it does not answer; start samepage again once it does";
    let (Greeting { version, vms }, _) = receiver.receive().map_err(|error| format!("{silent} ({error})"))?;
    let names = vms.join(", ");
    if version != VERSION {
        return Err(format!(
            "it speaks version {version}, and this program {VERSION}; its VMs ({names}) go on; manage them with the \
             version of samepage that has started them"
        ));
    }
    if let Some(name) = vms.iter().find(|name| taken.contains(*name)) {
        return Err(format!("another worker has a VM {name} as well; its VMs are {names}"));
    }
    limit(None)?;
    sender.send(&Hello { version: VERSION, shelter: None }, None).map_err(failed("speak to it"))?;
    WorkerProcess::adopt(id, handle, state, (sender, receiver)).map_err(failed("listen to it"))
}
