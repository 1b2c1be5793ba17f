//! Streams to the host: over TCP, and over the host's socket device.
//!
//! Data passes through a buffer of [`BUFFER`] bytes; sizes are in bytes.

#![expect(unsafe_code, reason = "the standard library has no sockets of this family")]

use crate::checksum::Fnv1a;
use crate::content::{self, PAGE_SIZE};
use crate::files::{BUFFER, Summed};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The name of the host in commands, for its socket device.
const HOST: &str = "vsock";

/// Reads all that a program of `host` sends from `port`.
///
/// # Errors
/// Fails if nobody listens there, or if the connection breaks.
pub fn get(host: &str, port: u32) -> io::Result<Summed> {
    let mut stream = connect(host, port)?;
    let mut summed = Summed { bytes: 0, checksum: Fnv1a::new() };
    let mut buf = vec![0; BUFFER];
    loop {
        match stream.read(&mut buf)? {
            0 => return Ok(summed),
            length => {
                summed.checksum.update(&buf[..length]);
                summed.bytes += length as u64;
            }
        }
    }
}

/// Sends the first `bytes` bytes of the stream of `seed`, and waits until the other end has closed.
///
/// # Errors
/// Fails if nobody listens there, or if the connection breaks.
pub fn put(host: &str, port: u32, bytes: u64, seed: u64) -> io::Result<Summed> {
    let mut stream = connect(host, port)?;
    let mut summed = Summed { bytes: 0, checksum: Fnv1a::new() };
    let mut buf = vec![0; BUFFER];
    while summed.bytes < bytes {
        let length = (bytes - summed.bytes).min(BUFFER as u64) as usize;
        content::fill(seed, summed.bytes / PAGE_SIZE as u64, &mut buf[..length]);
        stream.write_all(&buf[..length])?;
        summed.checksum.update(&buf[..length]);
        summed.bytes += length as u64;
    }
    // SAFETY: the call has no pointers.
    check(unsafe { libc::shutdown(stream.as_raw_fd(), libc::SHUT_WR) })?;
    while stream.read(&mut buf)? > 0 {}
    Ok(summed)
}

/// Sends back all that the first program sends which connects to `port` of the socket device. `ready` is called
/// when one can. Returns the number of bytes.
///
/// # Errors
/// Fails if the guest has no socket device, or if the connection breaks.
pub fn echo(port: u32, ready: impl FnOnce()) -> io::Result<u64> {
    let socket = vsock()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address lives longer than the call, and its length is given. The others have no pointers.
    let accepted = unsafe {
        check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length_of(&address)))?;
        check(libc::listen(socket.as_raw_fd(), 1))?;
        ready();
        libc::accept(socket.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut())
    };
    check(accepted)?;
    // SAFETY: the descriptor is new, and nobody else has it.
    let mut stream = File::from(unsafe { OwnedFd::from_raw_fd(accepted) });
    let mut buf = vec![0; BUFFER];
    let mut total = 0;
    loop {
        match stream.read(&mut buf)? {
            0 => return Ok(total),
            length => {
                stream.write_all(&buf[..length])?;
                total += length as u64;
            }
        }
    }
}

fn connect(host: &str, port: u32) -> io::Result<File> {
    if host != HOST {
        let port = u16::try_from(port).map_err(|_| io::ErrorKind::InvalidInput)?;
        return TcpStream::connect((host, port)).map(|stream| File::from(OwnedFd::from(stream)));
    }
    let socket = vsock()?;
    let address = address(libc::VMADDR_CID_HOST, port);
    // SAFETY: the address lives longer than the call, and its length is given.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length_of(&address)) })?;
    Ok(File::from(socket))
}

fn vsock() -> io::Result<OwnedFd> {
    // SAFETY: the call has no pointers.
    let socket = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    check(socket)?;
    // SAFETY: the descriptor is new, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: the structure holds numbers, for which zeros are valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn length_of(address: &libc::sockaddr_vm) -> libc::socklen_t {
    size_of_val(address) as libc::socklen_t
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    #[test]
    fn streams_have_the_content_and_the_checksum_of_files() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = u32::from(listener.local_addr().unwrap().port());
        let server = thread::spawn(move || {
            let mut received = Vec::new();
            listener.accept().unwrap().0.read_to_end(&mut received).unwrap();
            listener.accept().unwrap().0.write_all(&received).unwrap();
            received
        });
        let put = put("127.0.0.1", port, 300_000, 5).unwrap();
        let got = get("127.0.0.1", port).unwrap();
        assert_eq!((put.bytes, put), (300_000, got));
        assert!(server.join().unwrap() == content::bytes(5, 300_000));
        assert!(connect("127.0.0.1", 70_000).is_err());
    }
}
