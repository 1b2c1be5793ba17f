//! Ports that a network of the user publishes, with a real process of passt.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::BorrowedFd;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use samepage_devices::net::passt::{self, PasstOptions};
use samepage_devices::net::{HEADER_BYTES, Link, MAX_FRAME, Sent, StreamLink};
use samepage_resources::DEMO_GUEST;
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::program;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// Kinds of frames (Ethernet), and of packets (IP).
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const TCP: u8 = 6;
const UDP: u8 = 17;

/// What a frame carries: where its addresses and its ports begin, its protocol, and the port of the guest.
#[derive(Debug)]
struct Packet {
    addresses: (usize, usize),
    ports: usize,
    protocol: u8,
    guest: u16,
}

impl Packet {
    /// Returns `None` for what is neither TCP nor UDP over IP.
    fn of(frame: &[u8]) -> Option<Self> {
        let (addresses, ports, protocol) = match [frame[12], frame[13]] {
            IPV4 => ((26, 4), 14 + usize::from(frame[14] & 15) * 4, frame[23]),
            IPV6 => ((22, 16), 54, frame[20]),
            _ => return None,
        };
        let is_either = [TCP, UDP].contains(&protocol);
        let guest = u16::from_be_bytes([frame[ports + 2], frame[ports + 3]]);
        is_either.then_some(Self { addresses, ports, protocol, guest })
    }
}

/// A guest without a VM: it has the other end of passt's socket.
struct Wire(StreamLink);

impl Wire {
    /// Returns the next frame for this port, with its header.
    fn hear(&self, protocol: u8, port: u16) -> (Vec<u8>, Packet) {
        let mut buffer = vec![0; HEADER_BYTES + MAX_FRAME];
        loop {
            let Some(length) = self.0.receive(&mut buffer).expect("passt runs") else {
                // SAFETY: the link is open for as long as this value.
                #[expect(unsafe_code, reason = "the link has the number of its file alone")]
                let file = unsafe { BorrowedFd::borrow_raw(self.0.file()) };
                let limit = Timespec { tv_sec: TIME_LIMIT.as_secs() as i64, tv_nsec: 0 };
                let ready = poll(&mut [PollFd::new(&file, PollFlags::IN)], Some(&limit));
                assert_eq!(ready, Ok(1), "passt sends nothing for port {port}");
                continue;
            };
            let frame = &buffer[HEADER_BYTES..length];
            if let Some(packet) = Packet::of(frame)
                && (packet.protocol, packet.guest) == (protocol, port)
            {
                return (buffer[..length].to_vec(), packet);
            }
        }
    }

    /// Sends a frame back to where it came from. Checksums stay right, since sums do not depend on the order.
    fn echo(&self, mut frame: Vec<u8>, packet: &Packet) {
        let bytes = &mut frame[HEADER_BYTES..];
        let mut swap = |at: usize, length: usize| {
            let (left, right) = bytes[at..at + 2 * length].split_at_mut(length);
            left.swap_with_slice(right);
        };
        swap(0, 6);
        swap(packet.addresses.0, packet.addresses.1);
        swap(packet.ports, 2);
        assert_eq!(self.0.send(&frame).expect("passt runs"), Sent::Done);
    }
}

/// Returns ports that are free, as the kernel says.
fn free(addresses: &[(SocketAddr, bool)]) -> Vec<u16> {
    let port = |(address, udp): &(SocketAddr, bool)| {
        let address = match udp {
            true => UdpSocket::bind(address).and_then(|socket| socket.local_addr()),
            false => TcpListener::bind(address).and_then(|socket| socket.local_addr()),
        };
        address.expect("a port").port()
    };
    addresses.iter().map(port).collect()
}

