//! The command language of the agent.
//!
//! A list is `COMMAND,COMMAND,...`; a command is `NAME` or `NAME:ARGUMENT:ARGUMENT...`. Commands run in
//! order, and the first failure ends the list. There is no quoting: an argument contains no `,`, and only the
//! text of `print` may contain `:`. [`HELP`] lists the commands.
//!
//! A *SIZE* is a number of bytes, or of KiB, MiB or GiB with a `K`, `M` or `G` after it. A *SEED*
//! is a number that chooses [content](crate::content). *MS* are milliseconds.

use crate::content::PAGE_SIZE;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// All commands with their arguments, for `--help`.
pub const HELP: &str = "  mount:DEV:DIR[:ro]    mount the ext2 file system on DEV at DIR
  umount:DIR            unmount it
  sum:FILE              read FILE to its end; report bytes and checksum
  read:FILE:SIZE        the same for its first SIZE bytes, past the page cache
  write:FILE:SIZE:SEED  write SIZE bytes of content; report bytes and checksum
  sync                  write everything back to the devices
  get:HOST:PORT         read all that HOST sends; report bytes and checksum
  put:HOST:PORT:SIZE:SEED  send SIZE bytes of content; report bytes and checksum
  echo:PORT             send back what the host sends to PORT of the socket device
  fill:SIZE:SEED        allocate SIZE of memory and fill it with content
  change:EVERY:SEED     give every EVERYth filled page content of another seed
  verify[:ROUNDS:MS]    check all filled memory, ROUNDS times, MS apart
  release               give all filled memory back to the kernel
  publish[:MS]          tell the host what pages are for, from now on, every MS
  check                 see whether what the host was told is so
  meminfo               report total, free, cached and anonymous memory
  sleep:MS              wait
  print:TEXT            print TEXT
  idle                  do nothing for ever
  poweroff, reboot      unmount everything and reset the machine (as init only)

  SIZE  bytes, or 64K, 16M, 1G          SEED  a number; 0 stands for zero bytes
  MS    milliseconds           HOST  an IPv4 address; vsock: the host;
                               listen: whoever connects to PORT";

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Mount an ext2 file system.
    Mount {
        /// The block device.
        device: PathBuf,
        /// The mount point, created if it is missing.
        dir: PathBuf,
        /// Whether the mount is read-only.
        read_only: bool,
    },
    /// Unmount a file system.
    Umount {
        /// The mount point.
        dir: PathBuf,
    },
    /// Read a whole file.
    Sum {
        /// The file.
        path: PathBuf,
    },
    /// Read the first bytes of a file or device, past the page cache.
    Read {
        /// The file.
        path: PathBuf,
        /// Limit for the number of bytes.
        bytes: u64,
    },
    /// Write content to a file or device.
    Write {
        /// The file.
        path: PathBuf,
        /// Number of bytes.
        bytes: u64,
        /// The seed of the content.
        seed: u64,
    },
    /// Write back all file systems.
    Sync,
    /// Read all that a program of the host sends.
    Get {
        /// An IPv4 address, `vsock`, or `listen`.
        host: String,
        /// The port.
        port: u32,
    },
    /// Send content to a program of the host.
    Put {
        /// An IPv4 address, `vsock`, or `listen`.
        host: String,
        /// The port.
        port: u32,
        /// Number of bytes.
        bytes: u64,
        /// The seed of the content.
        seed: u64,
    },
    /// Send back what a program of the host sends.
    Echo {
        /// The port of the socket device.
        port: u32,
    },
    /// Fill new memory with content.
    Fill {
        /// Number of pages.
        pages: usize,
        /// The seed of the content.
        seed: u64,
    },
    /// Overwrite some of the filled pages.
    Change {
        /// The distance of the pages, in pages.
        every: usize,
        /// The seed of the content.
        seed: u64,
    },
    /// Check all filled memory.
    Verify {
        /// Number of rounds.
        rounds: u32,
        /// The time between two rounds.
        pause: Duration,
    },
    /// Free all filled memory.
    Release,
    /// Publish page types from now on.
    Publish {
        /// The time between two passes, if it is given.
        interval: Option<Duration>,
    },
    /// Compare published flags with the kernel's.
    Check,
    /// Report the guest's memory statistics.
    Meminfo,
    /// Wait.
    Sleep(Duration),
    /// Print a text.
    Print(String),
    /// Do nothing for ever.
    Idle,
    /// Reset the machine. This ends a virtual machine.
    PowerOff,
}

