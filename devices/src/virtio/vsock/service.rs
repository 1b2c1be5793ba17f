//! Serves the queues and all connections.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{BUFFER_BYTES, Caller, Connection, Fate, Rest};
use super::packet::{FromGuest, HEADER_BYTES, HOST_CID, Operation, Ports, ToGuest};
use super::waits::Waits;
use super::{Common, MAX_CONNECTIONS, MAX_PENDING, dial};
use crate::virtio::chain::Buffers;
use crate::virtio::queue::{QueueError, ServedQueue, Taken};
use crate::virtio::worker::{Serve, StopFlag};

/// Limit for descriptors in a chain.
const MAX_DESCRIPTORS: usize = 64;
/// Packets to take or send before the other direction has its turn.
const BATCH: usize = 64;
/// Upper limit for refusals that the guest has no buffers for. Then its packets wait.
const MAX_RESETS: usize = 256;
/// Largest data of a packet, in bytes.
const MAX_DATA: usize = BUFFER_BYTES as usize;
/// The first port of programs of the host. Those of guests begin at 0.
const FIRST_PORT: u32 = 1 << 30;
/// The listener's number among the sockets.
const LISTENER: u64 = 0;

/// A socket of the host.
enum Socket {
    Caller(Caller),
    Connection(Ports),
    /// A connection that is over for the guest.
    Rest(Rest),
}

/// A connection, and its place in the service.
struct Entry {
    connection: Connection,
    socket: u64,
    /// Whether it is in `ready`.
    is_queued: bool,
}

/// The resources for serving the device.
pub(super) struct Service {
    common: Arc<Common>,
    receiving: (ServedQueue, EventFd),
    sending: (ServedQueue, EventFd),
    /// Watches the sockets. It is readable itself when one of them has an event.
    epoll: Epoll,
    sockets: HashMap<u64, Socket>,
    /// Callers, and connections that the guest has not answered.
    waits: Waits,
    connections: HashMap<Ports, Entry>,
    /// Connections that may have something for the guest, in turn.
    ready: VecDeque<Ports>,
    /// Connections that the guest has to be told of as over.
    resets: VecDeque<Ports>,
    /// A buffer of the guest that waits for something to say. Its ranges are in `buffers`.
    held: Option<Taken>,
    buffers: Buffers,
    taken_buffers: Buffers,
    may_accept: bool,
    next_socket: u64,
    next_port: u32,
    data: Vec<u8>,
}

