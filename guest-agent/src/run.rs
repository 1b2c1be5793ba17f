//! Runs commands and reports each in one line.

use crate::command::Command;
use crate::files::{self, Source};
use crate::hole;
use crate::hole::check::Checked;
use crate::hole::serve::{Options, Publisher};
use crate::memory::{Memory, Mismatch};
use crate::sockets;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Prints one line to standard output. Continues if the console cannot be written.
pub fn say(line: impl std::fmt::Display) {
    let _ = writeln!(io::stdout(), "samepage-agent: {line}");
}

/// The reason why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused an operation on a path.
    #[error("{path}: {source}", path = path.display())]
    Path {
        /// The file, device or directory.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// Filled memory has changed.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// Publishing failed.
    #[error(transparent)]
    Hole(#[from] hole::Error),
    /// Published flags differ from the kernel's.
    #[error("published flags differ from the kernel's: {0}")]
    Told(Checked),
    /// The command is only for init.
    #[error("only the init of a guest may do this, not a process of a running system")]
    NotInit,
}

/// The next step after a command.
enum Next {
    /// Report these figures, and run the next command.
    Continue(String),
    /// End the list.
    Stop,
}

/// The state that a command leaves for the next ones.
pub struct Runner {
    is_init: bool,
    memory: Memory,
    mounts: Vec<PathBuf>,
}

impl Runner {
    /// Returns a runner without mounts and filled memory. `is_init` tells whether it may reset the machine.
    pub fn new(is_init: bool) -> Self {
        Self { is_init, memory: Memory::default(), mounts: Vec::new() }
    }

    /// Runs `commands` until one fails or ends the list. Returns whether none failed.
    pub fn run(&mut self, commands: &[Command]) -> bool {
        let (mut ran, mut failed) = (0, 0);
        for command in commands {
            ran += 1;
            match self.execute(command) {
                Ok(Next::Continue(figures)) if figures.is_empty() => {
                    say(format_args!("{} ok", command.name()))
                }
                Ok(Next::Continue(figures)) => say(format_args!("{} ok {figures}", command.name())),
                Ok(Next::Stop) => break,
                Err(error) => {
                    say(format_args!("{} failed: {error}", command.name()));
                    failed += 1;
                    break;
                }
            }
        }
        say(format_args!("done ran={ran} failed={failed}"));
        failed == 0
    }

    /// Unmounts everything that commands have mounted, the last mount first.
    pub fn unmount_all(&mut self) {
        while let Some(dir) = self.mounts.pop() {
            if let Err(error) = unmount(&dir, UnmountFlags::empty()) {
                say(format_args!("umount failed: {}: {}", dir.display(), io::Error::from(error)));
            }
        }
    }

    fn execute(&mut self, command: &Command) -> Result<Next, Error> {
        let start = Instant::now();
        let mut figures = match command {
            Command::Mount { device, dir, read_only } => {
                std::fs::create_dir_all(dir).map_err(at(dir))?;
                let flags = if *read_only { MountFlags::RDONLY } else { MountFlags::empty() };
                mount(device, dir, "ext2", flags, None).map_err(at(device))?;
                self.mounts.push(dir.clone());
                format!("dir={}", dir.display())
            }
            Command::Umount { dir } => {
                unmount(dir, UnmountFlags::empty()).map_err(at(dir))?;
                self.mounts.retain(|mounted| mounted != dir);
                format!("dir={}", dir.display())
            }
            Command::Sum { path } => summed(path, files::sum(path, u64::MAX, Source::Cached))?,
            Command::Read { path, bytes } => summed(path, files::sum(path, *bytes, Source::Device))?,
            Command::Write { path, bytes, seed } => summed(path, files::write(path, *bytes, *seed))?,
            Command::Get { host, port } => {
                streamed(host, *port, sockets::get(host, *port, || say_listening("get", *port)))?
            }
            Command::Put { host, port, bytes, seed } => {
                let listening = || say_listening("put", *port);
                streamed(host, *port, sockets::put(host, *port, *bytes, *seed, listening))?
            }
            Command::Echo { port } => {
                let listening = || say_listening("echo", *port);
                let bytes = sockets::echo(*port, listening).map_err(at(Path::new("vsock")))?;
                format!("port={port} bytes={bytes}")
            }
            Command::Sync => {
                rustix::fs::sync();
                String::new()
            }
            Command::Fill { pages, seed } => {
                self.memory.fill(*pages, *seed);
                format!("pages={pages} seed={seed}")
            }
            Command::Change { every, seed } => {
                format!("pages={} seed={seed}", self.memory.change(*every, *seed))
            }
            Command::Verify { rounds, pause } => {
                let mut pages = 0;
                for round in 0..*rounds {
                    if round > 0 {
                        thread::sleep(*pause);
                    }
                    pages = self.memory.verify()?;
                }
                format!("pages={pages} rounds={rounds}")
            }
            Command::Release => format!("pages={}", self.memory.release()),
            Command::Publish { interval } => publish(*interval)?,
            Command::Check => {
                let checked = Publisher::open(Options::default())?.check()?;
                if !checked.passed() {
                    return Err(Error::Told(checked));
                }
                checked.to_string()
            }
            Command::Meminfo => return meminfo().map(Next::Continue),
            Command::Sleep(time) => {
                thread::sleep(*time);
                String::new()
            }
            Command::Print(text) => return Ok(Next::Continue(text.clone())),
            Command::Idle => {
                say("idle");
                loop {
                    thread::park();
                }
            }
            Command::PowerOff if self.is_init => return Ok(Next::Stop),
            Command::PowerOff => return Err(Error::NotInit),
        };
        if !figures.is_empty() {
            figures.push(' ');
        }
        figures.push_str(&format!("ms={}", start.elapsed().as_millis()));
        Ok(Next::Continue(figures))
    }
}

/// Says that a program can connect now.
fn say_listening(command: &str, port: u32) {
    say(format_args!("{command} listens port={port}"));
}

fn at<E: Into<io::Error>>(path: &Path) -> impl FnOnce(E) -> Error {
    move |source| Error::Path { path: path.to_owned(), source: source.into() }
}

fn summed(path: &Path, result: io::Result<files::Summed>) -> Result<String, Error> {
    let summed = result.map_err(at(path))?;
    Ok(format!("path={} bytes={} fnv1a={}", path.display(), summed.bytes, summed.checksum))
}

fn streamed(host: &str, port: u32, result: io::Result<files::Summed>) -> Result<String, Error> {
    let place = format!("{host}:{port}");
    let summed = result.map_err(at(Path::new(&place)))?;
    Ok(format!("host={place} bytes={} fnv1a={}", summed.bytes, summed.checksum))
}

/// Publishes once, and then continues on its own thread.
fn publish(interval: Option<Duration>) -> Result<String, Error> {
    /// Stack size of the thread in bytes: small, because the agent should be small.
    const STACK: usize = 64 << 10;
    let mut publisher = Publisher::open(Options { interval, verbose: false })?;
    let first = publisher.pass()?;
    let serve = move || {
        let Err(error) = publisher.serve();
        say(format_args!("publish failed: {error}"));
    };
    let thread = thread::Builder::new().name("publish".into()).stack_size(STACK).spawn(serve);
    thread.map_err(at(Path::new("thread")))?;
    Ok(first.to_string())
}

/// Returns figures of `/proc/meminfo`, in KiB.
fn meminfo() -> Result<String, Error> {
    let path = Path::new("/proc/meminfo");
    let text = std::fs::read_to_string(path).map_err(at(path))?;
    let figure = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':')?.split_whitespace().next())
            .unwrap_or("0")
    };
    Ok(format!(
        "total_kib={} free_kib={} cached_kib={} anon_kib={}",
        figure("MemTotal"),
        figure("MemFree"),
        figure("Cached"),
        figure("AnonPages")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::parse_list;

    fn run(list: &str) -> bool {
        Runner::new(false).run(&parse_list(list).expect("commands"))
    }

    #[test]
    fn memory_keeps_its_content_from_command_to_command() {
        assert!(run("fill:100K:1,fill:40K:0,verify,change:3:2,verify:2:1,meminfo,print:x,sleep:1"));
    }

    #[test]
    fn a_failure_ends_the_list() {
        assert!(!run("sum:/nonexistent,idle"));
    }

    #[test]
    fn a_running_system_is_not_reset() {
        assert!(matches!(Runner::new(false).execute(&Command::PowerOff), Err(Error::NotInit)));
        assert!(matches!(Runner::new(true).execute(&Command::PowerOff), Ok(Next::Stop)));
    }

    #[test]
    fn errors_name_the_path() {
        let Err(error) = Runner::new(false).execute(&Command::Sum { path: "/nonexistent".into() }) else {
            panic!("there is no such file");
        };
        assert_eq!(error.to_string(), "/nonexistent: No such file or directory (os error 2)");
    }
}
