//! Messages over a pair of sockets that keep them apart (`SOCK_SEQPACKET`). Where the other process ends, so does the
//! connection.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::retry_on_intr;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::remote::messages::LONGEST;

/// Descriptors that come with a message at most.
const MOST_DESCRIPTORS: usize = 2;

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Socket {
    socket: OwnedFd,
    room: Box<[u8; LONGEST]>,
}

/// Creates a connection. One end is for the engine, the other for the worker.
///
/// # Errors
/// Fails if the kernel refuses.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn senseless(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Socket {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket, room: Box::new([0; LONGEST]) }
    }

    /// Waits for an answer no longer than this.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub(crate) fn set_patience(&self, patience: Duration) -> io::Result<()> {
        Ok(set_socket_timeout(&self.socket, Timeout::Recv, Some(patience))?)
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Fails if the other end is gone.
    pub(crate) fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        let bytes = postcard::to_slice(message, &mut self.room[..]).map_err(io::Error::other)?;
        retry_on_intr(|| send(&self.socket, bytes, SendFlags::NOSIGNAL))?;
        Ok(())
    }

    /// Receives a message.
    ///
    /// # Errors
    /// [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) where the other end is gone, [`InvalidData`](io::ErrorKind::InvalidData)
    /// where the message is none, [`WouldBlock`](io::ErrorKind::WouldBlock) where none came in time.
    pub(crate) fn receive<M: DeserializeOwned>(&mut self) -> io::Result<M> {
        let (_, length) = retry_on_intr(|| recv(&self.socket, &mut self.room[..], RecvFlags::TRUNC))?;
        self.read(length)
    }

    /// The same without waiting: [`WouldBlock`](io::ErrorKind::WouldBlock) where no message has come.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub(crate) fn try_receive<M: DeserializeOwned>(&mut self) -> io::Result<M> {
        let flags = RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        let (_, length) = retry_on_intr(|| recv(&self.socket, &mut self.room[..], flags))?;
        self.read(length)
    }

    fn read<M: DeserializeOwned>(&self, length: usize) -> io::Result<M> {
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let bytes = self.room.get(..length).ok_or_else(|| senseless("the message is too long"))?;
        postcard::from_bytes(bytes).map_err(|_| senseless("the message makes no sense"))
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub(crate) fn send_with<const COUNT: usize>(
        &mut self,
        message: &impl Serialize,
        descriptors: [BorrowedFd<'_>; COUNT],
    ) -> io::Result<()> {
        const { assert!(COUNT <= MOST_DESCRIPTORS) };
        let bytes = postcard::to_slice(message, &mut self.room[..]).map_err(io::Error::other)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        retry_on_intr(|| sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL))?;
        Ok(())
    }

    /// Receives a message with descriptors.
    ///
    /// # Errors
    /// As [`receive`](Self::receive), and where other descriptors come with the message.
    pub(crate) fn receive_with<M: DeserializeOwned, const COUNT: usize>(
        &mut self,
    ) -> io::Result<(M, [OwnedFd; COUNT])> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::TRUNC;
        let received = retry_on_intr(|| {
            recvmsg(&self.socket, &mut [IoSliceMut::new(&mut self.room[..])], &mut control, flags)
        })?;
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                descriptors.extend(more);
            }
        }
        let message = self.read(received.bytes)?;
        let whole = !received.flags.contains(ReturnFlags::CTRUNC);
        let descriptors = descriptors.try_into().ok().filter(|_| whole);
        descriptors.map(|all| (message, all)).ok_or_else(|| senseless("descriptors are missing"))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remote::messages::{Answer, Hello, Reply};

    #[test]
    fn what_is_no_message_is_refused() {
        let (one, other) = pair().unwrap();
        let mut socket = Socket::new(one);
        for bytes in [&[0xff; 5][..], &[0xff; LONGEST + 1]] {
            send(&other, bytes, SendFlags::empty()).unwrap();
            let error = socket.receive::<Reply>().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
        send(&other, &[1; 3], SendFlags::empty()).unwrap();
        assert_eq!(socket.receive_with::<Hello, 2>().unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(other);
        assert_eq!(socket.receive::<Reply>().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(socket.send(&Reply { lost: false, answer: Answer::Done }).is_err());
    }

    #[test]
    fn who_says_nothing_is_not_waited_for_without_end() {
        let (one, _other) = pair().unwrap();
        let mut socket = Socket::new(one);
        socket.set_patience(Duration::from_millis(5)).unwrap();
        assert_eq!(socket.receive::<Reply>().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
