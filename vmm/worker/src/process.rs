//! A worker process, as the managing process has it.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use samepage_machine::vm::VmEnd;
use samepage_sharing::remote::worker::{self, Process, Worker};
use samepage_sharing::service::Discarded;
use samepage_sharing::service::elsewhere::{GroupMark, Place};

use crate::elsewhere::Remote;
use crate::messages::{Answer, GroupNumber, Hello, Order, Request, Shelter, Told, VERSION, VmNumber};
use crate::state::StateFolder;
use crate::wire::{self, Receiver, Sender};

/// The argument that makes the program a worker.
pub const ARGUMENT: &str = "worker";
/// How long a worker that was killed may take to free its memory, before its files are removed.
const DEATH: Duration = Duration::from_secs(5);
/// Requests to free pages of a worker's VMs that wait at a time.
const MOST_DISCARDS: usize = 1024;
/// Stack of the thread that listens to a worker, in bytes.
const STACK_BYTES: usize = 128 << 10;

/// A worker process.
pub(crate) struct WorkerProcess {
    id: u32,
    /// The folder with its files, if there is one.
    state: Option<Arc<StateFolder>>,
    /// Another process has started it. It gets no further VMs.
    is_adopted: bool,
    /// Stands for this process, whoever has its number later.
    handle: OwnedFd,
    sender: Mutex<Sender>,
    pending: Mutex<Pending>,
    next_request: AtomicU64,
    next_vm: AtomicU32,
    vms: Mutex<HashMap<VmNumber, Arc<Remote>>>,
    groups: Mutex<Groups>,
    /// VMs that it has, or is about to have.
    pub(crate) places: AtomicU32,
    is_gone: AtomicBool,
    is_let_go: AtomicBool,
}

#[derive(Default)]
struct Pending {
    replies: HashMap<u64, SyncSender<Reply>>,
    /// Nobody replies any more.
    is_closed: bool,
}

#[derive(Default)]
struct Groups {
    next: u32,
    connected: Vec<(GroupMark, GroupNumber, Arc<Worker>)>,
}

impl fmt::Debug for WorkerProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerProcess").field("id", &self.id).finish_non_exhaustive()
    }
}

/// An answer, and the descriptor that came with it.
type Reply = (Answer, Option<OwnedFd>);

/// A request to free pages.
struct Discard {
    vm: VmNumber,
    number: u64,
    pages: Range<u32>,
}

/// Where a reply arrives.
type Receiving = mpsc::Receiver<Reply>;

/// The worker is gone, and its VMs with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its worker process has ended")]
pub(crate) struct Gone;

impl WorkerProcess {
    /// Starts a worker. With a folder for its state, it outlives this process.
    pub(crate) fn start(program: &Path, state: Option<&Arc<StateFolder>>) -> io::Result<Arc<Self>> {
        let (ours, theirs) = wire::pair()?;
        let child = Command::new(program)
            .arg0("samepage")
            .arg(ARGUMENT)
            .stdin(Stdio::from(theirs))
            // Keys that end the managing process are not for its workers.
            .process_group(0)
            .spawn()?;
        let (mut sender, receiver) = wire::split(ours)?;
        let shelter = state.map(|state| Shelter {
            folder: state.path().to_owned(),
            patience_seconds: state.patience().as_secs(),
        });
        // A worker that is gone already is noticed by the thread that listens.
        let _ = sender.send(&Hello { version: VERSION, shelter }, None);
        let handle = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        let worker = Self::new((child.id(), handle), state, sender, false);
        worker.start_listening(receiver, Some(child))?;
        Ok(worker)
    }

    /// Returns a worker that another process has started. `handle` stands for its process.
    pub(crate) fn adopt(
        id: u32,
        handle: OwnedFd,
        state: &Arc<StateFolder>,
        (sender, receiver): (Sender, Receiver),
    ) -> io::Result<Arc<Self>> {
        let worker = Self::new((id, handle), Some(state), sender, true);
        worker.start_listening(receiver, None)?;
        Ok(worker)
    }

