//! One connection: its socket on the host, its credits, and what is still to be told to the guest.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{FromGuest, NO_RECEIVE, NO_SEND, Operation};

/// Bytes of a connection that the host holds for its program. The guest is told so, and sends no more.
pub(super) const BUFFER_BYTES: u32 = 64 << 10;
/// The guest hears of read bytes when it knows of no more room than this.
const LOW_CREDIT: u32 = BUFFER_BYTES / 2;
/// The longest line with which a program of the host asks for a port: `CONNECT 4294967295\n`.
const MAX_LINE: usize = 32;

/// How far a connection is.
#[derive(Debug, PartialEq, Eq)]
enum Stage {
    /// The guest was asked, and has not answered.
    Asked,
    /// Data passes.
    Open,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    stage: Stage,
    /// Data of the guest that the socket has not taken.
    outgoing: VecDeque<u8>,
    /// Whether the socket may have data, or room.
    pub(super) is_readable: bool,
    pub(super) is_writable: bool,
    /// Bytes from the guest: received, and those of them that the socket has taken, modulo 2^32.
    received: u32,
    forwarded: u32,
    /// The value of `forwarded` that the guest knows.
    told: u32,
    /// Bytes to the guest, modulo 2^32, and what the guest said last.
    sent: u32,
    guest_buffer: u32,
    guest_forwarded: u32,
    /// What the guest will not do any more (flags of a shutdown).
    guest_ended: u32,
    /// What the host's program will not do any more.
    host_ended: u32,
    /// Packets without data that are still to be sent.
    request: bool,
    response: bool,
    shutdown: bool,
    credit: bool,
}

/// What is to happen to a connection after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Keep,
    /// It is over, and the guest is to be told.
    Reset,
    /// It is over, and the guest knows.
    Forget,
}

impl Connection {
    fn new(stream: UnixStream, stage: Stage) -> Self {
        Self {
            stream,
            stage,
            outgoing: VecDeque::new(),
            is_readable: true,
            is_writable: true,
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            guest_ended: 0,
            host_ended: 0,
            request: false,
            response: false,
            shutdown: false,
            credit: false,
        }
    }

    /// Returns a connection that a program of the host wants, and that the guest is to be asked for.
    pub(super) fn to_guest(stream: UnixStream) -> Self {
        Self { request: true, ..Self::new(stream, Stage::Asked) }
    }

    /// Returns a connection that the guest has asked for.
    pub(super) fn from_guest(stream: UnixStream, request: &FromGuest) -> Self {
        let (guest_buffer, guest_forwarded) = (request.buffer, request.forwarded);
        Self { response: true, guest_buffer, guest_forwarded, ..Self::new(stream, Stage::Open) }
    }

    /// Returns the guest's room for data, in bytes. What a guest says may be anything.
    fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Returns the room for data of the guest that it may use, in bytes.
    pub(super) fn room(&self) -> u32 {
        BUFFER_BYTES.saturating_sub(self.received.wrapping_sub(self.forwarded))
    }

    /// Handles a packet of the guest, with its data. `port` is the host's port of the connection.
    pub(super) fn handle(&mut self, packet: &FromGuest, data: &[u8], port: u32) -> Fate {
        self.guest_buffer = packet.buffer;
        self.guest_forwarded = packet.forwarded;
        match (packet.operation, &self.stage) {
            (Some(Operation::Reset), _) => return Fate::Forget,
            (Some(Operation::Response), Stage::Asked) if !self.request => {
                self.stage = Stage::Open;
                self.outgoing.extend(format!("OK {port}\n").into_bytes());
            }
            (Some(Operation::Data), Stage::Open) => {
                if self.guest_ended & NO_SEND != 0 || data.len() as u64 > u64::from(self.room()) {
                    // The guest has ended its half, or exceeds its credit.
                    return Fate::Reset;
                }
                self.received = self.received.wrapping_add(data.len() as u32);
                if self.host_ended & NO_RECEIVE == 0 {
                    self.outgoing.extend(data);
                }
            }
            (Some(Operation::Shutdown), Stage::Open) => {
                self.guest_ended |= packet.flags & (NO_RECEIVE | NO_SEND);
            }
            (Some(Operation::CreditUpdate), _) => {}
            (Some(Operation::CreditRequest), _) => self.credit = true,
            _ => return Fate::Reset,
        }
        self.flush()
    }

