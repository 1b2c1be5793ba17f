//! The worker's end: answers what the engine asks of the memory of the worker's VMs.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use crate::changes::{ChangeLog, PageSet};
use crate::memory::calls::{Linux, MemoryCalls};
use crate::memory::content::{Digester, Snapshot};
use crate::memory::frame_view::{Access, FrameView};
use crate::memory::guest::{GuestMemory, Harvest, Like, Neighbours, Remapped, SpaceError, WINDOW_PAGES};
use crate::memory::local::{Host, LocalMemory};
use crate::memory::pagemap::Entry;
use crate::memory::ram::{HUGE_PAGES, Ram};
use crate::memory::uffd::UffdError;
use crate::numbers::Frame;
use crate::remote::buffer::{Buffer, WORDS};
use crate::remote::messages::{
    Answer, Description, Hello, MOST_PAGES, MOST_VMS, Order, Question, Reply, Request, VERSION, VmIndex,
    Welcome, Which, number_of, sign,
};
use crate::remote::socket::Socket;

/// How long the engine may have nothing to ask before writers are woken that a window has missed.
const IDLE: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

/// Why a worker cannot serve the engine.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The engine is gone, or says what makes no sense.
    #[error("talking to the sharing engine: {0}")]
    Connection(#[from] io::Error),
    /// Pages cannot be write-protected.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The engine is of another version.
    #[error("the sharing engine speaks version {0}, and this worker {VERSION}: restart the worker")]
    Version(u32),
}

/// One of the worker's VMs.
struct Vm {
    memory: Arc<dyn GuestMemory>,
    is_huge: bool,
    log: Option<Box<dyn ChangeLog>>,
    /// Pages of the log that the engine has not been told, and the word at which they begin.
    written: PageSet,
    next_word: Option<usize>,
    /// No order takes effect any more that is not about content.
    is_sealed: bool,
}

/// The VMs of a worker, to which VMs are added while the engine is served.
pub struct Vms {
    host: Host,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    vms: BTreeMap<VmIndex, Arc<Mutex<Vm>>>,
    next: u32,
}

impl fmt::Debug for Vms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vms").field("count", &self.known.lock().vms.len()).finish_non_exhaustive()
    }
}

impl Vms {
    /// Takes a VM's RAM in, with the log of the writes to it, if there is one. The engine is told its number.
    ///
    /// # Errors
    /// Fails if the RAM cannot be registered with userfaultfd.
    pub fn add(&self, ram: Arc<Ram>, log: Option<Box<dyn ChangeLog>>) -> io::Result<VmIndex> {
        let is_huge = ram.huge();
        let memory: Arc<dyn GuestMemory> = Arc::new(LocalMemory::new(ram, self.host.clone())?);
        let written = PageSet::new(memory.pages());
        let vm = Vm { memory, is_huge, log, written, next_word: None, is_sealed: false };
        let mut known = self.known.lock();
        let index = VmIndex(known.next);
        known.next += 1;
        known.vms.insert(index, Arc::new(Mutex::new(vm)));
        Ok(index)
    }

    /// Lets a VM go, once the engine has emptied its memory, or is gone.
    pub fn remove(&self, vm: VmIndex) {
        self.known.lock().vms.remove(&vm);
    }

    /// From now on, pages of a VM are mapped anew only where their content stays the same. Orders to map pages whatever
    /// they hold are refused, also those that are on their way.
    ///
    /// A disk asks the engine to deliver blocks, and the engine may order that and then say nothing more, for instance
    /// since its process was killed. Before the disk reads these blocks itself, it seals the memory. Otherwise the order,
    /// which still waits, would cover what the guest has written since.
    pub fn seal(&self, vm: VmIndex) {
        if let Some(vm) = self.get(vm) {
            // An order that is being carried out has the lock.
            vm.lock().is_sealed = true;
        }
    }

    fn get(&self, vm: VmIndex) -> Option<Arc<Mutex<Vm>>> {
        self.known.lock().vms.get(&vm).cloned()
    }
}

/// A connection to the engine.
pub struct Server {
    socket: Socket,
    buffer: Buffer,
    calls: Arc<dyn MemoryCalls>,
    frames: Arc<FrameView>,
    vms: Arc<Vms>,
    harvest: Harvest,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("vms", &self.vms).finish_non_exhaustive()
    }
}

impl Server {
    /// Waits for what the engine says first, and answers it. `socket` is the worker's end of a
    /// [`pair`](crate::remote::socket::pair).
    ///
    /// # Errors
    /// See [`ServeError`].
    pub fn accept(socket: OwnedFd) -> Result<Self, ServeError> {
        Self::accept_with(socket, |store| Ok(Arc::new(Linux::open(store)?)))
    }

