//! The thread that serves a queue, asleep until the driver notifies or the device stops.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use super::queue::QueueError;

/// Address space of a worker's stack. Workers allocate their buffers and do not recurse, and one process
/// has hundreds of them.
const STACK_SIZE: usize = 256 << 10;
/// How long a worker without anything to do keeps what it has at hand, in milliseconds.
const PATIENCE_MS: i32 = 1000;

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

/// What a worker does.
pub(crate) trait Serve {
    /// Files that become readable with each thing that happens, whether or not anybody has read them.
    fn events(&self) -> Vec<RawFd>;

    /// Does what there is to do, and returns when nothing is left or the flag is set.
    ///
    /// # Errors
    /// Where the worker cannot go on.
    fn serve(&mut self, stop: &StopFlag) -> Result<(), QueueError>;

    /// Gives back what was kept for the next request: nothing has happened for a while.
    fn rest(&mut self);
}

impl Worker {
    /// Starts a thread called `name` on which `make` makes what is served: once at first, and again whenever
    /// something happens to one of its events.
    ///
    /// When serving fails or panics the driver is told that the device needs a reset, and the thread ends.
    ///
    /// # Errors
    /// Where `make` fails, or thread or events are not to be had.
    pub(crate) fn spawn<S: Serve>(
        name: String,
        interrupt: Arc<Interrupt>,
        make: impl FnOnce() -> io::Result<S> + Send + 'static,
    ) -> io::Result<Self> {
        let stop = StopFlag::default();
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), interest)?;
        let (report, reported) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name(name).stack_size(STACK_SIZE).spawn({
            let stop = stop.clone();
            move || {
                let made = make().and_then(|service| {
                    for event in service.events() {
                        epoll.ctl(ControlOperation::Add, event, interest)?;
                    }
                    Ok(service)
                });
                let mut service = match made {
                    Ok(service) => service,
                    Err(error) => {
                        // Whoever started this thread is waiting for it.
                        let _ = report.send(Err(error));
                        return;
                    }
                };
                let _ = report.send(Ok(()));
                let end = NeedsResetOnDrop(&interrupt);
                while !stop.is_set() {
                    if service.serve(&stop).is_err() {
                        return;
                    }
                    let waited = match wait(&epoll, PATIENCE_MS) {
                        Ok(false) => {
                            service.rest();
                            wait(&epoll, -1)
                        }
                        waited => waited,
                    };
                    if waited.is_err() {
                        return;
                    }
                }
                // Asked to stop between two calls: what is under way is waited for, and given up.
                if service.serve(&stop).is_ok() {
                    std::mem::forget(end);
                }
            }
        })?;
        let started = reported.recv().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")));
        let worker = Self { stop, wake, thread: Some(thread) };
        started.map(|()| worker)
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

/// Sleeps until something has happened since the last time, or for so many milliseconds; -1 for ever. Returns
/// whether something has.
fn wait(epoll: &Epoll, milliseconds: i32) -> io::Result<bool> {
    loop {
        match epoll.wait(milliseconds, &mut [EpollEvent::default(); 8]) {
            Ok(events) => return Ok(events > 0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