/// An invalid command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The name is unknown.
    #[error("there is no command {0:?}")]
    Unknown(String),
    /// The number of arguments is wrong.
    #[error("{command:?} does not match {usage}")]
    Arguments {
        /// The command as typed.
        command: String,
        /// The correct usage.
        usage: &'static str,
    },
    /// An argument is not a number, or too large.
    #[error("{value:?} in {command:?} is not a {kind}")]
    Number {
        /// The command as typed.
        command: String,
        /// The argument.
        value: String,
        /// The expected kind of number.
        kind: &'static str,
    },
}

impl ParseError {
    /// Returns the name of the invalid command.
    pub fn name(&self) -> &str {
        let (Self::Unknown(command) | Self::Arguments { command, .. } | Self::Number { command, .. }) = self;
        command.split(':').next().unwrap_or_default()
    }
}

impl Command {
    /// Returns the command's name, as in lists and reports.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Mount { .. } => "mount",
            Self::Umount { .. } => "umount",
            Self::Sum { .. } => "sum",
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Sync => "sync",
            Self::Get { .. } => "get",
            Self::Put { .. } => "put",
            Self::Echo { .. } => "echo",
            Self::Fill { .. } => "fill",
            Self::Change { .. } => "change",
            Self::Verify { .. } => "verify",
            Self::Release => "release",
            Self::Publish { .. } => "publish",
            Self::Check => "check",
            Self::Meminfo => "meminfo",
            Self::Sleep(_) => "sleep",
            Self::Print(_) => "print",
            Self::Idle => "idle",
            Self::PowerOff => "poweroff",
        }
    }
}

/// Parses a list of commands. Empty fields between commas are ignored.
///
/// # Errors
/// Fails with the first invalid command. None of the commands should run then.
pub fn parse_list(list: &str) -> Result<Vec<Command>, ParseError> {
    list.split(',').filter(|command| !command.is_empty()).map(Command::from_str).collect()
}

impl FromStr for Command {
    type Err = ParseError;

    fn from_str(command: &str) -> Result<Self, ParseError> {
        let (name, rest) = match command.split_once(':') {
            Some((name, rest)) => (name, Some(rest)),
            None => (command, None),
        };
        let arguments: Vec<&str> = rest.map(|rest| rest.split(':').collect()).unwrap_or_default();
        let usage = |usage| Err(ParseError::Arguments { command: command.to_owned(), usage });
        let invalid = |value: &str, kind| ParseError::Number {
            command: command.to_owned(),
            value: value.to_owned(),
            kind,
        };
        let size = |value: &str| parse_size(value).ok_or_else(|| invalid(value, "size"));
        let seed = |value: &str| value.parse().map_err(|_| invalid(value, "seed"));
        let port = |value: &str| value.parse().map_err(|_| invalid(value, "port"));
        let time = |value: &str| {
            value.parse().map(Duration::from_millis).map_err(|_| invalid(value, "time in milliseconds"))
        };
        Ok(match (name, arguments.as_slice()) {
            ("mount", [device, dir]) => {
                Self::Mount { device: device.into(), dir: dir.into(), read_only: false }
            }
            ("mount", [device, dir, "ro"]) => {
                Self::Mount { device: device.into(), dir: dir.into(), read_only: true }
            }
            ("mount", _) => return usage("mount:DEV:DIR[:ro]"),
            ("umount", [dir]) => Self::Umount { dir: dir.into() },
            ("umount", _) => return usage("umount:DIR"),
            ("sum", [path]) => Self::Sum { path: path.into() },
            ("sum", _) => return usage("sum:FILE"),
            ("read", [path, bytes]) => Self::Read { path: path.into(), bytes: size(bytes)? },
            ("read", _) => return usage("read:FILE:SIZE"),
            ("write", [path, bytes, from]) => {
                Self::Write { path: path.into(), bytes: size(bytes)?, seed: seed(from)? }
            }
            ("write", _) => return usage("write:FILE:SIZE:SEED"),
            ("sync", []) => Self::Sync,
            ("sync", _) => return usage("sync"),
            ("get", [host, at]) => Self::Get { host: (*host).to_owned(), port: port(at)? },
            ("get", _) => return usage("get:HOST:PORT"),
            ("put", [host, at, bytes, from]) => Self::Put {
                host: (*host).to_owned(),
                port: port(at)?,
                bytes: size(bytes)?,
                seed: seed(from)?,
            },
            ("put", _) => return usage("put:HOST:PORT:SIZE:SEED"),
            ("echo", [at]) => Self::Echo { port: port(at)? },
            ("echo", _) => return usage("echo:PORT"),
            ("fill", [bytes, from]) => Self::Fill {
                pages: usize::try_from(size(bytes)?.div_ceil(PAGE_SIZE as u64))
                    .map_err(|_| invalid(bytes, "size"))?,
                seed: seed(from)?,
            },
            ("fill", _) => return usage("fill:SIZE:SEED"),
            ("change", [every, from]) => Self::Change {
                every: every.parse().map_err(|_| invalid(every, "number of pages"))?,
                seed: seed(from)?,
            },
            ("change", _) => return usage("change:EVERY:SEED"),
            ("verify", []) => Self::Verify { rounds: 1, pause: Duration::ZERO },
            ("verify", [rounds, pause]) => Self::Verify {
                rounds: rounds.parse().map_err(|_| invalid(rounds, "number of rounds"))?,
                pause: time(pause)?,
            },
            ("verify", _) => return usage("verify[:ROUNDS:MS]"),
            ("release", []) => Self::Release,
            ("release", _) => return usage("release"),
            ("publish", []) => Self::Publish { interval: None },
            ("publish", [interval]) => Self::Publish { interval: Some(time(interval)?) },
            ("publish", _) => return usage("publish[:MS]"),
            ("check", []) => Self::Check,
            ("check", _) => return usage("check"),
            ("meminfo", []) => Self::Meminfo,
            ("meminfo", _) => return usage("meminfo"),
            ("sleep", [ms]) => Self::Sleep(time(ms)?),
            ("sleep", _) => return usage("sleep:MS"),
            ("print", _) => Self::Print(rest.unwrap_or_default().to_owned()),
            ("idle", []) => Self::Idle,
            ("idle", _) => return usage("idle"),
            ("poweroff" | "reboot", []) => Self::PowerOff,
            ("poweroff" | "reboot", _) => return usage("poweroff"),
            _ => return Err(ParseError::Unknown(name.to_owned())),
        })
    }
}