    /// As [`accept`](Self::accept), with calls of the caller's for the memory file of the frames.
    ///
    /// # Errors
    /// See [`ServeError`].
    #[doc(hidden)]
    pub fn accept_with(
        socket: OwnedFd,
        calls: impl FnOnce(Arc<OwnedFd>) -> Result<Arc<dyn MemoryCalls>, UffdError>,
    ) -> Result<Self, ServeError> {
        let mut socket = Socket::new(socket);
        let (welcome, [store, buffer]) = socket.receive_with::<Welcome, 2>()?;
        socket.send(&Hello { version: VERSION })?;
        if welcome.version != VERSION {
            return Err(ServeError::Version(welcome.version));
        }
        let buffer = Buffer::map(&buffer)?;
        let frames = Arc::new(FrameView::map(&store, welcome.frames, Access::Read)?);
        let calls = calls(Arc::new(store))?;
        let no_key = || io::Error::new(io::ErrorKind::InvalidData, "the key of digests has another length");
        let digester = Arc::new(Digester::with_key(&welcome.key).ok_or_else(no_key)?);
        let batch = welcome.batch.clamp(1, MOST_PAGES);
        let host = Host::with(Arc::clone(&calls), Arc::clone(&frames), digester, batch)?;
        let vms = Arc::new(Vms { host, known: Mutex::default() });
        Ok(Self { socket, buffer, calls, frames, vms, harvest: Harvest::default() })
    }

    /// The worker's VMs.
    #[must_use]
    pub fn vms(&self) -> Arc<Vms> {
        Arc::clone(&self.vms)
    }

    /// Answers until the engine is gone. Guests go on then: what they share stays mapped.
    ///
    /// # Errors
    /// Fails if the engine says what makes no sense.
    pub fn run(mut self) -> io::Result<()> {
        let outcome = self.answer_all();
        // Each window is closed by the answer that has opened it. Nobody asks again, so who was missed is woken now.
        self.calls.wake_latecomers();
        match outcome {
            Err(error) if is_gone(&error) => Ok(()),
            outcome => outcome,
        }
    }

    fn answer_all(&mut self) -> io::Result<()> {
        let mut may_wait = false;
        loop {
            if may_wait && !self.is_asked_soon()? {
                self.calls.wake_latecomers();
                may_wait = false;
            }
            let Request { vm, question } = self.socket.receive()?;
            may_wait |=
                matches!(question, Question::Remap(_) | Question::Restore(_) | Question::Empty { .. });
            let reply = self.reply(vm, question);
            self.socket.send(&reply)?;
        }
    }

    /// Whether the engine asks again within a moment.
    fn is_asked_soon(&self) -> io::Result<bool> {
        let mut events = [PollFd::new(&self.socket, PollFlags::IN)];
        Ok(retry_on_intr(|| poll(&mut events, Some(&IDLE)))? > 0)
    }

    fn reply(&mut self, vm: VmIndex, question: Question) -> Reply {
        let Some(vm) = self.vms.get(vm) else { return Reply { lost: true, answer: Answer::Refused } };
        let of_several = match &question {
            Question::AtRest => Some(self.at_rest()),
            Question::CollectAll(vms) => Some(self.collect_all(vms)),
            _ => None,
        };
        let mut vm = vm.lock();
        if let Some(answer) = of_several {
            return Reply { lost: vm.memory.lost(), answer };
        }
        let Self { buffer, frames, harvest, .. } = self;
        let answer = vm.answer(question, buffer, frames, harvest);
        // After the reading: see `loss`.
        Reply { lost: vm.memory.lost(), answer }
    }

    /// Tells what was written in VMs, of those whose log there is room for.
    fn collect_all(&self, vms: &[VmIndex]) -> Answer {
        let mut used = 0;
        for &index in vms.iter().take(MOST_VMS) {
            let Some(vm) = self.vms.get(index) else { continue };
            let room = WORDS.saturating_sub(used + 1);
            if let Some(count) = vm.lock().collect_whole(&self.buffer, used + 1, room) {
                self.buffer.put_words(used, [u64::from(index.0) << 32 | count as u64]);
                used += 1 + 2 * count;
            }
        }
        Answer::Number(used as u32)
    }

    /// Tells which VMs are at rest, as many as there is room for.
    fn at_rest(&self) -> Answer {
        let now = Instant::now();
        let vms: Vec<_> =
            self.vms.known.lock().vms.iter().map(|(&index, vm)| (index, Arc::clone(vm))).collect();
        let at_rest =
            vms.iter().filter(|(_, vm)| vm.lock().is_at_rest(now)).map(|(index, _)| u64::from(index.0));
        let at_rest: Vec<_> = at_rest.take(WORDS).collect();
        self.buffer.put_words(0, at_rest.iter().copied());
        Answer::Number(at_rest.len() as u32)
    }
}