impl Service {
    pub(super) fn new(
        common: Arc<Common>,
        receiving: (ServedQueue, EventFd),
        sending: (ServedQueue, EventFd),
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER);
        epoll.ctl(ControlOperation::Add, common.listener.as_raw_fd(), interest)?;
        Ok(Self {
            common,
            receiving,
            sending,
            epoll,
            sockets: HashMap::new(),
            waits: Waits::new()?,
            connections: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            held: None,
            buffers: Buffers::new(MAX_DESCRIPTORS),
            taken_buffers: Buffers::new(MAX_DESCRIPTORS),
            may_accept: true,
            next_socket: LISTENER + 1,
            next_port: FIRST_PORT,
            data: Vec::new(),
        })
    }

    /// Watches a socket, and returns its number.
    fn watch(&mut self, stream: &UnixStream) -> io::Result<u64> {
        let number = self.next_socket;
        self.next_socket += 1;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(events, number))?;
        Ok(number)
    }

    /// Accepts programs of the host.
    fn accept(&mut self) {
        while self.may_accept {
            match self.common.listener.accept() {
                // Beyond the limits a program is turned away at once.
                Ok((stream, _)) if self.sockets.len() < MAX_CONNECTIONS && self.waits.len() < MAX_PENDING => {
                    if stream.set_nonblocking(true).is_err() {
                        continue;
                    }
                    let Ok(number) = self.watch(&stream) else { continue };
                    if self.waits.begin(number, self.common.limits.line).is_ok() {
                        self.sockets.insert(number, Socket::Caller(Caller::new(stream)));
                    }
                }
                Ok(_) => self.count_reset(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.may_accept = false,
                // Out of files, for instance. The next event tries again.
                Err(_) => return,
            }
        }
    }

    fn count_reset(&self) {
        self.common.stats.resets.fetch_add(1, Relaxed);
    }

    /// Handles events of the sockets. Returns true if there were any.
    fn poll_sockets(&mut self) -> Result<bool, QueueError> {
        let mut events = [EpollEvent::default(); 32];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(source) => return Err(QueueError::Host { what: "watch sockets", source }),
        };
        for event in &events[..count] {
            let number = event.data();
            if number == LISTENER {
                self.may_accept = true;
                continue;
            }
            match self.sockets.get_mut(&number) {
                None => {}
                Some(Socket::Caller(caller)) => match caller.port() {
                    Ok(None) => {}
                    Ok(Some(port)) => self.call(number, port),
                    Err(_) => self.close(number),
                },
                Some(Socket::Rest(rest)) => {
                    let is_over = rest.flush();
                    if is_over {
                        self.sockets.remove(&number);
                    }
                }
                Some(Socket::Connection(ports)) => {
                    let ports = *ports;
                    let Some(entry) = self.connections.get_mut(&ports) else { continue };
                    let ended = EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR;
                    entry.connection.is_readable |= event.event_set().intersects(EventSet::IN | ended);
                    entry.connection.is_writable |= event.event_set().intersects(EventSet::OUT | ended);
                    let mut fate = entry.connection.flush();
                    if fate == Fate::Keep && event.event_set().contains(EventSet::HANG_UP) {
                        fate = entry.connection.hang_up();
                    }
                    self.settle(ports, fate);
                }
            }
        }
        self.accept();
        Ok(count > 0)
    }

    /// Ends what has waited for too long.
    fn give_up(&mut self) -> Result<(), QueueError> {
        let failed = |source| QueueError::Host { what: "set the timer of sockets", source };
        for number in self.waits.expired().map_err(failed)? {
            self.common.stats.timeouts.fetch_add(1, Relaxed);
            match self.sockets.get(&number) {
                Some(Socket::Connection(ports)) => {
                    let ports = *ports;
                    let Some(entry) = self.connections.get_mut(&ports) else { continue };
                    let fate = entry.connection.hang_up();
                    self.settle(ports, fate);
                }
                _ => self.close(number),
            }
        }
        Ok(())
    }

    /// Closes a socket that is no connection.
    fn close(&mut self, number: u64) {
        self.waits.end(number);
        self.sockets.remove(&number);
    }

    /// Asks the guest for a connection to `port`, for the program at this socket.
    fn call(&mut self, number: u64, port: u32) {
        let Some(Socket::Caller(caller)) = self.sockets.remove(&number) else { return };
        self.waits.end(number);
        if self.waits.begin(number, self.common.limits.answer).is_err() {
            // Nobody would end the wait.
            return self.count_reset();
        }
        let ports = loop {
            let ports = Ports { host: self.next_port, guest: port };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            // There are fewer connections than ports.
            if !self.connections.contains_key(&ports) {
                break ports;
            }
        };
        self.sockets.insert(number, Socket::Connection(ports));
        let connection = Connection::to_guest(caller.into_stream());
        self.connections.insert(ports, Entry { connection, socket: number, is_queued: false });
        self.settle(ports, Fate::Keep);
    }

    /// Ends a connection, or lets it have its turn if it has something for the guest.
    fn settle(&mut self, ports: Ports, fate: Fate) {
        match fate {
            Fate::Keep => {
                if let Some(entry) = self.connections.get_mut(&ports)
                    && !entry.is_queued
                    && entry.connection.wants_to_send()
                {
                    entry.is_queued = true;
                    self.ready.push_back(ports);
                }
            }
            Fate::Reset => {
                self.remove(ports);
                self.reset(ports);
            }
            Fate::Forget => self.remove(ports),
        }
    }

    fn remove(&mut self, ports: Ports) {
        let Some(Entry { connection, socket, .. }) = self.connections.remove(&ports) else { return };
        self.waits.end(socket);
        if connection.is_open() {
            self.common.stats.ended.fetch_add(1, Relaxed);
        }
        match connection.into_rest() {
            // Its socket stays until the program has read the rest, or has gone.
            Some(rest) => drop(self.sockets.insert(socket, Socket::Rest(rest))),
            None => drop(self.sockets.remove(&socket)),
        }
    }

    fn reset(&mut self, ports: Ports) {
        self.count_reset();
        self.resets.push_back(ports);
    }

    /// Takes packets of the guest. Returns true if there were any.
    fn take_packets(&mut self) -> Result<bool, QueueError> {
        for done in 0..BATCH {
            if self.resets.len() >= MAX_RESETS {
                return Ok(done > 0);
            }
            let (queue, _) = &mut self.sending;
            let Some(taken) = queue.take(&mut self.taken_buffers)? else { return Ok(done > 0) };
            let mut header = [0; HEADER_BYTES];
            let readable = &mut self.taken_buffers.readable;
            let mut packet = None;
            self.data.resize(MAX_DATA, 0);
            if readable.remaining() >= HEADER_BYTES as u64 {
                let read = readable.read(queue.memory(), &mut header).and_then(|()| {
                    let parsed = FromGuest::parse(&header);
                    let length = parsed.length as usize;
                    if length <= MAX_DATA && length as u64 <= readable.remaining() {
                        readable.read(queue.memory(), &mut self.data[..length])?;
                        packet = Some(parsed);
                    }
                    Ok(())
                });
                if let Err(error) = read {
                    return Err(taken.break_queue(QueueError::Ring(virtio_queue::Error::GuestMemory(error))));
                }
            }
            // What replaces lost memory is not to leave the host.
            if let Err(lost) = queue.check_memory() {
                return Err(taken.break_queue(lost));
            }
            queue.complete(taken, 0)?;
            self.common.stats.sent_packets.fetch_add(1, Relaxed);
            let addresses = (u64::from(self.common.cid), HOST_CID);
            if let Some(packet) = packet.filter(|packet| (packet.source, packet.destination) == addresses) {
                self.handle(&packet);
            }
        }
        Ok(true)
    }

    /// Handles a packet, whose data is in the buffer.
    fn handle(&mut self, packet: &FromGuest) {
        let ports = packet.ports;
        if packet.operation == Some(Operation::Request) {
            if self.connections.contains_key(&ports) {
                self.settle(ports, Fate::Reset);
            } else if let Err(_refused) = self.connect(packet) {
                self.reset(ports);
            }
            return;
        }
        match self.connections.get_mut(&ports) {
            Some(entry) => {
                let data = match packet.operation {
                    Some(Operation::Data) => &self.data[..packet.length as usize],
                    _ => &[],
                };
                let fate = entry.connection.handle(packet, data, ports.host);
                self.common.stats.sent_bytes.fetch_add(data.len() as u64, Relaxed);
                match packet.operation {
                    Some(Operation::Response) if fate == Fate::Keep => {
                        self.waits.end(entry.socket);
                        self.common.stats.connections.fetch_add(1, Relaxed);
                    }
                    _ => {}
                }
                self.settle(ports, fate);
            }
            // A reset is not answered by another.
            None if packet.operation == Some(Operation::Reset) => {}
            None => self.reset(ports),
        }
    }

    /// Connects the guest to the program of the host that listens on the port.
    fn connect(&mut self, packet: &FromGuest) -> io::Result<()> {
        if self.sockets.len() >= MAX_CONNECTIONS {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let mut path = self.common.path.clone().into_os_string();
        path.push(format!("_{}", packet.ports.host));
        let stream = UnixStream::from(dial(Path::new(&path))?);
        let number = self.watch(&stream)?;
        let connection = Connection::from_guest(stream, packet);
        self.sockets.insert(number, Socket::Connection(packet.ports));
        self.connections.insert(packet.ports, Entry { connection, socket: number, is_queued: false });
        self.common.stats.connections.fetch_add(1, Relaxed);
        self.settle(packet.ports, Fate::Keep);
        Ok(())
    }

    /// Sends packets to the guest, as far as there are buffers. Returns true if there were any.
    fn send_packets(&mut self) -> Result<bool, QueueError> {
        let mut sent = 0;
        while sent < BATCH && !(self.resets.is_empty() && self.ready.is_empty()) {
            let (queue, _) = &mut self.receiving;
            if self.held.is_none() {
                self.held = queue.take(&mut self.buffers)?;
            }
            let Some(taken) = self.held.take() else { return Ok(sent > 0) };
            let room = self.buffers.writable.remaining().checked_sub(HEADER_BYTES as u64);
            let Some(room) = room.filter(|_| self.buffers.is_in_memory) else {
                return Err(taken.break_queue(QueueError::NoRoom));
            };
            self.data.resize(MAX_DATA, 0);
            let room = usize::try_from(room).unwrap_or(usize::MAX).min(MAX_DATA);
            let Some((header, length)) = self.next(room) else {
                self.held = Some(taken);
                continue;
            };
            let (queue, _) = &mut self.receiving;
            let written = self.buffers.writable.write(queue.memory(), &header.bytes());
            let written =
                written.and_then(|()| self.buffers.writable.write(queue.memory(), &self.data[..length]));
            if let Err(error) = written {
                return Err(taken.break_queue(QueueError::Ring(virtio_queue::Error::GuestMemory(error))));
            }
            queue.complete(taken, (HEADER_BYTES + length) as u32)?;
            self.common.stats.received_packets.fetch_add(1, Relaxed);
            self.common.stats.received_bytes.fetch_add(length as u64, Relaxed);
            sent += 1;
        }
        Ok(sent > 0)
    }

    /// Returns the next packet for the guest and the length of its data, which is in the buffer. `None` if the
    /// connection whose turn it is has nothing.
    fn next(&mut self, room: usize) -> Option<(ToGuest, usize)> {
        let guest_cid = self.common.cid.into();
        let header = |ports, operation, flags, length: usize, forwarded| ToGuest {
            guest_cid,
            ports,
            length: length as u32,
            operation,
            flags,
            buffer: BUFFER_BYTES,
            forwarded,
        };
        if let Some(ports) = self.resets.pop_front() {
            return Some((header(ports, Operation::Reset, 0, 0, 0), 0));
        }
        let ports = self.ready.pop_front()?;
        let entry = self.connections.get_mut(&ports)?;
        entry.is_queued = false;
        match entry.connection.next(&mut self.data[..room]) {
            Ok(None) => None,
            Ok(Some((operation, flags, length))) => {
                let forwarded = entry.connection.tell();
                self.settle(ports, Fate::Keep);
                Some((header(ports, operation, flags, length, forwarded), length))
            }
            Err(_broken) => {
                self.settle(ports, Fate::Reset);
                None
            }
        }
    }

    fn work(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        self.receiving.0.silence_driver()?;
        self.sending.0.silence_driver()?;
        loop {
            if stop.is_set() {
                return Ok(());
            }
            self.give_up()?;
            let mut more = self.poll_sockets()?;
            more |= self.take_packets()?;
            more |= self.send_packets()?;
            self.receiving.0.notify_driver()?;
            self.sending.0.notify_driver()?;
            if more {
                continue;
            }
            // Ask for buffers only where something waits for them.
            let waits = !(self.resets.is_empty() && self.ready.is_empty());
            more |= waits && self.receiving.0.listen_to_driver()?;
            more |= self.resets.len() < MAX_RESETS && self.sending.0.listen_to_driver()?;
            if !more {
                return Ok(());
            }
            self.receiving.0.silence_driver()?;
            self.sending.0.silence_driver()?;
        }
    }
}

impl Serve for Service {
    fn events(&self) -> Vec<RawFd> {
        let (receiving, sending) = (&self.receiving.1, &self.sending.1);
        vec![receiving.as_raw_fd(), sending.as_raw_fd(), self.epoll.as_raw_fd(), self.waits.as_raw_fd()]
    }

    fn serve(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        self.work(stop).inspect_err(|_| {
            self.common.stats.errors.fetch_add(1, Relaxed);
        })
    }

    fn on_idle(&mut self) {
        self.data = Vec::new();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let open = self.connections.values().filter(|entry| entry.connection.is_open()).count();
        self.common.stats.ended.fetch_add(open as u64, Relaxed);
        if let Some(taken) = self.held.take() {
            let _ = taken.break_queue(QueueError::NoRoom);
        }
    }
}
