//! A worker: a process that holds VMs for another one, which manages them.
//!
//! One thread receives requests. What may take time has a thread of its own for each request. Another thread watches
//! the VMs' ends and consoles. The process ends with the connection, and its VMs with it, unless it has a place at
//! which the next managing process finds it (`shelter`).

mod discards;
mod held;
mod outbox;
mod shelter;
mod watch;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use samepage_machine::config::{ConsoleConfig, Elsewhere, VmConfig};
use samepage_machine::hypervisor::Hypervisor;
use samepage_machine::vm::{Vm, VmEnd};
use samepage_sharing::pagemap::Pagemap;
use samepage_sharing::remote::serve::{Server, Vms};
use samepage_sharing::service::Discarded;

use crate::machine::{DeviceError, Machine};
use crate::messages::{
    Answer, Build, GroupNumber, Hello, Moment, Order, Report, Request, Target, Told, VERSION, VmNumber,
};
use crate::wire::{self, Receiver};
use discards::{Discards, DiscardsOf, EngineConnection};
use held::Held;
use outbox::{ConsoleCopy, Outbox, Turn};
use shelter::{News, Next, Shelter};
use watch::Watch;

/// How long requests of a managing process that is gone are waited for.
const REQUESTS: Duration = Duration::from_secs(2);
/// Stack of a thread that carries out a request, in bytes.
const STACK_BYTES: usize = 256 << 10;

/// What all threads of a worker have in common.
struct Worker {
    hypervisor: Hypervisor,
    pagemap: Pagemap,
    outbox: Arc<Outbox>,
    watch: Watch,
    groups: Mutex<HashMap<GroupNumber, (Arc<Vms>, EngineConnection)>>,
    discards: Arc<Discards>,
    vms: Arc<Mutex<HashMap<VmNumber, Held>>>,
    news: Arc<News>,
    /// Requests that have a thread each.
    requests: Mutex<u32>,
    request_done: Condvar,
}