/// Whether the engine has ended. It may have left an answer unread.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | BrokenPipe | ConnectionReset)
}

/// Whether pages are of a memory of so many pages, so many of them at most.
fn within(pages: &Range<u32>, of: u32, most: u32) -> bool {
    pages.start <= pages.end && pages.end <= of && pages.end - pages.start <= most
}

fn failed(error: &io::Error) -> Answer {
    Answer::Failed(number_of(error))
}

/// What becomes of an order that comes too late.
fn refused(order: &Order) -> Remapped {
    let error = io::Error::from_raw_os_error(libc::EPERM);
    let (first, count) = (order.first, order.count);
    Remapped { pages: 0, error: Some(SpaceError::Refused { doing: "remapping", first, count, error }) }
}

/// Puts runs in, as many as there is room for.
fn put_runs(buffer: &Buffer, runs: &[Range<u32>], end: u32, outcome: io::Result<()>) -> Answer {
    let count = runs.len().min(WORDS);
    let word = |run: &Range<u32>| u64::from(run.start) << 32 | u64::from(run.end);
    buffer.put_words(0, runs[..count].iter().map(word));
    let up_to = runs.get(count).map_or(end, |next| next.start);
    Answer::Runs { count: count as u32, up_to, error: outcome.err().map(|error| number_of(&error)) }
}

impl Vm {
    /// Does what is asked. The engine counts pages as the memory does, so a number beyond its end is a fault of the
    /// engine's: it is refused.
    fn answer(
        &mut self,
        question: Question,
        buffer: &Buffer,
        frames: &FrameView,
        harvest: &mut Harvest,
    ) -> Answer {
        let memory = Arc::clone(&self.memory);
        let pages = memory.pages();
        let is_sound = match &question {
            Question::Private(range) | Question::Huge(range) | Question::Zeros(range) => {
                within(range, pages, pages)
            }
            Question::Entries(range) => within(range, pages, WORDS as u32),
            Question::Empty { pages: range, .. } => within(range, pages, pages),
            Question::Split(first) => pages.checked_sub(HUGE_PAGES).is_some_and(|last| *first <= last),
            Question::Harvest(wanted) => {
                wanted.len() <= MOST_PAGES as usize && wanted.iter().all(|&(page, _)| page < pages)
            }
            Question::Read(page) | Question::Order(page) => *page < pages,
            Question::Matching { pages: range, frame, .. } => {
                let count = range.end.wrapping_sub(range.start);
                let has_frames = frame
                    .is_none_or(|first| first.checked_add(count).is_some_and(|end| end <= frames.count()));
                within(range, pages, MOST_PAGES) && has_frames
            }
            Question::Contents(range) => within(range, pages, MOST_PAGES),
            Question::Restore(range) => within(range, pages, WINDOW_PAGES) && range.start < range.end,
            Question::Remap(order) => {
                let end = order.first.checked_add(order.count);
                let last = order.frame.map_or(Some(0), |first| first.checked_add(order.count));
                (1..=WINDOW_PAGES).contains(&order.count)
                    && order.copies <= order.count
                    && end.is_some_and(|end| end <= pages)
                    && last.is_some_and(|last| last <= frames.count())
            }
            Question::Arm { first_word, words } => {
                let last = self.written.words().len() as u32;
                *words as usize <= WORDS && first_word.checked_add(*words).is_some_and(|end| end <= last)
            }
            Question::Describe | Question::Leave | Question::Collect | Question::SetNoting(_) => true,
            // Not about one VM.
            Question::AtRest | Question::CollectAll(_) => false,
        };
        if is_sound { self.do_so(&*memory, question, buffer, harvest) } else { Answer::Refused }
    }

