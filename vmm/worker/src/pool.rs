//! Worker processes, as many as the VMs need.

use std::io;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread;

use parking_lot::Mutex;
use samepage_machine::config::{ConsoleConfig, Validated};
use samepage_machine::vm::{HoleMemory, VmState};
use samepage_sharing::service::Sharing;
use samepage_sharing::service::elsewhere::Place;
use samepage_spec::{MemoryHole, VmSpec};

use crate::disks::DiskServers;
use crate::elsewhere::{Identity, MachineElsewhere, Remote, RemoteHole};
use crate::machine::Machine;
use crate::messages::{Answer, Build, Order, Target};
use crate::process::WorkerProcess;
use crate::state::StateFolder;

/// Stack of the thread that starts a spare worker, in bytes.
const STACK_BYTES: usize = 128 << 10;

/// Why a machine cannot be built in a worker.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No worker can be started.
    #[error(
        "start a worker process: {0}; raise the limits on processes (ulimit -u, pids.max) and on open files (ulimit -n)"
    )]
    Start(#[source] io::Error),
    /// The console or the kernel is one that only this process has.
    #[error("a worker process cannot have {0}")]
    Own(&'static str),
    /// The worker refuses, with the reason in a sentence.
    #[error("{0}")]
    Refused(String),
}

/// Starts workers, and finds one for each VM.
#[derive(Debug)]
pub struct Workers {
    program: PathBuf,
    per_worker: u32,
    /// Disks are served from the block cache.
    has_cache: bool,
    /// Where workers are found if this process ends before them.
    state: Option<Arc<StateFolder>>,
    processes: Mutex<Vec<Arc<WorkerProcess>>>,
    /// A worker without VMs, so that no VM waits for the start of its worker.
    spare: Mutex<Option<Arc<WorkerProcess>>>,
    /// Workers that are about to end.
    ending: Mutex<Vec<Arc<WorkerProcess>>>,
    is_closed: AtomicBool,
}

impl Workers {
    /// Returns a pool without workers, each of which is to have so many VMs at most. `program` becomes a worker by the
    /// argument [`ARGUMENT`](crate::process::ARGUMENT). With a folder for their state, workers outlive this process.
    #[must_use]
    pub fn new(program: PathBuf, per_worker: u32, state: Option<StateFolder>) -> Self {
        Self {
            program,
            per_worker: per_worker.max(1),
            has_cache: false,
            state: state.map(Arc::new),
            processes: Mutex::default(),
            spare: Mutex::default(),
            ending: Mutex::default(),
            is_closed: AtomicBool::new(false),
        }
    }

    /// Serves disks of VMs in workers from the block cache, or not.
    #[must_use]
    pub fn with_block_cache(mut self, has_cache: bool) -> Self {
        self.has_cache = has_cache;
        self
    }

    fn start(&self) -> io::Result<Arc<WorkerProcess>> {
        WorkerProcess::start(&self.program, self.state.as_ref())
    }

    /// Starts a worker that waits for VMs, unless there is one, and keeps one ready from now on.
    pub fn keep_spare(self: &Arc<Self>) {
        let pool = Arc::downgrade(self);
        // Without the thread or the worker, the next VM waits for the start of its own.
        let _ = thread::Builder::new().name("spare-worker".into()).stack_size(STACK_BYTES).spawn(move || {
            let Some(pool) = pool.upgrade() else { return };
            let mut spare = pool.spare.lock();
            let is_missing = spare.as_ref().is_none_or(|worker| worker.is_gone());
            if is_missing && !pool.is_closed.load(Ordering::Relaxed) {
                *spare = pool.start().ok();
            }
        });
    }

    /// Returns the numbers of the worker processes.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let processes = self.processes.lock();
        let spare = self.spare.lock();
        processes.iter().chain(&*spare).filter(|worker| !worker.is_gone()).map(|worker| worker.id()).collect()
    }

    /// A worker with room for one more VM, which has its place then.
    fn worker(self: &Arc<Self>) -> Result<Arc<WorkerProcess>, BuildError> {
        let mut processes = self.processes.lock();
        processes.retain(|worker| !worker.is_gone());
        let has_room = |worker: &&Arc<WorkerProcess>| {
            !worker.is_adopted() && worker.places.load(Ordering::Relaxed) < self.per_worker
        };
        let worker = match processes.iter().find(has_room) {
            Some(worker) => Arc::clone(worker),
            None => {
                // A spare that is about to start is as fast as another one.
                let spare = self.spare.lock().take();
                if spare.is_some() {
                    self.keep_spare();
                }
                let worker = match spare.filter(|worker| !worker.is_gone()) {
                    Some(worker) => worker,
                    None => self.start().map_err(BuildError::Start)?,
                };
                processes.push(Arc::clone(&worker));
                worker
            }
        };
        worker.places.fetch_add(1, Ordering::Relaxed);
        Ok(worker)
    }

    /// Gives a VM's place back. A worker without VMs is ended.
    fn leave(&self, worker: &Arc<WorkerProcess>) {
        let mut processes = self.processes.lock();
        if worker.places.fetch_sub(1, Ordering::Relaxed) == 1 {
            processes.retain(|other| !Arc::ptr_eq(other, worker));
            self.end(worker);
        }
    }

    /// Builds a machine in a worker. `sharing` is the engine that is to share its memory.
    ///
    /// # Errors
    /// Fails if no worker can be started, or if it refuses.
    pub fn build(
        self: &Arc<Self>,
        mut config: Validated,
        sharing: Option<&Sharing>,
    ) -> Result<Arc<dyn Machine>, BuildError> {
        let (console, copy) = console(config.take_console())?;
        if config.config().embedded_kernel.is_some() || !config.config().detours.is_empty() {
            return Err(BuildError::Own("a kernel or a service of another process"));
        }
        if config.spec().networks.iter().any(|network| network.fd.is_some()) {
            return Err(BuildError::Own(
                "a tap that was opened for another process (fd=); give the tap's name",
            ));
        }
        let spec = config.into_spec();
        let worker = self.worker()?;
        let built = self.build_in(&worker, spec, (console, copy), sharing);
        if built.is_err() {
            self.leave(&worker);
        }
        built.map(|machine| Arc::new(machine) as Arc<dyn Machine>)
    }

    fn build_in(
        self: &Arc<Self>,
        worker: &Arc<WorkerProcess>,
        spec: VmSpec,
        (console, copy): (Target, Box<dyn Write + Send>),
        sharing: Option<&Sharing>,
    ) -> Result<MachineElsewhere, BuildError> {
        let refused = |error: &dyn std::fmt::Display| BuildError::Refused(error.to_string());
        let number = worker.new_number();
        let place = sharing.map(|sharing| sharing.place(&spec.sharing.group)).transpose();
        let place = place.map_err(|error| refused(&error))?;
        let connect = |place: &Place| worker.connect(place, number).map_err(BuildError::Refused);
        let connected = place.as_ref().map(connect).transpose()?.flatten();
        let (group, engine) = connected.unzip();
        let remote = Arc::new(Remote::new(copy).map_err(BuildError::Start)?);
        worker.listen_for(number, &remote);
        let forget = |error| {
            worker.forget(number);
            error
        };
        let (name, vcpus, memory_bytes, mode) =
            (spec.name.clone(), spec.vcpus, spec.memory.0, spec.sharing.mode);
        let is_port = spec.memory_hole == MemoryHole::Port;
        let (disks, has_cache) = (spec.disks.clone(), self.has_cache);
        let build = Order::Build(Box::new(Build { spec, console, group, has_cache }));
        let ((index, notices), hole) = match worker.ask_with(number, build, None) {
            Ok((Answer::Built { index, notices }, hole)) => ((index, notices), hole),
            Ok((Answer::Failed(reason), _)) => return Err(forget(BuildError::Refused(reason))),
            Ok((other, _)) => return Err(forget(refused(&format_args!("unexpected answer {other:?}")))),
            Err(gone) => return Err(forget(refused(&gone))),
        };
        let identity = Identity { name, number, vcpus, memory_bytes, notices, is_adopted: false };
        let mut machine = MachineElsewhere {
            identity,
            remote: Arc::clone(&remote),
            disks: DiskServers::default(),
            membership: None,
            worker: Arc::clone(worker),
            last: Mutex::default(),
            on_drop: Box::new(|| {}),
        };
        if let Some(place) = place {
            let vm = index.zip(engine).map(|(index, engine)| engine.vm(index)).transpose();
            let vm = vm.map_err(|error| refused(&format_args!("ask for its memory: {error}")))?;
            let (lost, of) = (Arc::clone(worker), number);
            let on_lost = Box::new(move |error: &_| {
                let reason = format!("its memory was lost while it was shared: {error}");
                lost.tell(of, Order::Fail(reason));
            });
            let shares = vm.is_some();
            let membership = place.share(vm, mode, on_lost).map_err(|error| refused(&error))?;
            if let Some(file) = hole.filter(|_| shares) {
                let memory = HoleMemory::open(file, memory_bytes);
                let memory =
                    memory.map_err(|error| refused(&format_args!("map its memory hole: {error}")))?;
                let hole = RemoteHole { memory, worker: Arc::clone(worker), number, is_port };
                remote.set_bell(membership.listen(Arc::new(hole)));
            }
            if shares {
                remote.set_pages(Some(membership.pages()));
            }
            if self.has_cache && shares {
                let (servers, notices) = DiskServers::start(worker, number, &disks, &membership.blocks());
                machine.disks = servers;
                machine.identity.notices.extend(notices);
            }
            machine.membership = Some(membership);
        }
        debug_assert!(machine.state() != VmState::Running);
        machine.on_drop = self.leaving(worker);
        Ok(machine)
    }

    /// Returns what gives a VM's place in a worker back.
    pub(crate) fn leaving(self: &Arc<Self>, worker: &Arc<WorkerProcess>) -> Box<dyn Fn() + Send + Sync> {
        let (pool, worker): (Weak<Self>, _) = (Arc::downgrade(self), Arc::clone(worker));
        Box::new(move || {
            if let Some(pool) = pool.upgrade() {
                pool.leave(&worker);
            }
        })
    }

    /// Returns the folder for the state.
    pub(crate) fn state(&self) -> Option<&Arc<StateFolder>> {
        self.state.as_ref()
    }

    fn end(&self, worker: &Arc<WorkerProcess>) {
        worker.end();
        let mut ending = self.ending.lock();
        ending.retain(|worker| !worker.is_gone());
        ending.push(Arc::clone(worker));
    }

    /// Manages a worker that another process has started. One without VMs is ended.
    pub(crate) fn keep_adopted(&self, worker: &Arc<WorkerProcess>) {
        if worker.places.load(Ordering::Relaxed) == 0 {
            self.end(worker);
        } else {
            self.processes.lock().push(Arc::clone(worker));
        }
    }

    /// Leaves all VMs of workers to the next process that uses the folder for the state. This process manages them no
    /// more. Without such a folder, nothing changes.
    pub fn let_go(&self) {
        let (processes, spare) = (self.processes.lock(), self.spare.lock());
        processes.iter().chain(&*spare).for_each(|worker| worker.let_go());
    }

    /// The same for VMs that another process has built.
    pub fn let_go_adopted(&self) {
        let processes = self.processes.lock();
        processes.iter().filter(|worker| worker.is_adopted()).for_each(|worker| worker.let_go());
    }

    /// Ends all workers, whose VMs have ended, and leaves nothing in the folder for the state. Workers that were let go
    /// stay.
    pub fn close(&self) {
        let (processes, spare, ending) = (self.processes.lock(), self.spare.lock(), self.ending.lock());
        self.is_closed.store(true, Ordering::Relaxed);
        let all = || processes.iter().chain(&*spare).chain(&*ending);
        // All end at the same time, before the first is waited for.
        all().for_each(|worker| worker.end());
        all().for_each(|worker| worker.end_and_clean());
        if let Some(state) = self.state.as_ref().filter(|_| !all().any(|worker| worker.is_let_go())) {
            state.leave();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.close();
    }
}

/// Where the console goes in the worker, and what gets a copy here.
fn console(console: ConsoleConfig) -> Result<(Target, Box<dyn Write + Send>), BuildError> {
    let (to, copy) = match console {
        ConsoleConfig::Copied { to, copy } => (*to, copy),
        other => (other, Box::new(io::sink()) as Box<dyn Write + Send>),
    };
    let target = match to {
        ConsoleConfig::Off => Target::Nowhere,
        ConsoleConfig::Stdio => Target::Stdio,
        ConsoleConfig::PrefixedStdio => Target::PrefixedStdio,
        ConsoleConfig::File(path) => Target::File(path),
        ConsoleConfig::Copied { .. } | ConsoleConfig::Sink(_) => {
            return Err(BuildError::Own("a console of another process"));
        }
    };
    Ok((target, copy))
}
