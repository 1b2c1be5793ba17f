//! The service on a guest's network: frames in, frames out.
//!
//! `smoltcp` speaks ARP, IPv4, ICMP and TCP. Frames for the service's address are its own, all others are the link's.
//! Each connection carries one request. Then the service closes it.
//!
//! What a guest can hold: [`CONNECTIONS`] connections with their buffers (96 KiB), [`MAX_REQUEST`] bytes of a request
//! and one answer for each, and [`MAX_WAITING`] frames. What does not fit is dropped, as on any network. The memory is
//! taken when the guest first sends a frame to the service.

use std::collections::VecDeque;
use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use samepage_devices::net::Detour;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as Moment;
use smoltcp::wire::{EthernetAddress, IpCidr};

use crate::Metadata;
use crate::http::{self, MAX_REQUEST};

/// Upper limit for connections at a time.
pub(crate) const CONNECTIONS: usize = 16;
/// Bytes that a connection holds before the service has read them.
const RECEIVE_BYTES: usize = 2048;
/// Bytes of an answer that a connection holds until the guest has them.
const SEND_BYTES: usize = 4096;
/// Upper limit for frames that wait for the guest.
const MAX_WAITING: usize = 64;
/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// The service's address on the Ethernet: Firecracker's.
const MAC: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);
const PORT: u16 = 80;
/// Largest frame for the guest: a packet of 1,500 bytes, which all guests take, and the Ethernet header.
const MAX_FRAME: usize = 1514;

const ETHERNET_BYTES: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
/// Where a packet names its receiver.
const IPV4_DESTINATION: usize = ETHERNET_BYTES + 16;
const ARP_TARGET: usize = ETHERNET_BYTES + 24;

/// The service at one network device.
pub(crate) struct Network {
    service: Arc<Metadata>,
    address: Ipv4Addr,
    start: Instant,
    stack: Option<Stack>,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Network {
    pub(crate) fn new(service: Arc<Metadata>, address: Ipv4Addr) -> Self {
        Self { service, address, start: Instant::now(), stack: None }
    }

    fn is_for_the_service(&self, frame: &[u8]) -> bool {
        let receiver = match frame.get(12..ETHERNET_BYTES) {
            Some(kind) if kind == IPV4 => frame.get(IPV4_DESTINATION..IPV4_DESTINATION + 4),
            Some(kind) if kind == ARP => frame.get(ARP_TARGET..ARP_TARGET + 4),
            _ => None,
        };
        receiver == Some(&self.address.octets())
    }
}

impl Detour for Network {
    fn take(&mut self, frame: &[u8]) -> bool {
        if !self.is_for_the_service(frame) {
            return false;
        }
        let now = self.start.elapsed();
        let stack = self.stack.get_or_insert_with(|| Stack::new(self.address, now));
        let mut frame = frame.to_vec();
        // A guest without a route of its own to the service sends to the Ethernet address of its gateway.
        frame[..6].copy_from_slice(MAC.as_bytes());
        stack.frames.incoming = Some(frame);
        stack.work(&self.service, now);
        true
    }

    fn next(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let stack = self.stack.as_mut()?;
        if stack.frames.outgoing.is_empty() {
            stack.work(&self.service, self.start.elapsed());
        }
        let frame = stack.frames.outgoing.pop_front()?;
        buffer.get_mut(..frame.len())?.copy_from_slice(&frame);
        Some(frame.len())
    }

    fn wait(&mut self) -> Option<Duration> {
        let stack = self.stack.as_mut()?;
        stack.wait(self.start.elapsed())
    }
}

/// The protocols, and the connections.
struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    frames: Frames,
}

/// A place for a connection.
struct Connection {
    socket: SocketHandle,
    /// When the connection was made, since the device was.
    since: Option<Duration>,
    request: Vec<u8>,
    /// The answer, and how much of it the socket has.
    answer: Option<(Vec<u8>, usize)>,
}

fn moment(time: Duration) -> Moment {
    Moment::from_micros(i64::try_from(time.as_micros()).unwrap_or(i64::MAX))
}

fn listening() -> tcp::Socket<'static> {
    let buffer = |bytes| tcp::SocketBuffer::new(vec![0; bytes]);
    let mut socket = tcp::Socket::new(buffer(RECEIVE_BYTES), buffer(SEND_BYTES));
    // A new socket with a port can always listen.
    let _ = socket.listen(PORT);
    socket
}

