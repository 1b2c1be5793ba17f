//! The hole over a port of a virtio console, where the kernel permits no `/dev/mem`.
//!
//! What was sent is kept, one word for each page frame, so that only what changes is sent: the agent takes a
//! thousandth of the guest's memory more than with the hole itself. Messages are those of
//! [`samepage_hole::port`].
//!
//! Linux lets one program at a time have a port open.

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

/// Longest wait for a host that says nothing, or takes nothing.
const SILENCE: Duration = Duration::from_secs(10);
/// Time between two looks for what nothing tells of.
const GLANCE: Duration = Duration::from_millis(20);
/// Bytes that are sent at once: the kernel allocates as many, and no more than twice as many.
const CHUNK: usize = 16 << 10;
/// Words that did not change are sent along where so many, or less, lie between two that did: a message of
/// its own is not shorter.
const GAP: usize = 4;

/// A port that is open.
#[derive(Debug)]
pub struct Port {
    path: PathBuf,
    /// `None` where the host has closed it, and it is to be opened again.
    file: Option<File>,
    decoder: Decoder,
    header: Option<HostHeader>,
    /// The words that were sent, by page frame.
    sent: Vec<u32>,
    /// Messages that wait until there are more of them.
    out: Vec<u8>,
}

impl Port {
    /// Finds the port and opens it. Waits for so long until the kernel has found it.
    ///
    /// # Errors
    /// There is none, it cannot be opened, or the host does not listen.
    pub fn open(wait: Duration) -> Result<Self, Error> {
        let start = Instant::now();
        let path = loop {
            if let Some(path) = find(Path::new("/sys/class/virtio-ports"), Path::new("/dev")) {
                break path;
            }
            if start.elapsed() >= wait {
                return Err(Error::NoPort);
            }
            // Nothing tells of it but udev, which not every guest has.
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

    /// Opens the port, whether or not it was open, and waits for what the host says at its beginning.
    ///
    /// # Errors
    /// It cannot be opened, or the host does not listen.
    pub fn connect(&mut self) -> Result<(), Error> {
        // Whoever has it open keeps others from it.
        self.file = None;
        let flags = OFlags::NONBLOCK.bits() as i32;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&self.path);
        let file = file.map_err(|source| self.failed("open", source))?;
        self.begin(file)
    }

    /// Begins anew with a file that is open.
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
                // Where it had closed the port, it opens it again when it hears of us. Until then the kernel
                // does not let anybody wait.
                Err(Error::PortClosed { .. }) if !left.is_zero() => thread::sleep(GLANCE),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What the host says now.
    ///
    /// # Errors
    /// It has closed the port.
    pub fn header(&mut self) -> Result<HostHeader, Error> {
        self.receive()?;
        self.header.ok_or_else(|| self.is_closed())
    }

    /// Waits until the host says something, or for so long.
    ///
    /// # Errors
    /// It has closed the port.
    pub fn wait(&mut self, longest: Duration) -> Result<(), Error> {
        self.poll(PollFlags::IN, longest)?;
        self.receive()
    }

    /// Tells the host that a pass is over.
    ///
    /// # Errors
    /// It takes nothing.
    pub fn end_pass(&mut self, header: &GuestHeader) -> Result<(), Error> {
        self.out.extend(port::pass(header));
        self.flush()
    }

    /// Sends all messages that wait.
    ///
    /// # Errors
    /// The host takes nothing.
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

    /// Waits until the port is ready for something, or for so long. Returns what it is ready for.
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

    /// Takes in what the host has said.
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
        let senseless = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        loop {
            let item = self.decoder.next(&mut bytes);
            match item.map_err(|error| self.failed("read from", senseless(error.to_string())))? {
                None => return Ok(()),
                Some(Item::Host { header, begins }) => {
                    if begins {
                        // It knows nothing of what was sent before.
                        self.sent = vec![0; header.frames as usize];
                    }
                    self.header = Some(header);
                }
                Some(_) => {
                    return Err(self.failed("read from", senseless("it says what a guest says".into())));
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

/// Puts those of the words from page frame `first` on that lie in `run` behind the messages that wait.
fn message(out: &mut Vec<u8>, first: u32, words: &[u32], run: Range<usize>) {
    out.extend(port::flags(first + run.start as u32, run.len() as u32));
    out.extend(words[run].iter().flat_map(|word| word.to_le_bytes()));
}

/// The device file of the port, out of the folders in which the kernel describes ports and shows devices.
///
/// A kernel without sysfs tells no names: there the first port counts.
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
