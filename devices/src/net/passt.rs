//! Networks without privileges: a process of passt speaks for the guest, with the rights of the user alone.
//!
//! passt (<https://passt.top>) takes the guest's frames from a socket, and opens the guest's connections as its own.
//! The socket has no name, so nobody else can connect to it. The process ends when the device does: it is killed
//! then, and it ends by itself when the other end of its socket is closed, however this process ends.
//!
//! The guest's network is always the same: address [`GUEST`], gateway [`GATEWAY`]. DHCP tells the guest so.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use samepage_spec::Publish;

use super::stream::StreamLink;

const PROGRAM: &str = "passt";
/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The gateway's address.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Bits of the addresses that the network has in common.
const PREFIX_BITS: u8 = 24;
/// The longest packet that passt takes, in bytes.
pub const PASST_MTU: u16 = 65_520;
/// How long passt may take to start.
const START_LIMIT: Duration = Duration::from_secs(30);
/// What passt says about itself at each start.
const CHATTER: [&str; 2] = ["Failed to send ", "Don't run as root"];
/// Most bytes of what passt says that are kept.
const MAX_TOLD: usize = 4096;

/// What a guest's network is like.
#[derive(Clone, Debug)]
pub struct PasstOptions {
    /// The address of the guest's interface.
    pub mac: [u8; 6],
    /// The longest packet, in bytes. DHCP tells the guest.
    pub mtu: u16,
    /// Ports of the host that lead to the guest.
    pub publish: Vec<Publish>,
    /// Whether the gateway's address stands for the host's own 127.0.0.1.
    pub host_loopback: bool,
}

/// Why a network without privileges cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// The program is not installed.
    #[error(
        "start {PROGRAM}: the program is not installed; install it (Debian: `apt install passt`), or use a tap"
    )]
    Missing,
    /// The program cannot be started.
    #[error("start {PROGRAM}: {0}")]
    Start(#[source] io::Error),
    /// The program has ended at once.
    #[error("start {PROGRAM}: it ends at once: {0}")]
    Ended(String),
    /// The program does nothing.
    #[error("start {PROGRAM}: it answers nothing within {limit} seconds", limit = START_LIMIT.as_secs())]
    Silent,
}

/// A process of passt. Dropping it ends the process.
#[derive(Debug)]
pub(super) struct Passt {
    child: Child,
    told: UnixStream,
}

/// Starts passt for one device. Returns when it is ready.
///
/// # Errors
/// Fails if passt is not installed, or if it cannot do what is asked, for instance because a port is in use.
pub fn start(options: &PasstOptions) -> Result<StreamLink, PasstError> {
    start_program(PROGRAM, options)
}

fn start_program(program: &str, options: &PasstOptions) -> Result<StreamLink, PasstError> {
    let (mut ours, other) = UnixStream::pair().map_err(PasstError::Start)?;
    let (told, error) = UnixStream::pair().map_err(PasstError::Start)?;
    for socket in [&told, &error] {
        // passt never waits for somebody to read what it says.
        socket.set_nonblocking(true).map_err(PasstError::Start)?;
    }
    let child = Command::new(program)
        .args(arguments(options))
        .stdin(OwnedFd::from(other))
        .stdout(Stdio::null())
        .stderr(OwnedFd::from(error))
        // A key on the terminal ends the VM first.
        .process_group(0)
        .spawn()
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => PasstError::Missing,
            _ => PasstError::Start(error),
        })?;
    let mut passt = Passt { child, told };
    match greet(&mut ours, options.mac) {
        Ok(()) => StreamLink::of_process(ours, passt).map_err(PasstError::Start),
        Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {
            Err(PasstError::Silent)
        }
        Err(_closed) => Err(PasstError::Ended(passt.last_words())),
    }
}

fn arguments(options: &PasstOptions) -> Vec<String> {
    let PasstOptions { mtu, publish, host_loopback, .. } = options;
    let mut arguments: Vec<String> =
        ["--foreground", "--quiet", "--stderr", "--fd", "0"].map(str::to_owned).into();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    add("--address", GUEST.to_string());
    add("--netmask", PREFIX_BITS.to_string());
    add("--gateway", GATEWAY.to_string());
    add("--mtu", mtu.to_string());
    // A host's port that is no number was refused before.
    for Publish { address, host, guest, udp } in publish {
        add(if *udp { "--udp-ports" } else { "--tcp-ports" }, format!("{address}/{host}:{guest}"));
    }
    if !host_loopback {
        arguments.push("--no-map-gw".to_owned());
    }
    arguments
}

