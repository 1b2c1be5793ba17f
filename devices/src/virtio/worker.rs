//! The thread that serves a queue. It sleeps until the driver notifies it or the device stops.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use super::queue::QueueError;

/// Address space of a worker's stack, in bytes. Workers allocate their buffers and do not recurse, and one
/// process has hundreds of workers.
const STACK_SIZE: usize = 256 << 10;
/// Time after which an idle worker frees its spare buffers, in milliseconds.
const IDLE_MS: i32 = 1000;

/// Asks a worker to stop. Long requests check the flag between steps.
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

/// The work of a worker.
pub(crate) trait Serve {
    /// Returns files that become readable at each new event, whether or not earlier events were read.
    fn events(&self) -> Vec<RawFd>;

    /// Returns files that become readable or writable at each new event.
    fn links(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// Does all available work. Returns when nothing is left or the flag is set.
    ///
    /// # Errors
    /// Fails if the worker cannot continue.
    fn serve(&mut self, stop: &StopFlag) -> Result<(), QueueError>;

    /// Frees resources for the next request, because there was no event for a while.
    fn on_idle(&mut self);
}

impl Worker {
    /// Starts a thread called `name`, on which `make` makes the service. The service runs once immediately,
    /// and again at each event.
    ///
    /// If serving fails or panics, the driver is told that the device needs a reset, and the thread ends.
    ///
    /// # Errors
    /// Fails if `make` fails, or if the thread or its events cannot be created.
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
                    let both = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
                    for link in service.links() {
                        epoll.ctl(ControlOperation::Add, link, EpollEvent::new(both, 0))?;
                    }
                    Ok(service)
                });
                let mut service = match made {
                    Ok(service) => service,
                    Err(error) => {
                        // The starter of this thread is waiting for the result.
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
                    let waited = match wait(&epoll, IDLE_MS) {
                        Ok(false) => {
                            service.on_idle();
                            wait(&epoll, -1)
                        }
                        waited => waited,
                    };
                    if waited.is_err() {
                        return;
                    }
                }
                // Stopped between two calls: the service waits for requests in progress and drops them.
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
        // A full event counter is readable, and the worker needs no more than that.
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            // A worker that panicked has already told the driver.
            let _ = thread.join();
        }
    }
}

/// Tells the driver that the device is broken, unless the worker ends on request.
struct NeedsResetOnDrop<'a>(&'a Interrupt);

impl Drop for NeedsResetOnDrop<'_> {
    fn drop(&mut self) {
        // Requests that were completed before the failure stay completed.
        self.0.signal_used();
        self.0.set_needs_reset();
    }
}

/// Sleeps until a new event or for this many milliseconds; -1 means for ever. Returns whether there was an
/// event.
fn wait(epoll: &Epoll, milliseconds: i32) -> io::Result<bool> {
    loop {
        match epoll.wait(milliseconds, &mut [EpollEvent::default(); 8]) {
            Ok(events) => return Ok(events > 0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
