//! What a worker does while no process manages it: its VMs go on, and it waits for the next managing process.
//!
//! A VM that ends meanwhile frees its memory at once, and its end is kept. A worker whose VMs have all ended waits for
//! a bounded time, and then leaves a report on their ends.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::retry_on_intr;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::process::umask;

use crate::messages::{self, Greeting, Hello, VERSION};
use crate::state::{Files, own_user};
use crate::wire::{self, Receiver, Sender};

/// How long a process that connects may take for its first message.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// The place at which a worker is found.
pub(super) struct Shelter {
    files: Files,
    listener: UnixListener,
    patience: Duration,
    /// Held while the worker lives.
    _lock: File,
}

/// Says that a VM has ended or is gone.
pub(super) struct News(OwnedFd);

impl News {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(super) fn tell(&self) {
        // A full counter is readable as well.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

/// What a worker without a managing process waits for.
pub(super) enum Next {
    /// Another process manages the worker from now on.
    Managed(Sender, Receiver),
    /// A VM has ended or is gone.
    News,
    /// The time is over.
    Late,
}

impl Shelter {
    /// Opens the place. To be called before there are other threads.
    ///
    /// # Errors
    /// Fails if the files cannot be made.
    pub(super) fn open(place: &messages::Shelter) -> io::Result<Self> {
        let files = Files::of(&place.folder, std::process::id());
        let lock = files.take_lock()?;
        // A process that had this process's number may have left it.
        let _ = std::fs::remove_file(&files.socket);
        let before = umask(rustix::fs::Mode::from_raw_mode(0o177));
        let listener = UnixListener::bind(&files.socket);
        umask(before);
        let listener = listener?;
        listener.set_nonblocking(true)?;
        Ok(Self { files, listener, patience: Duration::from_secs(place.patience_seconds), _lock: lock })
    }

    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// Waits for a managing process, for news, or until a time. `names` returns those of the VMs.
    ///
    /// # Errors
    /// Fails if the kernel refuses to wait.
    pub(super) fn wait(
        &self,
        news: &News,
        until: Option<Instant>,
        names: impl Fn() -> Vec<String>,
    ) -> io::Result<Next> {
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(Next::Late);
            }
            let left = left.map(|left| Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            });
            let mut events =
                [PollFd::new(&self.listener, PollFlags::IN), PollFd::new(&news.0, PollFlags::IN)];
            retry_on_intr(|| poll(&mut events, left.as_ref()))?;
            let [is_asked, is_told] = events.map(|event| !event.revents().is_empty());
            if is_told {
                // Readable, so this does not wait.
                let _ = rustix::io::read(&news.0, &mut [0; size_of::<u64>()]);
                return Ok(Next::News);
            }
            if is_asked && let Some((sender, receiver)) = self.accept(names()) {
                return Ok(Next::Managed(sender, receiver));
            }
        }
    }

    /// Speaks to who has connected. `None` if that is nobody who can manage the worker.
    fn accept(&self, vms: Vec<String>) -> Option<(Sender, Receiver)> {
        let (stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(false).ok()?;
        let socket = OwnedFd::from(stream);
        if socket_peercred(&socket).ok()?.uid.as_raw() != own_user() {
            return None;
        }
        let limit = |limit| set_socket_timeout(&socket, Timeout::Recv, limit);
        limit(Some(HANDSHAKE)).ok()?;
        let (mut sender, mut receiver) = wire::split(socket.try_clone().ok()?).ok()?;
        sender.send(&Greeting { version: VERSION, vms }, None).ok()?;
        let (hello, _) = receiver.receive::<Hello>().ok()?;
        limit(None).ok()?;
        (hello.version == VERSION).then_some((sender, receiver))
    }

    /// Leaves a report on the ends of the VMs.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub(super) fn report(&self, report: &[u8]) -> io::Result<()> {
        self.files.write_report(report)
    }
}

impl Drop for Shelter {
    fn drop(&mut self) {
        self.files.remove();
    }
}
