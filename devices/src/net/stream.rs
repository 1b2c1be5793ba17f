//! A stream of frames, as QEMU sends them: each frame behind its length in four bytes, the most significant first.
//!
//! The other end is a process of the user's, such as passt. It is trusted no more than a network is: a length that
//! no frame has ends the link.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use super::passt::Passt;
use super::{HEADER_BYTES, Link, MAX_FRAME, MIN_FRAME, Offloads, Sent};

const PREFIX: usize = 4;
/// Bytes to read at once.
const READ_BYTES: usize = 128 << 10;

/// One end of the stream.
#[derive(Debug)]
pub struct StreamLink {
    socket: UnixStream,
    incoming: Mutex<Incoming>,
    /// The rest of a frame of which the socket has taken a part.
    outgoing: Mutex<Vec<u8>>,
    /// The process at the other end, if it is this link's.
    process: Mutex<Option<Passt>>,
}

/// Bytes that were read, from `start` on, and have not been delivered.
#[derive(Debug, Default)]
struct Incoming {
    bytes: Vec<u8>,
    start: usize,
}

impl StreamLink {
    /// Returns a link over a connected socket.
    ///
    /// # Errors
    /// Fails if the socket cannot be made non-blocking.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let (incoming, outgoing, process) = Default::default();
        Ok(Self { socket, incoming, outgoing, process })
    }

    /// Returns a link to a process, which ends with the link.
    pub(super) fn of_process(socket: UnixStream, process: Passt) -> io::Result<Self> {
        Ok(Self { process: Mutex::new(Some(process)), ..Self::new(socket)? })
    }

    /// Returns why the link is gone: what became of the process, if there is one.
    fn gone(&self, error: io::Error) -> io::Error {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        match process.take() {
            Some(mut process) => io::Error::other(format!("passt has ended: {}", process.last_words())),
            None => error,
        }
    }
}

impl Incoming {
    /// Moves the next whole frame into `frame`, and returns its length.
    fn next(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        let rest = &self.bytes[self.start..];
        let Some((prefix, rest)) = rest.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let length = u32::from_be_bytes(*prefix) as usize;
        if !(1..=MAX_FRAME.min(frame.len())).contains(&length) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the other end announces a frame of {length} bytes"),
            ));
        }
        let Some(content) = rest.get(..length) else { return Ok(None) };
        frame[..length].copy_from_slice(content);
        self.start += PREFIX + length;
        Ok(Some(length))
    }
}

impl Link for StreamLink {
    fn file(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        let (header, frame) = buffer.split_at_mut(HEADER_BYTES);
        loop {
            if let Some(length) = incoming.next(frame).map_err(|error| self.gone(error))? {
                if length < MIN_FRAME {
                    continue;
                }
                header.fill(0);
                return Ok(Some(HEADER_BYTES + length));
            }
            // What is left is less than a frame.
            let start = std::mem::take(&mut incoming.start);
            incoming.bytes.drain(..start);
            let kept = incoming.bytes.len();
            incoming.bytes.resize(kept + READ_BYTES, 0);
            let read = (&self.socket).read(&mut incoming.bytes[kept..]);
            incoming.bytes.truncate(kept + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Err(self.gone(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // An idle link needs no buffer.
                    incoming.bytes.shrink_to_fit();
                    return Ok(None);
                }
                Err(error) => return Err(self.gone(error)),
            }
        }
    }

    fn send(&self, frame: &[u8]) -> io::Result<Sent> {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.write_rest(&mut outgoing)? {
            return Ok(Sent::Full);
        }
        let frame = &frame[HEADER_BYTES..];
        outgoing.extend_from_slice(&(frame.len() as u32).to_be_bytes());
        outgoing.extend_from_slice(frame);
        // The rest goes before the next frame, or when the socket becomes writable.
        self.write_rest(&mut outgoing)?;
        Ok(Sent::Done)
    }

    fn flush(&self) -> io::Result<()> {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        self.write_rest(&mut outgoing).map(drop)
    }

    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    fn set_guest_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_enabled(&self, _enabled: bool) -> io::Result<()> {
        Ok(())
    }
}

impl StreamLink {
    /// Writes what is left of a frame. Returns whether nothing is left.
    fn write_rest(&self, outgoing: &mut Vec<u8>) -> io::Result<bool> {
        while !outgoing.is_empty() {
            match (&self.socket).write(outgoing) {
                Ok(0) => return Err(self.gone(io::ErrorKind::WriteZero.into())),
                Ok(written) => drop(outgoing.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(self.gone(error)),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;

    use super::*;

    fn pair() -> (StreamLink, UnixStream) {
        let (ours, other) = UnixStream::pair().unwrap();
        (StreamLink::new(ours).unwrap(), other)
    }

    /// Ends the connection now. A child process that another test starts may hold a copy of the socket for a moment.
    fn close(socket: &UnixStream) {
        socket.shutdown(Shutdown::Both).unwrap();
    }

    fn message(length: usize) -> Vec<u8> {
        [&(length as u32).to_be_bytes()[..], &vec![7; length]].concat()
    }

    #[test]
    fn frames_come_whole_however_they_are_cut() {
        let (link, mut other) = pair();
        let mut buffer = vec![1; HEADER_BYTES + MAX_FRAME];
        assert_eq!(link.receive(&mut buffer).unwrap(), None);
        let both = [message(60), message(1500)].concat();
        for (at, byte) in both.iter().enumerate() {
            other.write_all(&[*byte]).unwrap();
            let expected = match at + 1 {
                64 => Some(72),
                1568 => Some(1512),
                _ => None,
            };
            assert_eq!(link.receive(&mut buffer).unwrap(), expected, "{at}");
        }
        assert_eq!((&buffer[..HEADER_BYTES], buffer[HEADER_BYTES]), (&[0; HEADER_BYTES][..], 7));
        // Frames without an Ethernet header are skipped.
        other.write_all(&[message(3), message(20)].concat()).unwrap();
        assert_eq!(link.receive(&mut buffer).unwrap(), Some(32));
        close(&other);
        assert!(link.receive(&mut buffer).is_err());
    }

    #[test]
    fn lengths_that_no_frame_has_end_the_link() {
        for length in [0, MAX_FRAME as u32 + 1, u32::MAX] {
            let (link, mut other) = pair();
            other.write_all(&length.to_be_bytes()).unwrap();
            let mut buffer = vec![1; HEADER_BYTES + MAX_FRAME];
            assert_eq!(link.receive(&mut buffer).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_full_stream_takes_no_frame_and_loses_none() {
        let (link, mut other) = pair();
        let frame = vec![5; HEADER_BYTES + 1000];
        let mut sent = 0;
        while link.send(&frame).unwrap() == Sent::Done {
            sent += 1;
        }
        other.set_nonblocking(true).unwrap();
        let (mut read, mut chunk) = (0, vec![0; 64 << 10]);
        while read < sent * 1004 {
            match other.read(&mut chunk) {
                Ok(count) => read += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Link::flush(&link).unwrap(),
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(read, sent * 1004);
        close(&other);
        assert!(link.send(&frame).is_err());
    }
}