/// Holds VMs until the managing process is gone, which is at the other end of standard input.
///
/// # Errors
/// Fails if the host lacks KVM, or if standard input is no connection.
pub fn main() -> io::Result<()> {
    // Whoever looks for the user of a file sees this name. Without it, another name is no harm.
    let _ = rustix::thread::set_name(c"samepage");
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let (sender, mut receiver) = wire::split(socket)?;
    let Some((Hello { version, shelter }, _)) = unless_gone(receiver.receive::<Hello>())? else {
        return Ok(());
    };
    if version != VERSION {
        let text = format!("the managing process speaks version {version}, and this worker {VERSION}");
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    // This changes the umask, so there are no other threads yet.
    let shelter = shelter.as_ref().map(Shelter::open).transpose()?;
    let outbox = Outbox::start(sender, shelter.is_some())?;
    let vms = Arc::<Mutex<HashMap<VmNumber, Held>>>::default();
    let news = Arc::new(News::new()?);
    let (ended, told) = (Arc::clone(&vms), Arc::clone(&news));
    let on_end = move |vm| {
        if let Some(held) = ended.lock().get_mut(&vm) {
            held.since = Moment::now();
        }
        told.tell();
    };
    let worker = Arc::new(Worker {
        hypervisor: Hypervisor::open().map_err(io::Error::other)?,
        pagemap: Pagemap::open()?,
        watch: Watch::start(&outbox, on_end)?,
        outbox,
        groups: Mutex::default(),
        discards: Arc::default(),
        vms,
        news,
        requests: Mutex::default(),
        request_done: Condvar::new(),
    });
    loop {
        worker.serve(&mut receiver)?;
        let Some(shelter) = &shelter else { return Ok(()) };
        match worker.endure(shelter)? {
            Some(next) => receiver = next,
            None => return Ok(()),
        }
    }
}

/// Returns `None` if the managing process is gone.
fn unless_gone<T>(received: io::Result<T>) -> io::Result<Option<T>> {
    match received {
        Ok(received) => Ok(Some(received)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Err(error) => Err(error),
    }
}

impl Worker {
    /// Does what the managing process asks for, until it is gone.
    fn serve(self: &Arc<Self>, receiver: &mut Receiver) -> io::Result<()> {
        while let Some((request, with)) = unless_gone(receiver.receive::<Request>())? {
            self.take(request, with);
        }
        Ok(())
    }

    /// Holds the VMs while no process manages them. Returns the connection to the next one that does; `None` if the
    /// worker is to end.
    fn endure(&self, shelter: &Shelter) -> io::Result<Option<Receiver>> {
        self.outbox.detach();
        // Engines are gone with the process. What guests share stays mapped.
        self.groups.lock().clear();
        self.finish_requests();
        let mut until = None;
        loop {
            let ended: Vec<_> = {
                let mut vms = self.vms.lock();
                vms.iter_mut().filter_map(|(number, held)| Some((*number, held.let_go()?))).collect()
            };
            for (number, vm) in ended {
                self.watch.forget(number, &vm);
            }
            let (is_empty, all_ended) = {
                let vms = self.vms.lock();
                (vms.is_empty(), vms.values().all(|held| held.vm().is_none()))
            };
            if is_empty {
                return Ok(None);
            }
            if all_ended {
                until.get_or_insert_with(|| Instant::now() + shelter.patience());
            }
            let names = || self.vms.lock().values().map(|held| held.spec.name.clone()).collect();
            match shelter.wait(&self.news, until, names)? {
                Next::Managed(sender, receiver) => {
                    self.outbox.attach(sender);
                    return Ok(Some(receiver));
                }
                Next::News => {}
                Next::Late => {
                    let vms = self.vms.lock().values().map(Held::describe).collect();
                    shelter.report(&serde_json::to_vec_pretty(&Report { version: VERSION, vms })?)?;
                    return Ok(None);
                }
            }
        }
    }

    fn take(self: &Arc<Self>, request: Request, with: Option<OwnedFd>) {
        let is_quick = matches!(
            request.order,
            Order::Start
                | Order::Stop
                | Order::Fail(_)
                | Order::Look
                | Order::HoleNews
                | Order::Discarded { .. }
                | Order::Withhold(_)
                | Order::NameThreads
        );
        if is_quick {
            return self.carry_out(request, with, self.outbox.turn());
        }
        let (worker, number, turn) = (Arc::clone(self), request.number, self.outbox.turn());
        *self.requests.lock() += 1;
        let spawned =
            thread::Builder::new().name("request".into()).stack_size(STACK_BYTES).spawn(move || {
                worker.carry_out(request, with, turn);
                worker.note_done();
            });
        if let Err(error) = spawned {
            self.note_done();
            let text =
                format!("start a thread: {error}; raise the limits on processes (ulimit -u, pids.max)");
            self.outbox.send(&Told::Reply { number, answer: Answer::Failed(text) });
        }
    }

    fn note_done(&self) {
        *self.requests.lock() -= 1;
        self.request_done.notify_all();
    }

    /// Waits until what the managing process has asked for is done, so that the next one sees VMs as they stay. What
    /// takes long is not waited for.
    fn finish_requests(&self) {
        let until = Instant::now() + REQUESTS;
        let mut requests = self.requests.lock();
        while *requests > 0 && !self.request_done.wait_until(&mut requests, until).timed_out() {}
    }

    fn carry_out(&self, request: Request, with: Option<OwnedFd>, turn: Turn) {
        let Request { number, vm, order } = request;
        let is_told = Arc::new(AtomicBool::new(false));
        let is_new = matches!(order, Order::Build(_));
        let (answer, hole) = match order {
            Order::Follow => return self.outbox.follow(turn, vm, number),
            Order::Build(build) => self.build(vm, *build, &is_told),
            order => self.answer(vm, order, with).map(|answer| (answer, None)),
        }
        .unwrap_or_else(|reason| (Answer::Failed(reason), None));
        let hole = hole.as_ref().map(|hole| hole.as_fd());
        let has_failed = matches!(answer, Answer::Failed(_));
        self.outbox.reply(turn, number, answer, hole, &is_told);
        if is_new && (has_failed || !is_told.load(Ordering::Acquire)) {
            // If nobody was told of the VM, nobody looks for it.
            self.free(vm);
        }
    }

    /// Frees a machine, if it is there.
    fn free(&self, number: VmNumber) {
        let held = self.vms.lock().remove(&number);
        if let Some(vm) = held.as_ref().and_then(Held::vm) {
            self.watch.forget(number, vm);
        }
        // A request that looks at the machine ends soon.
        drop(held);
        self.outbox.close(number);
        self.news.tell();
    }

    fn answer(&self, number: VmNumber, order: Order, with: Option<OwnedFd>) -> Result<Answer, String> {
        match order {
            Order::Connect(group) => return self.connect(group, with),
            Order::Free => {
                self.free(number);
                return Ok(Answer::Done);
            }
            Order::List => {
                let vms = self.vms.lock();
                let known = vms.iter().filter(|(_, held)| held.is_told());
                return Ok(Answer::Listed(known.map(|(number, _)| *number).collect()));
            }
            // The VM may be about to end: then it waits for this.
            Order::Discarded { number, next, freed } => {
                self.discards.answer(number, Discarded { next, freed });
                return Ok(Answer::Done);
            }
            _ => {}
        }
        let mut vms = self.vms.lock();
        let Some(held) = vms.get_mut(&number) else {
            drop(vms);
            let reason = "its worker process has no such VM".to_owned();
            if matches!(order, Order::Start | Order::Pause | Order::Stop) {
                // Whoever asks waits for its end.
                self.outbox.send(&Told::Ended { vm: number, end: VmEnd::Failed(reason.clone()) });
            }
            return Err(reason);
        };
        match order {
            Order::Look => return Ok(held.look()),
            Order::Describe => return Ok(Answer::Described(Box::new(held.describe()))),
            Order::NoteMode(mode) => {
                held.spec.sharing.mode = mode;
                return Ok(Answer::Done);
            }
            Order::Start => (held.has_run, held.since) = (true, Moment::now()),
            Order::Pause => held.since = Moment::now(),
            _ => {}
        }
        let vm = held.vm().cloned().ok_or("the VM has ended")?;
        drop(vms);
        Ok(match order {
            Order::ConnectDisk(number) => {
                let line = with.ok_or("no line came with the request")?;
                let disk = vm.disks().get(number).ok_or("there is no such disk")?;
                disk.connect_cache(line).map_err(|error| error.to_string())?;
                Answer::Done
            }
            // Carried out above.
            Order::Connect(_)
            | Order::Build(_)
            | Order::Free
            | Order::List
            | Order::Look
            | Order::Describe
            | Order::Follow
            | Order::Discarded { .. }
            | Order::NoteMode(_) => Answer::Done,
            Order::HoleNews => {
                vm.tell_hole_news();
                Answer::Done
            }
            Order::Start => {
                vm.start();
                Answer::Done
            }
            Order::Pause => {
                vm.pause();
                Answer::Done
            }
            Order::Stop => {
                vm.handle().request_stop();
                Answer::Done
            }
            Order::Fail(reason) => {
                vm.fail(reason);
                Answer::Done
            }
            Order::PressCtrlAltDel => Answer::Truth(vm.press_ctrl_alt_del()),
            Order::AskToEnd => Answer::Truth(vm.ask_to_end()),
            Order::AskAgain { time_is_short } => {
                vm.ask_again(time_is_short);
                Answer::Done
            }
            Order::ReopenConsole => {
                vm.reopen_console().map_err(|error| error.to_string())?;
                Answer::Done
            }
            Order::Type(bytes) => Answer::Taken(vm.serial_input(&bytes)),
            Order::Change { id, change } => match vm.change_device(&id, change) {
                Ok(()) => Answer::Done,
                Err(DeviceError::Missing) => Answer::NoDevice,
                Err(DeviceError::Refused(reason)) => Answer::Failed(reason),
            },
            Order::Withhold(true) => {
                vm.handle().withhold();
                Answer::Done
            }
            Order::Withhold(false) => {
                vm.handle().release();
                Answer::Done
            }
            Order::CountPrivate => Answer::Bytes(
                vm.private_bytes(&self.pagemap).map_err(|error| format!("read the page map: {error}"))?,
            ),
            Order::NameThreads => Answer::Threads(vm.handle().threads()),
            Order::Touched => {
                let runs =
                    vm.touched(&self.pagemap).map_err(|error| format!("read the page map: {error}"))?;
                Answer::Runs(runs.into_iter().map(|run| (run.start, run.end)).collect())
            }
        })
    }

    /// Answers the engine of a group from now on.
    fn connect(&self, group: GroupNumber, with: Option<OwnedFd>) -> Result<Answer, String> {
        let socket = with.ok_or("no connection came with the request")?;
        let server = Server::accept(socket).map_err(|error| error.to_string())?;
        let connection = self.discards.open();
        self.groups.lock().insert(group, (server.vms(), connection));
        let close = Closing { discards: Arc::clone(&self.discards), connection };
        thread::Builder::new()
            .name("engine".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                // Also where the thread panics, or cannot be started.
                let _close = close;
                if let Err(error) = server.run() {
                    samepage_process::tell::tell(format_args!(
                        "the sharing engine asked senselessly: {error}"
                    ));
                }
            })
            .map_err(|error| format!("start a thread: {error}"))?;
        Ok(Answer::Done)
    }

    /// Returns the file of the machine's memory hole as well.
    /// `is_told` is to say whether the managing process was told of it.
    fn build(
        &self,
        number: VmNumber,
        build: Build,
        is_told: &Arc<AtomicBool>,
    ) -> Result<(Answer, Option<Arc<OwnedFd>>), String> {
        let Build { spec, console, group, has_cache } = build;
        let vms = match group {
            Some(group) => Some(self.groups.lock().get(&group).cloned().ok_or("the group is not connected")?),
            None => None,
        };
        let target = match console {
            Target::Nowhere => ConsoleConfig::Off,
            Target::Stdio => ConsoleConfig::Stdio,
            Target::PrefixedStdio => ConsoleConfig::PrefixedStdio,
            Target::File(path) => ConsoleConfig::File(path),
        };
        let copy = Box::new(ConsoleCopy::new(&self.outbox, number));
        let console = ConsoleConfig::Copied { to: Box::new(target), copy };
        let elsewhere = vms.map(|(vms, connection)| {
            let (outbox, discards) = (Arc::clone(&self.outbox), Arc::clone(&self.discards));
            let pages = DiscardsOf { discards, connection, outbox: Arc::clone(&outbox), vm: number };
            let ring = Arc::new(move || outbox.send(&Told::Bell { vm: number }));
            Elsewhere { vms, ring, pages: Arc::new(pages), has_cache }
        });
        let config = VmConfig { console, elsewhere, ..VmConfig::from(spec.clone()) };
        let vm = Vm::build(config, &self.hypervisor).map_err(|error| error.to_string())?;
        let outbox = Arc::clone(&self.outbox);
        vm.observe_disk_errors(Arc::new(move |disk, message| {
            let (disk, message) = (disk.to_owned(), message.to_owned());
            outbox.send(&Told::DiskError { vm: number, disk, message });
        }));
        let outbox = Arc::clone(&self.outbox);
        vm.observe_balloon(Arc::new(move |frames| outbox.send(&Told::Balloon { vm: number, frames })));
        let vm = Arc::new(vm);
        let (index, notices, hole) = (vm.index(), Machine::notices(&*vm), vm.hole_file().cloned());
        self.vms.lock().insert(number, Held::new(spec, notices.clone(), Arc::clone(&vm), is_told));
        if let Err(error) = self.watch.add(number, &vm) {
            drop(vm);
            self.free(number);
            return Err(format!("watch the VM: {error}"));
        }
        Ok((Answer::Built { index, notices }, hole))
    }
}

/// Says that an engine does nothing more, when it goes.
struct Closing {
    discards: Arc<Discards>,
    connection: EngineConnection,
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.discards.close(self.connection);
    }
}