impl Stack {
    fn new(address: Ipv4Addr, now: Duration) -> Self {
        let mut frames = Frames::default();
        let mut config = Config::new(MAC.into());
        // The guest is the only peer, so the numbers of its connections need not be secret.
        config.random_seed = now.as_nanos() as u64;
        let mut interface = Interface::new(config, &mut frames, moment(now));
        // The guest may have any address of its own: all of them are reached directly.
        interface.update_ip_addrs(|addresses| {
            // There is room for one.
            let _ = addresses.push(IpCidr::new(address.into(), 0));
        });
        let mut sockets = SocketSet::new(Vec::with_capacity(CONNECTIONS));
        let connections = (0..CONNECTIONS).map(|_| Connection::new(sockets.add(listening()))).collect();
        Self { interface, sockets, connections, frames }
    }

    /// Handles the frame that has come, and all that is due.
    fn work(&mut self, service: &Metadata, now: Duration) {
        loop {
            self.interface.poll(moment(now), &mut self.frames, &mut self.sockets);
            // Without room for an answer, the frame was not taken.
            self.frames.incoming = None;
            let mut is_changed = false;
            for connection in &mut self.connections {
                is_changed |= connection.serve(&mut self.sockets, service, now);
            }
            if !is_changed {
                return;
            }
        }
    }

    fn wait(&mut self, now: Duration) -> Option<Duration> {
        let due = self.interface.poll_delay(moment(now), &self.sockets);
        let due = due.map(|delay| Duration::from_micros(delay.total_micros()));
        // Frames without room wait for the guest, not for the time.
        let due = due.filter(|_| self.frames.has_room());
        let ends = self.connections.iter().filter_map(|connection| connection.since);
        let ends = ends.map(|since| (since + PATIENCE).saturating_sub(now));
        due.into_iter().chain(ends).min()
    }
}

impl Connection {
    fn new(socket: SocketHandle) -> Self {
        Self { socket, since: None, request: Vec::new(), answer: None }
    }

    /// Takes the connection as far as it goes. Returns whether there may be frames for the guest now.
    fn serve(&mut self, sockets: &mut SocketSet<'static>, service: &Metadata, now: Duration) -> bool {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(self.socket);
        match socket.state() {
            tcp::State::Listen => return false,
            // The guest has all there was. The place is free at once: a late segment of the old connection is
            // answered like one that belongs to none.
            tcp::State::Closed | tcp::State::TimeWait => {
                sockets.remove(self.socket);
                *self = Self::new(sockets.add(listening()));
                return false;
            }
            _ => {}
        }
        let since = *self.since.get_or_insert(now);
        if now >= since + PATIENCE {
            socket.abort();
            return true;
        }
        if self.answer.is_none() {
            let room = MAX_REQUEST - self.request.len();
            let read = socket.recv(|bytes| {
                let taken = bytes.len().min(room);
                self.request.extend_from_slice(&bytes[..taken]);
                (taken, taken)
            });
            if read.is_ok_and(|taken| taken > 0) {
                self.answer = http::answer(service, &self.request, now).map(|answer| (answer, 0));
            }
        }
        let mut is_changed = false;
        match &mut self.answer {
            Some((answer, sent)) if *sent < answer.len() => {
                let taken = socket.send_slice(&answer[*sent..]).unwrap_or(0);
                *sent += taken;
                is_changed = taken > 0;
                if *sent == answer.len() {
                    socket.close();
                }
            }
            // The guest asks no more.
            None if !socket.may_recv() && socket.may_send() => {
                socket.close();
                is_changed = true;
            }
            _ => {}
        }
        is_changed
    }
}

/// The frames between the guest and the protocols.
#[derive(Default)]
struct Frames {
    incoming: Option<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
}

impl Frames {
    fn has_room(&self) -> bool {
        self.outgoing.len() < MAX_WAITING
    }
}

struct Incoming(Vec<u8>);

struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Frames {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Moment) -> Option<(Incoming, Outgoing<'_>)> {
        if !self.has_room() {
            return None;
        }
        Some((Incoming(self.incoming.take()?), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: Moment) -> Option<Outgoing<'_>> {
        self.has_room().then_some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MAX_FRAME;
        // A guest may leave these to its device. They travel through memory alone.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities.checksum.udp = Checksum::Tx;
        capabilities
    }
}
