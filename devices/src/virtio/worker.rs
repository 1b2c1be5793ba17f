//! The thread that serves a queue, asleep until the driver notifies or the device stops.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use super::queue::QueueError;

/// Address space of a worker's stack. Workers allocate their buffers and do not recurse, and one process
/// has hundreds of them.
const STACK_SIZE: usize = 128 << 10;

/// Asks a worker to stop. Long requests look at it between steps.
#[derive(Clone, Debug, Default)]
pub(crate) struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A running worker. Dropping it stops the thread and waits for its end.
#[derive(Debug)]
pub(crate) struct Worker {
    stop: StopFlag,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread called `name` that calls `serve` once, and again whenever `notified` is written.
    ///
    /// `serve` returns when there is nothing left to do or the flag is set. When it fails or panics the
    /// driver is told that the device needs a reset, and the thread ends.
    pub(crate) fn spawn(
        name: String,
        notified: EventFd,
        interrupt: Arc<Interrupt>,
        mut serve: impl FnMut(&StopFlag) -> Result<(), QueueError> + Send + 'static,
    ) -> io::Result<Self> {
        let stop = StopFlag::default();
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        for event in [&notified, &wake] {
            let interest = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest)?;
        }
        let thread = thread::Builder::new().name(name).stack_size(STACK_SIZE).spawn({
            let stop = stop.clone();
            move || {
                let end = NeedsResetOnDrop(&interrupt);
                while !stop.is_set() {
                    if serve(&stop).is_err() || wait(&epoll, &notified).is_err() {
                        return;
                    }
                }
                std::mem::forget(end);
            }
        })?;
        Ok(Self { stop, wake, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.set();
        // A full event counter is readable, which is all that the worker waits for.
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            // A worker that panicked has told the driver so.
            let _ = thread.join();
        }
    }
}

/// Tells the driver that the device is broken, unless the worker ends because it was asked to.
struct NeedsResetOnDrop<'a>(&'a Interrupt);

impl Drop for NeedsResetOnDrop<'_> {
    fn drop(&mut self) {
        // Requests that were completed before the failure stay completed.
        self.0.signal_used();
        self.0.set_needs_reset();
    }
}

/// Sleeps until either event is written, then clears the driver's.
fn wait(epoll: &Epoll, notified: &EventFd) -> io::Result<()> {
    loop {
        match epoll.wait(-1, &mut [EpollEvent::default(); 2]) {
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    match notified.read() {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(()),
    }
}
