//! A worker, as the engine knows it: its process, and the connection to it.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::changes::ChangeLog;
use crate::memory::guest::GuestMemory;
use crate::memory::loss;
use crate::remote::ahead::{Ahead, Words};
use crate::remote::buffer::{Buffer, WORDS};
use crate::remote::log::RemoteLog;
use crate::remote::memory::RemoteMemory;
pub use crate::remote::messages::VmIndex;
use crate::remote::messages::{Answer, Hello, Question, Reply, Request, VERSION, Welcome};
use crate::remote::socket::Socket;
pub use crate::remote::socket::pair;

/// A worker answers within a millisecond or two. If it has not for so long, sharing stops for its group.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// What is said of a worker that does not answer.
const SILENT: &str = "a worker process has stopped answering; whether it maps frames is not known";
/// A process that was killed ends as soon as its memory is freed: some 100 ms for each GiB.
const DEATH: Duration = Duration::from_secs(30);
/// Pages that it is worth to read at once: a question takes as long as some pages.
const BATCH: u32 = 32;

/// A process, which stays the same whoever has its number later.
#[derive(Debug)]
pub struct Process {
    handle: OwnedFd,
    id: u32,
}

impl Process {
    /// Takes hold of a process by its number. It must not have been waited for.
    ///
    /// # Errors
    /// Fails if there is no such process.
    pub fn of(id: u32) -> io::Result<Self> {
        let number = i32::try_from(id).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { handle: pidfd_open(number, PidfdFlags::empty())?, id })
    }

    /// Ends it. It may have ended already.
    fn kill(&self) {
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
    }

    /// Waits for its end. Returns whether it has ended: it has no memory any more.
    fn ends_within(&self, limit: Duration) -> bool {
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        let mut events = [PollFd::new(&self.handle, PollFlags::IN)];
        retry_on_intr(|| poll(&mut events, Some(&limit))).is_ok_and(|ready| ready > 0)
    }
}

/// A worker that the engine is connected to.
pub struct Worker {
    line: Mutex<Line>,
    process: Process,
    /// The process has ended, and all its mappings with it.
    ended: AtomicBool,
    /// A question was not answered in time: the next message would be its answer. Nothing more is asked.
    silent: AtomicBool,
    /// What is known of its VMs' logs. Locked before the line.
    ahead: Mutex<Ahead>,
    asked: AtomicU64,
}