pub(super) fn lead_to_the_guest() {
    let (v4, v6) = (SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), SocketAddr::from((Ipv6Addr::LOCALHOST, 0)));
    // passt has no IPv6 for the guest where the host has no way out over it.
    let routes = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    let unset = "0".repeat(32);
    let mut routes = routes.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let has_ipv6 = routes.any(|route| route[0] == unset && route[1] == "00" && route[4] != unset);
    let wanted: &[_] = if has_ipv6 { &[(v4, true), (v6, true), (v6, false)] } else { &[(v4, true)] };
    println!("IPv6: {has_ipv6}");
    let ports = free(wanted);
    let publish = wanted.iter().zip(&ports).enumerate().map(|(number, ((address, udp), port))| {
        let (address, guest, kind) = (address.ip(), 50 + number, if *udp { "/udp" } else { "" });
        let address = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        format!("{address}:{port}:{guest}{kind}").parse().expect("a port")
    });
    // Without the gateway's address for the host, passt of 2023 loses answers of the guest to programs of the host (UDP
    // over IPv4).
    let options = PasstOptions { mac: MAC, mtu: 9000, publish: publish.collect(), host_loopback: true };
    let wire = Wire(passt::start(&options).expect("passt can be had"));
    for (number, ((address, udp), port)) in wanted.iter().zip(&ports).enumerate() {
        let (target, guest) = (SocketAddr::new(address.ip(), *port), 50 + number as u16);
        if *udp {
            // Over IPv6, passt of 2023 answers to the host's own address and not to ::1, so the socket has all.
            let own = match address.ip() {
                IpAddr::V4(own) => IpAddr::V4(own),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let socket = UdpSocket::bind((own, 0)).expect("a socket");
            socket.set_read_timeout(Some(TIME_LIMIT)).expect("a time limit");
            for text in [&b"hello"[..], b"once more"] {
                socket.send_to(text, target).expect("passt listens");
                let (frame, packet) = wire.hear(UDP, guest);
                assert!(frame.ends_with(text), "{frame:?}");
                wire.echo(frame, &packet);
                let mut answer = [0; 64];
                let (length, from) = socket.recv_from(&mut answer).expect("an answer");
                assert_eq!((&answer[..length], from), (text, target));
            }
        } else {
            // passt accepts at once, and asks the guest.
            let _stream = TcpStream::connect(target).expect("passt listens");
            let (frame, packet) = wire.hear(TCP, guest);
            let flags = frame[HEADER_BYTES + packet.ports + 13];
            assert_eq!(flags & 0x3f, 2, "the first packet of a connection is a SYN");
        }
    }
}

pub(super) fn belong_to_one_vm() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let kernel = dir.path().join("demo");
    fs::write(&kernel, DEMO_GUEST).expect("room for a kernel");
    // Two ports that are free and differ in their last digit alone.
    let local = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    let tens = (2000..3000).find(|tens| [0, 1].iter().all(|last| local(tens * 10 + last).is_ok()));
    let tens = tens.expect("two ports are free");
    let run = |publish: &str| {
        let mut command = program::command(["run", "--count", "2", "--memory", "16M", "--cmdline"]);
        command.args(["crash=sleep", "--net", &format!("user,publish={publish}"), "--kernel"]).arg(&kernel);
        command
    };
    let output = run(&format!("{tens}0:22")).output().expect("the program can be run");
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    let wanted = format!("port {tens}0:22 is published by VM vm-0 and by VM vm-1");
    assert!(told.contains(&wanted) && told.contains("{index}"), "{told}");
    let mut command = run(&format!("{tens}{{index}}:22"));
    let mut process = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("it can be run");
    let deadline = Instant::now() + TIME_LIMIT;
    // Each process of passt listens once it has started, and tells nobody here.
    for last in [0, 1] {
        while TcpStream::connect((Ipv4Addr::LOCALHOST, tens * 10 + last)).is_err() {
            assert!(Instant::now() < deadline, "nobody listens to port {tens}{last}");
            assert_eq!(process.try_wait().expect("a status"), None);
            thread::sleep(Duration::from_millis(10));
        }
    }
    process.kill().expect("it is this process's");
    process.wait().expect("its end");
}
