//! Messages between the process that manages VMs and a worker: JSON after its length, over a socket. A descriptor
//! may come with a message.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::retry_on_intr;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, recvmsg, send, sendmsg, shutdown,
    socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest message, in bytes. A description of a VM has a few kilobytes, a piece of a console 64 KiB.
const LONGEST: usize = 16 << 20;

/// Creates a connection: one end for each process.
///
/// # Errors
/// Fails if the process is out of files.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// The sending side of a connection.
#[derive(Debug)]
pub(crate) struct Sender(OwnedFd);

/// The receiving side.
#[derive(Debug)]
pub(crate) struct Receiver(OwnedFd);

/// Takes a connection apart.
///
/// # Errors
/// Fails if the process is out of files.
pub(crate) fn split(socket: OwnedFd) -> io::Result<(Sender, Receiver)> {
    Ok((Sender(socket.try_clone()?), Receiver(socket)))
}

impl Sender {
    /// Sends a message, and a descriptor with it.
    ///
    /// # Errors
    /// Fails if the other process is gone.
    pub(crate) fn send(&mut self, message: &impl Serialize, with: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut bytes = vec![0; size_of::<u32>()];
        serde_json::to_writer(&mut bytes, message)?;
        let length = bytes.len() - size_of::<u32>();
        if length > LONGEST {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the message is too long"));
        }
        bytes[..size_of::<u32>()].copy_from_slice(&(length as u32).to_le_bytes());
        let mut sent = 0;
        if let Some(descriptor) = with {
            let descriptors = [descriptor];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
            let parts = [IoSlice::new(&bytes)];
            sent = retry_on_intr(|| sendmsg(&self.0, &parts, &mut control, SendFlags::NOSIGNAL))?;
        }
        while sent < bytes.len() {
            sent += retry_on_intr(|| send(&self.0, &bytes[sent..], SendFlags::NOSIGNAL))?;
        }
        Ok(())
    }

    /// Ends the connection for both processes.
    pub(crate) fn shut_down(&self) {
        // It may have ended already.
        let _ = shutdown(&self.0, Shutdown::Both);
    }
}

impl Receiver {
    /// Waits for the next message, and returns the descriptor that came with it.
    ///
    /// # Errors
    /// [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) where the other process is gone,
    /// [`InvalidData`](io::ErrorKind::InvalidData) where the message makes no sense.
    pub(crate) fn receive<M: DeserializeOwned>(&mut self) -> io::Result<(M, Option<OwnedFd>)> {
        let mut with = None;
        let mut length = [0; size_of::<u32>()];
        self.fill(&mut length, &mut with)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > LONGEST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"));
        }
        let mut bytes = vec![0; length];
        self.fill(&mut bytes, &mut with)?;
        let message = serde_json::from_slice(&bytes)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok((message, with))
    }

    fn fill(&self, bytes: &mut [u8], with: &mut Option<OwnedFd>) -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = retry_on_intr(|| {
                let mut parts = [IoSliceMut::new(&mut bytes[filled..])];
                recvmsg(&self.0, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
            })?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    *with = descriptors.last();
                }
            }
            if received.bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += received.bytes;
        }
        Ok(())
    }
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn long_messages_and_descriptors_arrive() {
        let (one, other) = pair().unwrap();
        let (mut sender, _kept) = split(one).unwrap();
        let (_, mut receiver) = split(other).unwrap();
        let long = "x".repeat(3 << 20);
        let (mut near, far) = UnixStream::pair().unwrap();
        let expected = long.clone();
        let sending = std::thread::spawn(move || {
            sender.send(&long, None).unwrap();
            sender.send(&"with", Some(far.as_fd())).unwrap();
            sender.send(&"without", None).unwrap();
        });
        let (message, with) = receiver.receive::<String>().unwrap();
        assert_eq!((message == expected, with.is_none()), (true, true));
        let (message, with) = receiver.receive::<String>().unwrap();
        assert_eq!(message, "with");
        near.write_all(b"hello").unwrap();
        let mut read = [0; 5];
        UnixStream::from(with.unwrap()).read_exact(&mut read).unwrap();
        assert_eq!(&read, b"hello");
        let (message, with) = receiver.receive::<String>().unwrap();
        assert_eq!((message.as_str(), with.is_none()), ("without", true));
        sending.join().unwrap();
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        for (bytes, kind) in [
            (&[0xff; 8][..], io::ErrorKind::InvalidData),
            (&[1, 0, 0, 0, b'{'], io::ErrorKind::InvalidData),
            (&[9, 0, 0, 0, b'"'], io::ErrorKind::UnexpectedEof),
            (&[], io::ErrorKind::UnexpectedEof),
        ] {
            let (one, other) = pair().unwrap();
            UnixStream::from(one).write_all(bytes).unwrap();
            let (_, mut receiver) = split(other).unwrap();
            assert_eq!(receiver.receive::<String>().unwrap_err().kind(), kind, "{bytes:?}");
        }
    }
}