    fn do_so(
        &mut self,
        memory: &dyn GuestMemory,
        question: Question,
        buffer: &Buffer,
        harvest: &mut Harvest,
    ) -> Answer {
        match question {
            Question::Describe => Answer::Description(Description {
                pages: memory.pages(),
                address: memory.address() as u64,
                tells_huge: memory.tells_huge(),
                is_huge: self.is_huge,
                has_log: self.log.is_some(),
            }),
            Question::Leave => {
                memory.leave();
                Answer::Done
            }
            Question::Private(pages) => {
                let (end, mut runs) = (pages.end, Vec::new());
                let outcome = memory.private(pages, &mut runs);
                put_runs(buffer, &runs, end, outcome)
            }
            Question::Huge(pages) => {
                let (end, mut runs) = (pages.end, Vec::new());
                let outcome = memory.huge(pages, &mut runs);
                put_runs(buffer, &runs, end, outcome)
            }
            Question::Entries(pages) => {
                let mut entries = vec![Entry::default(); (pages.end - pages.start) as usize];
                memory
                    .entries(pages, &mut entries)
                    .map(|()| {
                        buffer.put_words(0, entries.iter().map(|entry| entry.word()));
                    })
                    .into()
            }
            Question::Split(first) => match memory.split(first) {
                Ok(split) => Answer::Truth(split),
                Err(error) => failed(&error),
            },
            Question::Harvest(wanted) => {
                harvest.clear();
                wanted.iter().for_each(|&(page, digest)| harvest.want(page, digest));
                memory.harvest(harvest);
                let put = |index: usize| {
                    let (_, seen, content) = harvest.get(index);
                    buffer.put(index as u32, content);
                    seen.into()
                };
                Answer::Seen((0..harvest.len()).map(put).collect())
            }
            Question::Read(page) => {
                buffer.put(0, &memory.read(page));
                Answer::Done
            }
            Question::Order(page) => {
                let mut content = Snapshot::default();
                buffer.take(0, content.bytes_mut());
                Answer::Order(sign(memory.order(&content, page)))
            }
            Question::Zeros(pages) => Answer::Number(memory.zeros(pages)),
            Question::Matching { pages, frame, is_ahead, distance } => {
                let like = match frame {
                    Some(frame) => Like::Frames(Frame::new(frame)),
                    None => Like::Pages(buffer.bytes(pages.end - pages.start)),
                };
                Answer::Number(memory.matching(Neighbours { pages, like, is_ahead, distance }))
            }
            Question::Contents(pages) => {
                memory.contents(pages, &mut |bytes| buffer.put_pages(bytes));
                Answer::Done
            }
            Question::Remap(order) => {
                let remapped = match order.rule {
                    Which::Any if self.is_sealed => refused(&order),
                    _ => memory.remap(order.into()),
                };
                Answer::remapped(remapped, memory.longest_window())
            }
            Question::Restore(pages) => {
                let remapped = memory.restore(pages);
                Answer::remapped(remapped, memory.longest_window())
            }
            Question::Empty { pages, mapped } => memory.empty(pages, mapped).into(),
            Question::Collect => self.collect(buffer),
            Question::Arm { first_word, words } => {
                let words: Vec<u64> = buffer.take_words(words as usize).collect();
                self.log(|log| log.arm(first_word as usize, &words))
            }
            Question::SetNoting(noting) => self.log(|log| log.set_noting(noting)),
            Question::AtRest | Question::CollectAll(_) => Answer::Refused,
        }
    }

    /// Whether the log has nothing to tell that it has not told.
    fn is_at_rest(&mut self, now: Instant) -> bool {
        let is_told = self.next_word.is_none() && !self.memory.lost();
        is_told && self.log.as_deref_mut().is_some_and(|log| log.is_at_rest(now))
    }

    fn log(&mut self, order: impl FnOnce(&mut dyn ChangeLog) -> io::Result<()>) -> Answer {
        self.log.as_deref_mut().map_or(Answer::Refused, |log| order(log).into())
    }

    /// Puts in all that was written, at a place of the buffer where there is room for so many words. Returns the number
    /// of pairs; `None` if there is no room, or if the log cannot be read.
    fn collect_whole(&mut self, buffer: &Buffer, at: usize, room: usize) -> Option<usize> {
        let log = self.log.as_deref_mut()?;
        if self.next_word.is_some() || self.memory.lost() {
            return None;
        }
        // What was noted up to an error is named by the next call.
        log.collect(&mut self.written).ok()?;
        let count = self.written.words().iter().filter(|&&word| word != 0).count();
        if 2 * count > room {
            self.next_word = Some(0);
            return None;
        }
        let full = self.written.words_mut().iter_mut().enumerate().filter(|(_, word)| **word != 0);
        buffer.put_words(at, full.flat_map(|(index, word)| [index as u64, std::mem::take(word)]));
        Some(count)
    }

    /// Puts in what was written: an index and a word for each 64 pages of which some were.
    fn collect(&mut self, buffer: &Buffer) -> Answer {
        let Some(log) = self.log.as_deref_mut() else { return Answer::Refused };
        if self.next_word.is_none()
            && let Err(error) = log.collect(&mut self.written)
        {
            // What was noted so far is named by the next call.
            return failed(&error);
        }
        let from = self.next_word.take().unwrap_or(0);
        let mut count = 0;
        for (index, word) in self.written.words_mut().iter_mut().enumerate().skip(from) {
            if *word == 0 {
                continue;
            }
            if count == WORDS / 2 {
                self.next_word = Some(index);
                break;
            }
            buffer.put_words(2 * count, [index as u64, std::mem::take(word)]);
            count += 1;
        }
        Answer::Words { count: count as u32, more: self.next_word.is_some() }
    }
}
