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
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use samepage_machine::vm::VmEnd;
use samepage_spec::VmSpec;

use crate::disks::DiskServers;
use crate::elsewhere::{Identity, MachineElsewhere, Remote};
use crate::machine::Machine;
use crate::messages::{Answer, Description, Greeting, Hello, Moment, Order, Report, VERSION, VmNumber};
use crate::pool::Workers;
use crate::process::WorkerProcess;
use crate::state::{StateFolder, own_user};
use crate::wire;

/// How long all workers together may take for their first message, and each for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a worker that is about to end is waited for.
const DEATH: Duration = Duration::from_secs(5);
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
        match self.machine.worker.ask_within(self.machine.identity.number, Order::Follow, PATIENCE) {
            Some(Answer::Following { before }) => before,
            // Output comes when the worker answers again.
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
            let Some(handle) = open(worker) else {
                state.remove(worker);
                continue;
            };
            let adopted = connect(state, (worker, &handle), until, &taken)
                .and_then(|process| self.adopt_vms(&process).inspect_err(|_| process.disconnect()));
            match adopted {
                Ok(vms) => {
                    taken.extend(vms.iter().map(|vm| vm.spec.name.clone()));
                    adoption.vms.extend(vms);
                }
                // It had no VMs any more, or was killed. The process before may have done so in its last moment.
                Err(refused) if refused.may_have_ended && ends_within(&handle, DEATH) => state.remove(worker),
                Err(Refused { reason, .. }) => adoption.left.push(LeftAlone { worker, reason }),
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

    fn adopt_vms(self: &Arc<Self>, process: &Arc<WorkerProcess>) -> Result<Vec<Adopted>, Refused> {
        let silent =
            || Refused { may_have_ended: process.is_gone(), reason: "it does not answer".to_owned() };
        let numbers = match process.ask_within(VmNumber(0), Order::List, PATIENCE) {
            Some(Answer::Listed(numbers)) => numbers,
            _ => return Err(silent()),
        };
        let mut described = Vec::with_capacity(numbers.len());
        for number in numbers {
            let remote = Remote::new(Box::new(io::sink())).map_err(failed("watch its VMs"))?;
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
            disks: DiskServers::default(),
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

/// Why a worker was not taken over.
struct Refused {
    may_have_ended: bool,
    reason: String,
}

impl From<String> for Refused {
    fn from(reason: String) -> Self {
        Self { may_have_ended: false, reason }
    }
}

/// Returns the reason for an error of a system call.
fn failed(what: &'static str) -> impl Fn(io::Error) -> Refused {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    move |error| {
        let ends = [BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof];
        Refused { may_have_ended: ends.contains(&error.kind()), reason: format!("{what}: {error}") }
    }
}

/// Returns what stands for a process, if it has not ended.
fn open(id: u32) -> Option<OwnedFd> {
    pidfd_open(Pid::from_raw(i32::try_from(id).ok()?)?, PidfdFlags::empty()).ok()
}

fn ends_within(handle: &OwnedFd, limit: Duration) -> bool {
    let limit = Timespec::try_from(limit).ok();
    retry_on_intr(|| poll(&mut [PollFd::new(handle, PollFlags::IN)], limit.as_ref()))
        .is_ok_and(|ready| ready > 0)
}

/// Connects to a worker. Its handle was opened before, so whoever answers has its number.
fn connect(
    state: &Arc<StateFolder>,
    (id, handle): (u32, &OwnedFd),
    until: Instant,
    taken: &HashSet<String>,
) -> Result<Arc<WorkerProcess>, Refused> {
    let stream = UnixStream::connect(state.socket(id)).map_err(failed("connect to its socket"))?;
    let socket = OwnedFd::from(stream);
    let peer = socket_peercred(&socket).map_err(io::Error::from).map_err(failed("look at its socket"))?;
    if peer.uid.as_raw() != own_user() || u32::try_from(peer.pid.as_raw_nonzero().get()) != Ok(id) {
        return Err("another process answers at its socket".to_owned().into());
    }
    let limit = |limit| set_socket_timeout(&socket, Timeout::Recv, limit).map_err(io::Error::from);
    let left = until.saturating_duration_since(Instant::now()).max(LEAST);
    limit(Some(left)).map_err(failed("wait for it"))?;
    let connection = socket.try_clone().and_then(wire::split).map_err(failed("connect to its socket"))?;
    let (mut sender, mut receiver) = connection;
    let silent = "it does not answer; start samepage again once it does";
    let (Greeting { version, vms }, _) = receiver.receive().map_err(failed(silent))?;
    let names = vms.join(", ");
    if version != VERSION {
        let reason = format!(
            "it speaks version {version}, and this program {VERSION}; its VMs ({names}) go on; manage them with the \
             version of samepage that has started them"
        );
        return Err(reason.into());
    }
    if let Some(name) = vms.iter().find(|name| taken.contains(*name)) {
        return Err(format!("another worker has a VM {name} as well; its VMs are {names}").into());
    }
    limit(None).map_err(failed("wait for it"))?;
    sender.send(&Hello { version: VERSION, shelter: None }, None).map_err(failed("speak to it"))?;
    let handle = handle.try_clone().map_err(failed("listen to it"))?;
    WorkerProcess::adopt(id, handle, state, (sender, receiver)).map_err(failed("listen to it"))
}
