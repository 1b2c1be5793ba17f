//! Operations that threads carry out, for images other than plain files and for hosts without io_uring.
//!
//! The threads belong to one disk and serve all its queues. They run as long as any queue does.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use super::channel::{Action, Channel, ChannelLost, Completion, Operation};
use super::image::Image;
use super::memory::Memory;

/// Number of threads of one disk, and so of simultaneous requests to its image.
const THREADS: usize = 4;
/// Address space of a thread's stack, in bytes. Access to a chain of images is recursive.
const STACK_SIZE: usize = 512 << 10;

struct Job {
    operation: Operation,
    reply: Arc<Reply>,
}

/// The completions of one queue.
struct Reply {
    completions: Mutex<Vec<Completion>>,
    arrived: Condvar,
    event: EventFd,
}

#[derive(Default)]
struct Jobs {
    queue: VecDeque<Job>,
    is_closed: bool,
}

#[derive(Default)]
struct Shared {
    jobs: Mutex<Jobs>,
    added: Condvar,
}

impl Shared {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads of one disk. Dropping the pool waits for their end.
pub(super) struct ThreadPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl ThreadPool {
    /// Starts threads with the name `name` that serve `image`.
    pub(super) fn start(name: &str, image: &Arc<dyn Image>) -> io::Result<Self> {
        let mut pool = Self { shared: Arc::default(), threads: Vec::with_capacity(THREADS) };
        for _ in 0..THREADS {
            let (shared, image) = (pool.shared.clone(), image.clone());
            let builder = thread::Builder::new().name(name.to_owned()).stack_size(STACK_SIZE);
            match builder.spawn(move || work(&shared, image.as_ref())) {
                Ok(thread) => pool.threads.push(thread),
                // One thread is enough to continue.
                Err(_) if !pool.threads.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(pool)
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.jobs().is_closed = true;
        self.shared.added.notify_all();
        for thread in self.threads.drain(..) {
            // Panics of images are caught. No other panic could be reported to anybody.
            let _ = thread.join();
        }
    }
}

fn work(shared: &Shared, image: &dyn Image) {
    loop {
        let mut jobs = shared.jobs();
        let Job { mut operation, reply } = loop {
            match jobs.queue.pop_front() {
                Some(job) => break job,
                None if jobs.is_closed => return,
                None => jobs = shared.added.wait(jobs).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(jobs);
        let outcome = catch_unwind(AssertUnwindSafe(|| carry_out(image, &mut operation)));
        let completion = match outcome {
            Ok(result) => Completion { operation, result, is_lost: false },
            Err(_) => {
                let error = io::Error::other("the code that serves the image panicked");
                Completion { operation, result: Err(error), is_lost: true }
            }
        };
        reply.completions.lock().unwrap_or_else(PoisonError::into_inner).push(completion);
        reply.arrived.notify_one();
        // Writing fails only if the event counter is full. The queue's worker is awake then.
        let _ = reply.event.write(1);
    }
}

fn carry_out(image: &dyn Image, operation: &mut Operation) -> io::Result<()> {
    let offset = operation.offset;
    match &mut operation.action {
        Action::Read(layer, memory) => match image.raw() {
            Some(raw) => raw.transfer(memory, offset, false),
            None => image.read_at(*layer, offset, memory.bytes_mut().ok_or_else(misplaced)?),
        },
        Action::Write(memory) => match (image.raw(), &*memory) {
            (Some(raw), _) => raw.transfer(memory, offset, true),
            (None, Memory::Bounce(bounce)) => image.write_at(offset, bounce.bytes()),
            (None, _) => Err(misplaced()),
        },
        Action::Flush => image.flush(),
        Action::Discard(len) => image.discard(offset, *len),
        Action::Zero { len, unmap } => image.write_zeroes(offset, *len, *unmap),
    }
}

fn misplaced() -> io::Error {
    io::Error::other("this image cannot use that memory")
}

/// The connection of one queue to the threads.
pub(super) struct ThreadChannel {
    pool: Arc<ThreadPool>,
    reply: Arc<Reply>,
    waiting: Vec<Operation>,
    submitted: usize,
}

impl ThreadChannel {
    pub(super) fn new(pool: Arc<ThreadPool>) -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let reply = Reply { completions: Mutex::default(), arrived: Condvar::new(), event };
        Ok(Self { pool, reply: Arc::new(reply), waiting: Vec::new(), submitted: 0 })
    }
}

impl Channel for ThreadChannel {
    fn submit(&mut self, operation: Operation) {
        self.waiting.push(operation);
    }

    fn kick(&mut self) -> Result<(), ChannelLost> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let mut jobs = self.pool.shared.jobs();
        let count = self.waiting.len();
        self.submitted += count;
        let reply = &self.reply;
        jobs.queue.extend(self.waiting.drain(..).map(|operation| Job { operation, reply: reply.clone() }));
        drop(jobs);
        for _ in 0..count.min(self.pool.threads.len()) {
            self.pool.shared.added.notify_one();
        }
        Ok(())
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) -> Result<(), ChannelLost> {
        let before = completions.len();
        completions.append(&mut self.reply.completions.lock().unwrap_or_else(PoisonError::into_inner));
        self.submitted -= completions.len() - before;
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.submitted + self.waiting.len()
    }

    fn wait(&mut self) -> Result<(), ChannelLost> {
        self.kick()?;
        if self.submitted > 0 {
            let completions = self.reply.completions.lock().unwrap_or_else(PoisonError::into_inner);
            let none = |completions: &mut Vec<_>| completions.is_empty();
            drop(self.reply.arrived.wait_while(completions, none));
        }
        Ok(())
    }

    fn event(&self) -> RawFd {
        self.reply.event.as_raw_fd()
    }
}

impl Drop for ThreadChannel {
    fn drop(&mut self) {
        self.waiting.clear();
        while self.submitted > 0 {
            // Lost operations do not matter any more.
            let _ = self.wait();
            let _ = self.reap(&mut Vec::new());
        }
    }
}