    fn new(
        (id, handle): (u32, OwnedFd),
        state: Option<&Arc<StateFolder>>,
        sender: Sender,
        is_adopted: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            state: state.cloned(),
            is_adopted,
            handle,
            sender: Mutex::new(sender),
            pending: Mutex::default(),
            next_request: AtomicU64::new(0),
            next_vm: AtomicU32::new(0),
            vms: Mutex::default(),
            groups: Mutex::default(),
            places: AtomicU32::new(0),
            is_gone: AtomicBool::new(false),
            is_let_go: AtomicBool::new(false),
        })
    }

    fn start_listening(self: &Arc<Self>, receiver: Receiver, child: Option<Child>) -> io::Result<()> {
        let listening = Arc::clone(self);
        thread::Builder::new()
            .name(format!("worker-{}", self.id))
            .stack_size(STACK_BYTES)
            .spawn(move || listening.listen(receiver, child))?;
        Ok(())
    }

    /// Returns the number of the process.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Whether the process has ended.
    pub(crate) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Acquire)
    }

    /// Ends the process, which has no VMs any more.
    pub(crate) fn end(&self) {
        if !self.is_let_go() {
            // It may have ended already.
            let _ = pidfd_send_signal(&self.handle, Signal::KILL);
        }
    }

    /// Ends the process, and removes its files.
    pub(crate) fn end_and_clean(&self) {
        self.end();
        if let Some(state) = self.state.as_ref().filter(|_| !self.is_let_go()) {
            self.wait(Some(DEATH));
            state.remove(self.id);
        }
    }

    /// Ends neither the process nor its VMs from now on. The next managing process takes them over.
    pub(crate) fn let_go(&self) {
        self.is_let_go.store(self.state.is_some(), Ordering::Release);
    }

    /// Lets go, and says nothing any more.
    pub(crate) fn disconnect(&self) {
        self.let_go();
        self.sender.lock().shut_down();
    }

    /// Whether it gets no further VMs.
    pub(crate) fn is_adopted(&self) -> bool {
        self.is_adopted
    }

    pub(crate) fn is_let_go(&self) -> bool {
        self.is_let_go.load(Ordering::Acquire)
    }

    /// Waits for the end of the process.
    fn wait(&self, limit: Option<Duration>) {
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        // Nothing is done where the kernel refuses.
        let _ = retry_on_intr(|| poll(&mut [PollFd::new(&self.handle, PollFlags::IN)], limit.as_ref()));
    }

    pub(crate) fn new_number(&self) -> VmNumber {
        VmNumber(self.next_vm.fetch_add(1, Ordering::Relaxed))
    }

    /// Has a VM told what the worker says of it.
    pub(crate) fn listen_for(&self, number: VmNumber, remote: &Arc<Remote>) {
        self.vms.lock().insert(number, Arc::clone(remote));
        // The worker may have ended before.
        if self.is_gone() {
            remote.tell_end(VmEnd::Failed(Gone.to_string()));
        }
    }

    pub(crate) fn forget(&self, number: VmNumber) {
        self.vms.lock().remove(&number);
    }

    /// Has something done, and waits for nothing.
    pub(crate) fn tell(&self, vm: VmNumber, order: Order) {
        let number = self.next_request.fetch_add(1, Ordering::Relaxed);
        // A worker that is gone has told the ends of its VMs.
        let _ = self.sender.lock().send(&Request { number, vm, order }, None);
    }

    /// Has something done, and waits for the answer.
    pub(crate) fn ask(&self, vm: VmNumber, order: Order) -> Result<Answer, Gone> {
        self.ask_with(vm, order, None).map(|(answer, _)| answer)
    }

    /// Asks for something that whoever waits can do without. `None` if the worker is gone or does not answer in time.
    pub(crate) fn ask_within(&self, vm: VmNumber, order: Order, limit: Duration) -> Option<Answer> {
        let (number, answer) = self.send(vm, order, None).ok()?;
        let answer = answer.recv_timeout(limit);
        if answer.is_err() {
            self.pending.lock().replies.remove(&number);
        }
        answer.ok().map(|(answer, _)| answer)
    }

    /// The same as [`ask`](Self::ask), with a descriptor in each direction.
    pub(crate) fn ask_with(
        &self,
        vm: VmNumber,
        order: Order,
        with: Option<BorrowedFd<'_>>,
    ) -> Result<Reply, Gone> {
        let (_, answer) = self.send(vm, order, with)?;
        // Nobody replies once the worker is gone: then the sending half is dropped.
        answer.recv().map_err(|_| Gone)
    }

    fn send(
        &self,
        vm: VmNumber,
        order: Order,
        with: Option<BorrowedFd<'_>>,
    ) -> Result<(u64, Receiving), Gone> {
        let number = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = mpsc::sync_channel(1);
        {
            let mut pending = self.pending.lock();
            if pending.is_closed {
                return Err(Gone);
            }
            pending.replies.insert(number, reply);
        }
        let sent = self.sender.lock().send(&Request { number, vm, order }, with);
        if sent.is_err() {
            self.pending.lock().replies.remove(&number);
            return Err(Gone);
        }
        Ok((number, answer))
    }

    /// Connects the engine of a group, if it is not connected yet. `None` where sharing has stopped for the group.
    pub(crate) fn connect(
        &self,
        place: &Place,
        vm: VmNumber,
    ) -> Result<Option<(GroupNumber, Arc<Worker>)>, String> {
        let mut groups = self.groups.lock();
        groups.connected.retain(|(mark, _, worker)| mark.exists() && !worker.has_ended());
        if let Some((_, number, worker)) = groups.connected.iter().find(|(mark, ..)| place.is_in(mark)) {
            return Ok(Some((*number, Arc::clone(worker))));
        }
        let failed = |error: &dyn fmt::Display| format!("connect its worker to the sharing engine: {error}");
        let out_of_files = "raise the limit of open files (ulimit -n)";
        let (ours, theirs) =
            worker::pair().map_err(|error| failed(&format_args!("{error}; {out_of_files}")))?;
        let process = Process::of(self.id).map_err(|error| failed(&error))?;
        let number = GroupNumber(groups.next);
        groups.next += 1;
        // The worker waits for what the engine says first.
        let (asked, connected) = thread::scope(|scope| {
            let asking = scope.spawn(|| {
                let asked = self.ask_with(vm, Order::Connect(number), Some(theirs.as_fd()));
                // The engine notices a worker that has refused.
                drop(theirs);
                asked.map(|(answer, _)| answer)
            });
            let connected = place.connect(ours, process);
            (asking.join(), connected)
        });
        let connected = connected.map_err(|error| failed(&error))?;
        match asked.map_err(|_| failed(&"a thread panicked"))?.map_err(|gone| failed(&gone))? {
            Answer::Done => {}
            Answer::Failed(reason) => return Err(failed(&reason)),
            other => return Err(failed(&format_args!("unexpected answer {other:?}"))),
        }
        let Some(worker) = connected else { return Ok(None) };
        groups.connected.push((place.mark(), number, Arc::clone(&worker)));
        Ok(Some((number, worker)))
    }

    fn listen(self: &Arc<Self>, mut receiver: Receiver, child: Option<Child>) {
        // An error: the worker is gone, or says what makes no sense.
        let mut discards = None;
        while let Ok((told, with)) = receiver.receive::<Told>() {
            match told {
                Told::Discard { vm, number, first, end } => {
                    self.pass_on(&mut discards, Discard { vm, number, pages: first..end });
                }
                told => self.heed(told, with),
            }
        }
        drop(discards);
        if self.is_let_go() {
            return;
        }
        self.end();
        self.wait(None);
        // The status of another process's child is not known.
        let ended = child.map(|mut child| child.wait().map_or_else(|error| error.to_string(), why));
        if let Some(state) = &self.state {
            state.remove(self.id);
        }
        self.is_gone.store(true, Ordering::Release);
        {
            // Not held for longer: who connects an engine has the groups, and asks.
            let mut pending = self.pending.lock();
            pending.is_closed = true;
            pending.replies.clear();
        }
        for (_, _, worker) in &self.groups.lock().connected {
            worker.look();
        }
        let reason = ended.map_or_else(String::new, |why| format!(": {why}"));
        let reason = format!("its worker process ended{reason}");
        let vms: Vec<_> = self.vms.lock().values().cloned().collect();
        for vm in vms {
            vm.tell_end(VmEnd::Failed(reason.clone()));
        }
    }

    /// Has a thread free pages that a guest gives back, so that whoever waits for the engine delays nobody else.
    fn pass_on(self: &Arc<Self>, thread: &mut Option<SyncSender<Discard>>, discard: Discard) {
        if thread.is_none() {
            let (sender, discards) = mpsc::sync_channel::<Discard>(MOST_DISCARDS);
            let worker = Arc::clone(self);
            let free = move || {
                for Discard { vm, number, pages } in discards {
                    let remote = worker.vms.lock().get(&vm).cloned();
                    let nothing = Discarded { next: pages.end, freed: 0 };
                    let discarded = remote.map_or(nothing, |remote| remote.discard(pages));
                    worker.answer(vm, number, discarded);
                }
            };
            let name = format!("pages-{}", self.id);
            let started = thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(free);
            *thread = started.ok().map(|_| sender);
        }
        let (vm, number, next) = (discard.vm, discard.number, discard.pages.end);
        // A device waits for each of its requests, so there are never as many.
        if thread.as_ref().is_none_or(|thread| thread.try_send(discard).is_err()) {
            self.answer(vm, number, Discarded { next, freed: 0 });
        }
    }

    fn answer(&self, vm: VmNumber, number: u64, Discarded { next, freed }: Discarded) {
        self.tell(vm, Order::Discarded { number, next, freed });
    }

    fn heed(&self, told: Told, with: Option<OwnedFd>) {
        let of = |vm: VmNumber, heed: &dyn Fn(&Remote)| {
            let vm = self.vms.lock().get(&vm).cloned();
            if let Some(vm) = vm {
                heed(&vm);
            }
        };
        match told {
            Told::Reply { number, answer } => {
                let reply = self.pending.lock().replies.remove(&number);
                if let Some(reply) = reply {
                    // Whoever asked waits for it.
                    let _ = reply.send((answer, with));
                }
            }
            Told::Console { vm, text } => {
                of(vm, &|vm| vm.copy_console(&text.chars().map(|char| char as u8).collect::<Vec<_>>()));
            }
            Told::Bell { vm } => of(vm, &Remote::ring),
            Told::Room { vm } => of(vm, &Remote::tell_room),
            Told::Ended { vm, end } => of(vm, &|vm| vm.tell_end(end.clone())),
            Told::Balloon { vm, frames } => of(vm, &|vm| vm.tell_balloon(frames)),
            // It has a thread of its own.
            Told::Discard { .. } => {}
            Told::DiskError { vm, disk, message } => of(vm, &|vm| vm.tell_disk_error(&disk, &message)),
        }
    }
}

/// Why a worker has ended.
fn why(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("killed by signal {signal}"),
        (None, Some(code)) => format!("exit status {code}"),
        (None, None) => status.to_string(),
    }
}