/// Asks for the gateway's address by ARP, and waits for the answer. passt reads frames once it is ready.
fn greet(socket: &mut UnixStream, mac: [u8; 6]) -> io::Result<()> {
    socket.set_read_timeout(Some(START_LIMIT))?;
    let length = 60_u32;
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend([[0xff; 6], mac].concat());
    // ARP for Ethernet and IPv4, a request.
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1]);
    frame.extend([&mac[..], &GUEST.octets(), &[0; 6], &GATEWAY.octets()].concat());
    frame.resize(4 + length as usize, 0);
    socket.write_all(&frame)?;
    let mut length = [0; 4];
    socket.read_exact(&mut length)?;
    let mut answer = vec![0; u32::from_be_bytes(length).min(2048) as usize];
    socket.read_exact(&mut answer)?;
    socket.set_read_timeout(None)
}

impl Passt {
    /// Ends the process, and returns how it has ended and what it said last.
    pub(super) fn last_words(&mut self) -> String {
        // Its socket is closed, so it has ended already, or does nothing of use.
        let _ = self.child.kill();
        let status = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        let mut told = vec![0; MAX_TOLD];
        let length = self.told.read(&mut told).unwrap_or(0);
        let told = String::from_utf8_lossy(&told[..length]);
        let lines = told.lines().map(str::trim);
        let lines =
            lines.filter(|line| !line.is_empty() && !CHATTER.iter().any(|text| line.starts_with(text)));
        let lines: Vec<_> = lines.collect();
        if lines.is_empty() { status } else { format!("{} ({status})", lines.join("; ")) }
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It keeps nothing that an orderly end would save.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::net::{HEADER_BYTES, Link, MAX_FRAME};

    fn options() -> PasstOptions {
        let publish = ["2222:22", "[::1]:53:53/udp"].map(|text| text.parse().unwrap());
        PasstOptions { mac: [2, 0, 0, 0, 0, 9], mtu: 9000, publish: publish.into(), host_loopback: false }
    }

    fn fake(script: &str) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("passt");
        let path = path.to_str().unwrap().to_owned();
        // A program that this process writes cannot be started while a child of another test has a copy of the
        // open file. So a child writes it.
        let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod 755 "$0""#;
        let status = Command::new("sh").args(["-c", write, &path, script]).status().unwrap();
        assert!(status.success());
        (dir, path)
    }

    #[test]
    fn the_program_is_told_of_the_network() {
        let told = arguments(&options()).join(" ");
        let expected = "--foreground --quiet --stderr --fd 0 --address 10.0.2.15 --netmask 24 --gateway 10.0.2.2 \
                        --mtu 9000 --tcp-ports 127.0.0.1/2222:22 --udp-ports ::1/53:53 --no-map-gw";
        assert_eq!(told, expected);
        let open = PasstOptions { host_loopback: true, publish: vec![], ..options() };
        assert!(!arguments(&open).join(" ").contains("--no-map-gw"));
    }

    #[test]
    fn a_program_that_is_missing_or_ends_is_told() {
        let error = start_program("/none/passt", &options()).unwrap_err();
        assert!(error.to_string().contains("apt install passt"), "{error}");
        let (_dir, program) =
            fake("echo Failed to send 9 bytes to syslog >&2; echo port 22 is taken >&2; exit 1");
        let error = start_program(&program, &options()).unwrap_err().to_string();
        assert!(error.ends_with("it ends at once: port 22 is taken (exit status: 1)"), "{error}");
    }

    #[test]
    fn the_end_of_the_process_is_the_end_of_the_link_and_the_other_way_round() {
        // Answers the first frame, and then sends one more and ends.
        let (_dir, program) =
            fake("dd bs=64 count=1 <&0 >&0 2>/dev/null; read line <&0; echo the end >&2; exit 3");
        let link = start_program(&program, &options()).unwrap();
        let mut buffer = vec![0; HEADER_BYTES + MAX_FRAME];
        assert_eq!(link.receive(&mut buffer).unwrap(), None);
        let mut frame = vec![b'x'; HEADER_BYTES + 20];
        frame.push(b'\n');
        link.send(&frame).unwrap();
        let error = loop {
            match link.receive(&mut buffer) {
                Ok(_) => std::thread::yield_now(),
                Err(error) => break error.to_string(),
            }
        };
        assert_eq!(error, "passt has ended: the end (exit status: 3)");
        // The process sleeps for ever.
        let (dir, program) =
            fake("dd bs=64 count=1 <&0 >&0 2>/dev/null; echo $$ > $(dirname $0)/pid; exec sleep 1000000");
        let link = start_program(&program, &options()).unwrap();
        let pid = loop {
            match fs::read_to_string(dir.path().join("pid")) {
                Ok(pid) if pid.ends_with('\n') => break pid.trim().to_owned(),
                _ => std::thread::yield_now(),
            }
        };
        assert!(fs::exists(format!("/proc/{pid}")).unwrap());
        drop(link);
        assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
    }
}
