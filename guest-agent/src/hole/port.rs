//! The hole over a port of a virtio console, for kernels that forbid `/dev/mem`.
//!
//! The agent keeps the sent words, one for each page frame, so that it sends only changes. This needs a
//! thousandth of the guest's memory in addition. [`samepage_hole::port`] defines the messages.
//!
//! In Linux, only one program at a time can open a port.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::time::Timespec;
use samepage_hole::port::{self, Decoder, Item, NAME};
use samepage_hole::{GuestHeader, HostHeader};

use super::Error;
use super::publish::Target;

/// Longest wait for a host that sends or accepts nothing.
const SILENCE: Duration = Duration::from_secs(10);
/// Interval of polling for changes without an event.
const GLANCE: Duration = Duration::from_millis(20);
/// Number of bytes to send at a time. The kernel allocates that many, and at most twice that.
const CHUNK: usize = 16 << 10;
/// Up to this number of unchanged words between two changed ones is sent too, because a separate message
/// would not be shorter.
const GAP: usize = 4;

/// An open port.
#[derive(Debug)]
pub struct Port {
    path: PathBuf,
    /// `None` if the host has closed the port, and it must be reopened.
    file: Option<File>,
    decoder: Decoder,
    header: Option<HostHeader>,
    /// The sent words, by page frame.
    sent: Vec<u32>,
    /// Messages that wait for more of them.
    out: Vec<u8>,
}

impl Port {
    /// Finds and opens the port. Waits for at most this time until the kernel has found it.
    ///
    /// # Errors
    /// Fails if there is no port, if it cannot be opened, or if the host does not listen.
    pub fn open(wait: Duration) -> Result<Self, Error> {
        let start = Instant::now();
        let path = loop {
            if let Some(path) = find(Path::new("/sys/class/virtio-ports"), Path::new("/dev")) {
                break path;
            }
            if start.elapsed() >= wait {
                return Err(Error::NoPort);
            }
            // Only udev reports the port, and not every guest has udev.
            thread::sleep(GLANCE);
        };
        let mut port = Self::closed(path);
        port.connect()?;
        Ok(port)
    }

    pub(super) fn closed(path: PathBuf) -> Self {
        Self {
            path,
            file: None,
            decoder: Decoder::new(),
            header: None,
            sent: Vec::new(),
            out: Vec::with_capacity(CHUNK),
        }
    }