    /// Writes data of the guest to the socket, as far as there is room.
    pub(super) fn flush(&mut self) -> Fate {
        while self.is_writable && !self.outgoing.is_empty() {
            let (first, _) = self.outgoing.as_slices();
            match self.stream.write(first) {
                Ok(written) => drop(self.outgoing.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.is_writable = false,
                // The program receives no more. What it has sent is still for the guest.
                Err(_) => {
                    self.outgoing.clear();
                    self.end(NO_RECEIVE);
                }
            }
        }
        // The answer to CONNECT is no data of the guest's, so there may be more to write than was received.
        let left = self.outgoing.len() as u32;
        let unread = self.received.wrapping_sub(self.forwarded).min(left);
        self.forwarded = self.received.wrapping_sub(unread);
        if self.outgoing.is_empty() {
            // An idle connection needs no memory.
            self.outgoing.shrink_to_fit();
            if self.guest_ended == NO_RECEIVE | NO_SEND {
                return Fate::Reset;
            }
            if self.guest_ended & NO_SEND != 0 {
                // The program may have closed its end already.
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
        if self.guest_ended & NO_RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        let known = BUFFER_BYTES.saturating_sub(self.received.wrapping_sub(self.told));
        if known < LOW_CREDIT && self.told != self.forwarded {
            self.credit = true;
        }
        Fate::Keep
    }

    /// Notes what the host's program will not do any more, and that the guest is to be told.
    fn end(&mut self, halves: u32) {
        self.shutdown |= self.host_ended | halves != self.host_ended;
        self.host_ended |= halves;
    }

    /// Notes that the program has closed both halves, or that the guest does not answer.
    pub(super) fn hang_up(&mut self) -> Fate {
        match self.stage {
            // The guest has not been asked.
            Stage::Asked if self.request => Fate::Forget,
            Stage::Asked => Fate::Reset,
            // Nobody reads what is left, so the end would not be seen otherwise.
            Stage::Open if self.guest_ended & NO_RECEIVE != 0 => {
                self.end(NO_RECEIVE | NO_SEND);
                Fate::Keep
            }
            Stage::Open => Fate::Keep,
        }
    }

    /// Returns data that its program is still to get, of a connection that the guest has ended and forgotten.
    pub(super) fn into_rest(self) -> Option<Rest> {
        let has_rest = self.guest_ended & NO_SEND != 0 && !self.outgoing.is_empty();
        has_rest.then_some(Rest { stream: self.stream, outgoing: self.outgoing })
    }

    /// Whether the guest has agreed to it, or has asked for it.
    pub(super) fn is_open(&self) -> bool {
        self.stage == Stage::Open
    }

    /// Whether there is something for the guest.
    pub(super) fn wants_to_send(&self) -> bool {
        self.request || self.response || self.shutdown || self.credit || self.may_read()
    }

    fn may_read(&self) -> bool {
        let is_open = self.stage == Stage::Open && self.host_ended & NO_SEND == 0;
        is_open && self.is_readable && self.guest_ended & NO_RECEIVE == 0 && self.credit() > 0
    }

    /// Returns the next packet for the guest: its operation and flags. Data is put into `buffer`, and its length
    /// returned. `None` if there is nothing for the guest at present.
    pub(super) fn next(&mut self, buffer: &mut [u8]) -> io::Result<Option<(Operation, u32, usize)>> {
        if std::mem::take(&mut self.request) {
            return Ok(Some((Operation::Request, 0, 0)));
        }
        if std::mem::take(&mut self.response) {
            return Ok(Some((Operation::Response, 0, 0)));
        }
        if self.may_read() {
            let room = buffer.len().min(self.credit() as usize);
            // A buffer of the guest without room for data.
            if room == 0 {
                return Ok(Some((Operation::CreditUpdate, 0, 0)));
            }
            loop {
                match self.stream.read(&mut buffer[..room]) {
                    Ok(0) => {
                        self.end(NO_SEND);
                    }
                    Ok(length) => {
                        self.sent = self.sent.wrapping_add(length as u32);
                        return Ok(Some((Operation::Data, 0, length)));
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.is_readable = false,
                    Err(error) => return Err(error),
                }
                break;
            }
        }
        if std::mem::take(&mut self.shutdown) {
            return Ok(Some((Operation::Shutdown, self.host_ended, 0)));
        }
        if std::mem::take(&mut self.credit) {
            return Ok(Some((Operation::CreditUpdate, 0, 0)));
        }
        Ok(None)
    }

    /// Returns the bytes that the program has got, to be told to the guest.
    pub(super) fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.credit = false;
        self.forwarded
    }
}

/// The last data of a connection that is over for the guest.
#[derive(Debug)]
pub(super) struct Rest {
    stream: UnixStream,
    outgoing: VecDeque<u8>,
}

impl Rest {
    /// Writes as far as there is room. Returns whether nothing is left to do.
    pub(super) fn flush(&mut self) -> bool {
        while !self.outgoing.is_empty() {
            let (first, _) = self.outgoing.as_slices();
            match self.stream.write(first) {
                Ok(written) => drop(self.outgoing.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
            }
        }
        true
    }
}

/// A program of the host that has connected, and has not yet said to which port.
#[derive(Debug)]
pub(super) struct Caller {
    stream: UnixStream,
    line: Vec<u8>,
}

impl Caller {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, line: Vec::new() }
    }

    /// Reads the program's line. Returns the port when the line is complete; `None` if more is to come.
    ///
    /// # Errors
    /// Fails if the line is wrong or too long, or if the program has gone.
    pub(super) fn port(&mut self) -> io::Result<Option<u32>> {
        // Byte by byte, because what follows the line is data.
        loop {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte == *b"\n" => break,
                Ok(_) if self.line.len() < MAX_LINE => self.line.push(byte[0]),
                Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        let line = std::str::from_utf8(&self.line).unwrap_or_default().trim_end_matches('\r');
        let (word, port) = line.split_once(' ').unwrap_or_default();
        let port = port.trim().parse().ok().filter(|_| word.eq_ignore_ascii_case("connect"));
        port.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    pub(super) fn into_stream(self) -> UnixStream {
        self.stream
    }
}