struct Line {
    socket: Socket,
    buffer: Buffer,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("process", &self.process)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

/// What a worker is told of the frames.
pub(crate) struct Frames {
    /// The store, to be read.
    pub(crate) file: OwnedFd,
    /// Frames that it has room for.
    pub(crate) capacity: u32,
    /// The key of digests.
    pub(crate) key: Vec<u8>,
}

/// A VM of a worker's, to be [added](crate::engine::Engine::add_memory) to the engine.
pub struct RemoteVm {
    /// Its memory.
    pub memory: Arc<dyn GuestMemory>,
    /// What notes the writes to it, if anything does.
    pub log: Option<Box<dyn ChangeLog>>,
    /// Huge pages are wanted for it.
    pub is_huge: bool,
}

impl Worker {
    /// Connects to a worker whose end of a [`pair`] is served.
    ///
    /// # Errors
    /// Fails if the worker is gone, does not answer, or is of another version.
    pub(crate) fn greet(
        socket: OwnedFd,
        process: Process,
        frames: &Frames,
        patience: Duration,
    ) -> io::Result<Arc<Self>> {
        let mut socket = Socket::new(socket);
        socket.set_patience(patience)?;
        let (file, buffer) = Buffer::create()?;
        let Frames { file: store, capacity, key } = frames;
        let welcome = Welcome { version: VERSION, frames: *capacity, batch: BATCH, key: key.clone() };
        socket.send_with(&welcome, [store.as_fd(), file.as_fd()])?;
        let Hello { version } = socket.receive()?;
        if version != VERSION {
            let text =
                format!("the worker speaks version {version}, and this engine {VERSION}: restart the worker");
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        let line = Mutex::new(Line { socket, buffer });
        let (ended, silent, ahead, asked) = Default::default();
        Ok(Arc::new(Self { line, process, ended, silent, ahead, asked }))
    }

    /// Returns one of the worker's VMs.
    ///
    /// # Errors
    /// Fails if it has no such VM, or is gone.
    pub fn vm(self: &Arc<Self>, vm: VmIndex) -> io::Result<RemoteVm> {
        let take = |_: &Buffer, answer| match answer {
            Answer::Description(description) => Some(Ok(description)),
            Answer::Refused => Some(Err(io::Error::from(io::ErrorKind::NotFound))),
            _ => None,
        };
        let (description, _) =
            self.ask(vm, Question::Describe, |_| {}, take).ok_or(io::ErrorKind::NotConnected)?;
        let description = description?;
        let log = || Box::new(RemoteLog::new(Arc::clone(self), vm, description.pages)) as Box<dyn ChangeLog>;
        let log = description.has_log.then(log);
        let memory = Arc::new(RemoteMemory::new(Arc::clone(self), vm, description, BATCH));
        Ok(RemoteVm { memory, log, is_huge: description.is_huge })
    }

    /// The number of its process.
    pub(crate) fn process(&self) -> u32 {
        self.process.id
    }

    /// Whether the worker's process has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Whether it cannot be asked any more.
    pub(crate) fn is_out_of_reach(&self) -> bool {
        self.has_ended() || self.silent.load(Ordering::Acquire)
    }

    /// Notices the end of a worker that is asked for nothing. Returns whether it has ended.
    pub fn look(&self) -> bool {
        if !self.has_ended() && self.process.ends_within(Duration::ZERO) {
            self.end();
        }
        self.has_ended()
    }

    /// Whether a VM's log has had nothing to tell: see [`is_at_rest`](crate::changes::ChangeLog::is_at_rest). One
    /// question is enough for all of the worker's VMs.
    pub(crate) fn is_at_rest(&self, vm: VmIndex, since: Instant) -> bool {
        let mut ahead = self.ahead.lock();
        if let Some(is_at_rest) = ahead.is_at_rest(vm, since) {
            return is_at_rest;
        }
        let asked = Instant::now();
        let take = |buffer: &Buffer, answer| match answer {
            Answer::Number(count) if count as usize <= WORDS => {
                buffer.take_words(count as usize).map(|word| u32::try_from(word).ok().map(VmIndex)).collect()
            }
            _ => None,
        };
        let answer: Option<(BTreeSet<_>, _)> = self.ask(vm, Question::AtRest, |_| {}, take);
        let at_rest = answer.map(|(at_rest, _)| at_rest).unwrap_or_default();
        let is_at_rest = at_rest.contains(&vm);
        ahead.set_at_rest(asked, at_rest);
        is_at_rest
    }

    /// Reads a VM's log, if another VM's is likely to be read next, and the logs of those with it. Returns what has
    /// been read of it. It must be read by itself if that is not new.
    pub(crate) fn collect_with_others(&self, vm: VmIndex) -> Words {
        let mut ahead = self.ahead.lock();
        let before = ahead.take(vm);
        if before.is_new {
            return before;
        }
        let vms = ahead.together_with(vm);
        if vms.len() == 1 {
            return before;
        }
        let asked = Instant::now();
        let take = |buffer: &Buffer, answer| match answer {
            Answer::Number(count) if count as usize <= WORDS => {
                ahead.note(asked, &vms, buffer, count as usize)
            }
            _ => None,
        };
        self.ask(vm, Question::CollectAll(vms.clone()), |_| {}, take);
        let mut words = ahead.take(vm);
        words.add(before);
        words
    }

    /// What was read of a VM's log is to be taken another time.
    pub(crate) fn put_back(&self, vm: VmIndex, words: Words) {
        self.ahead.lock().put_back(vm, words);
    }

    /// A VM's log is read no more.
    pub(crate) fn forget_log(&self, vm: VmIndex) {
        self.ahead.lock().forget(vm);
    }

    /// How many questions it was asked.
    #[doc(hidden)]
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Asks for something. `put` fills the buffer before, and `take` reads the answer and the buffer. Returns what was
    /// taken, and whether the VM has lost memory; `None` where the worker has ended or was silent, or was ended since
    /// its answer makes no sense.
    ///
    /// # Panics
    /// The first time that the worker does not answer, and where it does not end: which frames it maps is not known
    /// then. Sharing stops for the group, and guests go on.
    pub(crate) fn ask<T>(
        &self,
        vm: VmIndex,
        question: Question,
        put: impl FnOnce(&Buffer),
        take: impl FnOnce(&Buffer, Answer) -> Option<T>,
    ) -> Option<(T, bool)> {
        let mut line = self.line.lock();
        if self.is_out_of_reach() {
            return None;
        }
        self.asked.fetch_add(1, Ordering::Relaxed);
        put(&line.buffer);
        let exchanged = line.exchange(&Request { vm, question });
        let answer = match exchanged {
            Ok(Reply { lost, answer }) => take(&line.buffer, answer).map(|taken| (taken, lost)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.silent.store(true, Ordering::Release);
                loss::note();
                panic!("{SILENT}");
            }
            Err(_) => None,
        };
        if answer.is_none() {
            self.end();
        }
        answer
    }

    /// Ends the process, and waits until it has no memory any more.
    fn end(&self) {
        self.process.kill();
        assert!(self.process.ends_within(DEATH), "a worker has not ended {DEATH:?} after it was killed");
        if !self.ended.swap(true, Ordering::AcqRel) {
            loss::note();
        }
    }
}

impl Line {
    fn exchange(&mut self, request: &Request) -> io::Result<Reply> {
        self.socket.send(request)?;
        self.socket.receive()
    }
}