    /// Opens the port, whether it was open or not, and waits for the host's first message.
    ///
    /// # Errors
    /// Fails if the port cannot be opened, or if the host does not listen.
    pub fn connect(&mut self) -> Result<(), Error> {
        // Close it first, because an open port excludes others.
        self.file = None;
        let flags = OFlags::NONBLOCK.bits() as i32;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&self.path);
        let file = file.map_err(|source| self.failed("open", source))?;
        self.begin(file)
    }

    /// Starts again with an open file.
    pub(super) fn begin(&mut self, file: File) -> Result<(), Error> {
        self.file = Some(file);
        self.decoder = Decoder::new();
        self.header = None;
        self.out.clear();
        let start = Instant::now();
        while self.header.is_none() {
            let left = SILENCE.saturating_sub(start.elapsed());
            match self.wait(left) {
                Ok(()) if left.is_zero() => return Err(Error::Silent { path: self.path.clone() }),
                Ok(()) => {}
                // A host that has closed the port reopens it after the guest's message. Until then, waiting
                // for the port returns immediately.
                Err(Error::PortClosed { .. }) if !left.is_zero() => thread::sleep(GLANCE),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Returns the host's present header.
    ///
    /// # Errors
    /// Fails if the host has closed the port.
    pub fn header(&mut self) -> Result<HostHeader, Error> {
        self.receive()?;
        self.header.ok_or_else(|| self.is_closed())
    }

    /// Waits for a message of the host, at most for this time.
    ///
    /// # Errors
    /// Fails if the host has closed the port.
    pub fn wait(&mut self, longest: Duration) -> Result<(), Error> {
        self.poll(PollFlags::IN, longest)?;
        self.receive()
    }

    /// Notifies the host of the end of a pass.
    ///
    /// # Errors
    /// Fails if the host accepts nothing.
    pub fn end_pass(&mut self, header: &GuestHeader) -> Result<(), Error> {
        self.out.extend(port::pass(header));
        self.flush()
    }

    /// Sends all waiting messages.
    ///
    /// # Errors
    /// Fails if the host accepts nothing.
    pub fn flush(&mut self) -> Result<(), Error> {
        let mut done = 0;
        while done < self.out.len() {
            let end = self.out.len().min(done + CHUNK);
            let Some(file) = &mut self.file else { return Err(self.is_closed()) };
            match file.write(&self.out[done..end]) {
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let ready = self.poll(PollFlags::OUT, SILENCE)?;
                    if ready.contains(PollFlags::HUP) {
                        return Err(self.is_closed());
                    }
                    if ready.is_empty() {
                        return Err(Error::Silent { path: self.path.clone() });
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.failed("write to", source)),
            }
        }
        self.out.clear();
        Ok(())
    }

    /// Waits until the port is ready for one of these operations, at most for this time. Returns the ready
    /// operations.
    fn poll(&self, wanted: PollFlags, longest: Duration) -> Result<PollFlags, Error> {
        let Some(file) = &self.file else { return Err(self.is_closed()) };
        let timeout = Timespec { tv_sec: longest.as_secs() as i64, tv_nsec: longest.subsec_nanos().into() };
        let mut polled = [PollFd::new(file, wanted)];
        match poll(&mut polled, Some(&timeout)) {
            // Whoever waits looks at the time.
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(polled[0].revents()),
            Err(error) => Err(self.failed("poll", error.into())),
        }
    }

    /// Processes the host's messages.
    fn receive(&mut self) -> Result<(), Error> {
        let mut buffer = [0; 512];
        loop {
            let Some(file) = &mut self.file else { return Err(self.is_closed()) };
            match file.read(&mut buffer) {
                Ok(0) => return Err(self.is_closed()),
                Ok(bytes) => self.hear(&buffer[..bytes])?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.failed("read from", source)),
            }
        }
    }

    fn hear(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        loop {
            let item = self.decoder.next(&mut bytes);
            match item.map_err(|error| self.failed("read from", invalid(error.to_string())))? {
                None => return Ok(()),
                Some(Item::Host { header, begins }) => {
                    if begins {
                        // The host knows nothing of earlier words.
                        self.sent = vec![0; header.frames as usize];
                    }
                    self.header = Some(header);
                }
                Some(_) => {
                    return Err(self.failed("read from", invalid("it sends a guest's message".into())));
                }
            }
        }
    }

    fn is_closed(&self) -> Error {
        Error::PortClosed { path: self.path.clone() }
    }

    fn failed(&self, what: &'static str, source: io::Error) -> Error {
        Error::Port { what, path: self.path.clone(), source }
    }
}

impl Target for Port {
    fn frames(&self) -> u32 {
        self.sent.len() as u32
    }

    fn published(&self, frame: u32) -> u32 {
        self.sent[frame as usize]
    }

    fn publish(&mut self, first: u32, words: &[u32]) -> Result<u32, Error> {
        let mut changed = 0;
        let mut run: Option<Range<usize>> = None;
        for (place, (sent, &word)) in self.sent[first as usize..].iter_mut().zip(words).enumerate() {
            if std::mem::replace(sent, word) == word {
                continue;
            }
            changed += 1;
            match &mut run {
                Some(run) if place - run.end <= GAP => run.end = place + 1,
                _ => {
                    if let Some(run) = run.replace(place..place + 1) {
                        message(&mut self.out, first, words, run);
                    }
                }
            }
        }
        if let Some(run) = run {
            message(&mut self.out, first, words, run);
        }
        if self.out.len() >= CHUNK {
            self.flush()?;
        }
        Ok(changed)
    }
}

/// Appends the words in `run`, of the page frames from `first` on, to the waiting messages.
fn message(out: &mut Vec<u8>, first: u32, words: &[u32], run: Range<usize>) {
    out.extend(port::flags(first + run.start as u32, run.len() as u32));
    out.extend(words[run].iter().flat_map(|word| word.to_le_bytes()));
}

/// Returns the device file of the port. The arguments are the folders in which the kernel describes ports and
/// shows devices.
///
/// A kernel without sysfs provides no names; then the first port counts.
pub(super) fn find(described: &Path, devices: &Path) -> Option<PathBuf> {
    let Ok(entries) = fs::read_dir(described) else {
        let names = fs::read_dir(devices).ok()?.flatten().map(|entry| entry.file_name());
        let ports = names.filter(|name| name.as_encoded_bytes().starts_with(b"vport"));
        return ports.min().map(|name| devices.join(name));
    };
    let is_named = |name: String| name.trim_end() == NAME;
    let found =
        entries.flatten().find(|entry| fs::read_to_string(entry.path().join("name")).is_ok_and(is_named));
    found.map(|entry| devices.join(entry.file_name()))
}
