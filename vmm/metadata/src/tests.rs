//! A guest with a network stack of its own talks to the service by frames.

use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};

use super::*;
use crate::network::CONNECTIONS;

const GUEST: Ipv4Address = Ipv4Address::new(172, 16, 0, 2);
const GATEWAY: Ipv4Address = Ipv4Address::new(172, 16, 0, 1);

/// The wire between the guest and the service.
struct Wire {
    service: Box<dyn Detour>,
    /// Frames for others.
    passed: usize,
}

struct Received(Vec<u8>);

struct Sender<'a>(&'a mut Wire);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        self.0.passed += usize::from(!self.0.service.take(&frame));
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sender<'_>)> {
        let mut frame = vec![0; 1514];
        let length = self.service.next(&mut frame)?;
        frame.truncate(length);
        Some((Received(frame), Sender(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sender<'_>> {
        Some(Sender(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        // The guest leaves its checksums to its device, and does not look at those of others.
        capabilities.checksum.tcp = Checksum::Rx;
        capabilities
    }
}

struct Guest {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    start: std::time::Instant,
    port: u16,
}

impl Guest {
    fn new(service: &Arc<Metadata>) -> Self {
        let mut wire = Wire { service: service.at(DEFAULT_ADDRESS), passed: 0 };
        let mac = EthernetAddress([2, 0, 0, 0, 0, 1]);
        let mut interface = Interface::new(Config::new(mac.into()), &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // The service is a neighbour, as with a route to its address.
            addresses.push(IpCidr::new(GUEST.into(), 0)).unwrap();
        });
        Self {
            wire,
            interface,
            sockets: SocketSet::new(Vec::new()),
            start: std::time::Instant::now(),
            port: 40_000,
        }
    }

    fn poll(&mut self) {
        let now = Instant::from_micros(self.start.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 70_000]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        self.port += 1;
        let service = (DEFAULT_ADDRESS, 80);
        socket.connect(self.interface.context(), service, self.port).unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Polls until the socket is as it should be.
    fn until(&mut self, handle: SocketHandle, mut is: impl FnMut(&mut tcp::Socket<'static>) -> bool) {
        let end = std::time::Instant::now() + Duration::from_secs(60);
        while !is(self.socket(handle)) {
            assert!(std::time::Instant::now() < end, "{:?}", self.socket(handle).state());
            self.poll();
        }
    }

    /// Sends a request, and returns the answer.
    fn ask(&mut self, request: &str) -> String {
        let handle = self.connect();
        self.until(handle, |socket| socket.may_send());
        self.socket(handle).send_slice(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        self.until(handle, |socket| {
            let read = socket.recv(|bytes| {
                answer.extend_from_slice(bytes);
                (bytes.len(), ())
            });
            // The service closes behind its answer.
            read == Err(tcp::RecvError::Finished)
        });
        self.socket(handle).close();
        self.until(handle, |socket| !socket.is_open() || socket.state() == tcp::State::TimeWait);
        self.sockets.remove(handle);
        String::from_utf8(answer).unwrap()
    }
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

fn service(version: Version) -> Arc<Metadata> {
    let service = Metadata::new("a", 60_000).unwrap();
    service.configure(version, false);
    service.put(json!({"name": "web", "long": "x".repeat(50_000)})).unwrap();
    service
}

#[test]
fn a_guest_gets_a_token_and_then_the_data() {
    let service = service(Version::V2);
    let mut guest = Guest::new(&service);
    assert!(guest.ask("GET /name HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 401 "));
    let asked = guest.ask("PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n");
    assert!(asked.contains("\r\nX-metadata-token-ttl-seconds: 60\r\n"), "{asked}");
    let get = |path| format!("GET {path} HTTP/1.1\r\nX-metadata-token: {}\r\n\r\n", body(&asked));
    assert_eq!(body(&guest.ask(&get("/name"))), "web");
    // Longer than the buffers of a connection.
    assert_eq!(body(&guest.ask(&get("/long"))), "x".repeat(50_000));
    // What the owner changes is there at once.
    service.patch(&json!({"name": "db"})).unwrap();
    assert_eq!(body(&guest.ask(&get("/name"))), "db");
    assert_eq!(guest.wire.passed, 0);
    // More requests, one after the other, than there are connections.
    for _ in 0..2 * CONNECTIONS {
        assert_eq!(body(&guest.ask(&get("/name"))), "db");
    }
    // Nothing is left to do.
    assert_eq!(guest.wire.service.wait(), None);
}

#[test]
fn connections_are_bounded_and_one_that_ends_makes_room() {
    let service = service(Version::V1);
    let mut guest = Guest::new(&service);
    let open: Vec<_> = (0..CONNECTIONS).map(|_| guest.connect()).collect();
    for handle in &open {
        guest.until(*handle, |socket| socket.may_send());
    }
    let refused = guest.connect();
    guest.until(refused, |socket| !socket.is_open());
    // Those who ask nothing are disconnected after a time.
    let wait = guest.wire.service.wait().expect("a time");
    assert!(wait <= Duration::from_secs(30), "{wait:?}");
    guest.socket(open[0]).close();
    guest.until(open[0], |socket| !socket.is_open() || socket.state() == tcp::State::TimeWait);
    assert_eq!(body(&guest.ask("GET /name HTTP/1.0\r\n\r\n")), "web");
}

#[test]
fn frames_for_others_pass() {
    let service = service(Version::V1);
    let mut guest = Guest::new(&service);
    let buffer = || tcp::SocketBuffer::new(vec![0; 1000]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.connect(guest.interface.context(), (GATEWAY, 80), 1000).unwrap();
    guest.sockets.add(socket);
    guest.poll();
    assert_eq!((guest.wire.passed, guest.wire.service.next(&mut [0; 1514])), (1, None));
}

#[test]
fn a_guest_without_a_route_of_its_own_reaches_the_service_through_its_gateway() {
    let service = service(Version::V1);
    let mut detour = service.at(DEFAULT_ADDRESS);
    // A ping to the service, at the Ethernet address of somebody else.
    let mut frame = vec![2, 9, 9, 9, 9, 9, 2, 0, 0, 0, 0, 1, 8, 0];
    frame.extend([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0, 0]);
    frame.extend(GUEST.octets());
    frame.extend(DEFAULT_ADDRESS.octets());
    let sum: u32 = frame[14..].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend([8, 0, 0xf7, 0xff, 0, 0, 0, 0]);
    assert!(detour.take(&frame));
    // The service asks for the guest's own Ethernet address before it answers.
    let mut answer = [0; 1514];
    let length = detour.next(&mut answer).expect("a question");
    assert_eq!(
        (&answer[..6], &answer[12..14], &answer[38..42]),
        (&[0xff; 6][..], &[8, 6][..], &GUEST.octets()[..])
    );
    assert!(length >= 42);
}

proptest! {
    #[test]
    fn no_frame_harms_the_service(
        frames in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..120)), 1..40)
    ) {
        let service = service(Version::V2);
        let mut detour = service.at(DEFAULT_ADDRESS);
        for (is_ip, bytes) in frames {
            let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, if is_ip { 0 } else { 6 }];
            frame.extend(&bytes);
            if is_ip && frame.len() >= 34 {
                // A header that is right, before anything.
                let length = (frame.len() - 14) as u16;
                frame[14] = 0x45;
                frame[16..18].copy_from_slice(&length.to_be_bytes());
                frame[20..22].fill(0);
                frame[23] = 6;
                frame[30..34].copy_from_slice(&DEFAULT_ADDRESS.octets());
                frame[24..26].fill(0);
                let words = frame[14..34].chunks(2);
                let sum: u32 = words.map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
                let sum = (sum & 0xffff) + (sum >> 16);
                let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
                frame[24..26].copy_from_slice(&sum.to_be_bytes());
                if let Some(port) = frame.get_mut(36..38) {
                    port.copy_from_slice(&80_u16.to_be_bytes());
                }
            } else if frame.len() >= 42 {
                frame[38..42].copy_from_slice(&DEFAULT_ADDRESS.octets());
            }
            detour.take(&frame);
            let mut buffer = [0; 1514];
            while detour.next(&mut buffer).is_some() {}
            detour.wait();
        }
    }
}
