//! Limits for how long a program of the host is waited for until it says a port, and the guest until it answers.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

/// How long to wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// For the line of a program that has connected. People type it as well.
    pub(super) line: Duration,
    /// For the guest's answer. Linux and Firecracker wait for 2 s. A host with more guests than processors may need
    /// longer to run the one that is asked.
    pub(super) answer: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { line: Duration::from_secs(60), answer: Duration::from_secs(10) }
    }
}

/// The sockets that wait, each with its time.
pub(super) struct Waits {
    timer: TimerFd,
    /// When the timer expires.
    armed: Option<Instant>,
    ends: HashMap<u64, Instant>,
}

impl Waits {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { timer: TimerFd::new().map_err(io::Error::from)?, armed: None, ends: HashMap::new() })
    }

    /// Returns the number of sockets that wait.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Lets a socket wait, from now on.
    ///
    /// # Errors
    /// Fails if the timer cannot be set.
    pub(super) fn begin(&mut self, socket: u64, limit: Duration) -> io::Result<()> {
        let end = Instant::now() + limit;
        if self.armed.is_none_or(|armed| end < armed) {
            self.arm(end)?;
        }
        self.ends.insert(socket, end);
        Ok(())
    }

    /// Notes that a socket waits no longer. The timer may expire for it, which is once for all that have gone.
    pub(super) fn end(&mut self, socket: u64) {
        self.ends.remove(&socket);
    }

    /// Takes out the sockets that have waited for too long.
    ///
    /// # Errors
    /// Fails if the timer cannot be set for the others.
    pub(super) fn expired(&mut self) -> io::Result<Vec<u64>> {
        let Some(armed) = self.armed else { return Ok(Vec::new()) };
        let now = Instant::now();
        if now < armed {
            return Ok(Vec::new());
        }
        let over: Vec<_> =
            self.ends.iter().filter(|(_, end)| **end <= now).map(|(socket, _)| *socket).collect();
        over.iter().for_each(|socket| self.end(*socket));
        self.armed = None;
        if let Some(next) = self.ends.values().min().copied() {
            self.arm(next)?;
        }
        Ok(over)
    }

    fn arm(&mut self, end: Instant) -> io::Result<()> {
        let wait = end.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        self.timer.reset(wait, None).map_err(io::Error::from)?;
        self.armed = Some(end);
        Ok(())
    }
}

impl AsRawFd for Waits {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