/// Parses a number of bytes such as `512`, `64K`, `16M` or `1G`. Returns `None` if it is invalid or exceeds
/// 64 bits.
fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(digits) if text.ends_with('K') => (digits, 10),
        Some(digits) if text.ends_with('M') => (digits, 20),
        Some(digits) => (digits, 30),
        None => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_list_is_read_in_order() {
        let list = "mount:/dev/vda:/mnt:ro,sum:/mnt/file,,fill:16M:3,verify:5:100,print:a:b c,poweroff";
        assert_eq!(
            parse_list(list),
            Ok(vec![
                Command::Mount { device: "/dev/vda".into(), dir: "/mnt".into(), read_only: true },
                Command::Sum { path: "/mnt/file".into() },
                Command::Fill { pages: 4096, seed: 3 },
                Command::Verify { rounds: 5, pause: Duration::from_millis(100) },
                Command::Print("a:b c".into()),
                Command::PowerOff,
            ])
        );
        assert_eq!(parse_list(""), Ok(vec![]));
    }

    #[test]
    fn every_command_in_the_help_exists() {
        for line in HELP.lines().take_while(|line| !line.is_empty()) {
            for usage in line.trim_start().split("  ").next().unwrap_or_default().split(", ") {
                let name = usage.split([':', '[']).next().unwrap_or_default();
                assert!(!matches!(Command::from_str(name), Err(ParseError::Unknown(_))), "{name}");
            }
        }
    }

    #[test]
    fn faults_are_named() {
        let fault = |text: &str| Command::from_str(text).expect_err("no command").to_string();
        assert_eq!(fault("fnord:1"), r#"there is no command "fnord""#);
        assert_eq!(fault("sleep"), r#""sleep" does not match sleep:MS"#);
        assert_eq!(fault("fill:1X:2"), r#""1X" in "fill:1X:2" is not a size"#);
        assert_eq!(fault("verify:x:2"), r#""x" in "verify:x:2" is not a number of rounds"#);
        assert_eq!(fault("mount:a:b:rw"), r#""mount:a:b:rw" does not match mount:DEV:DIR[:ro]"#);
        assert_eq!(Command::from_str("fill:1X:2").expect_err("no command").name(), "fill");
    }

    #[test]
    fn sizes_have_units_and_limits() {
        assert_eq!(parse_size("0"), Some(0));
        assert_eq!(parse_size("3K"), Some(3072));
        assert_eq!(parse_size("2M"), Some(2 << 20));
        assert_eq!(parse_size("1G"), Some(1 << 30));
        for none in ["", "K", "-1", "1k", "1MM", "18446744073709551616", "18014398509481984K"] {
            assert_eq!(parse_size(none), None, "{none}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[a-z:,0-9KMG/]{0,40}") {
            if let Err(error) = parse_list(&text) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}
