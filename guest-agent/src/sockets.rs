//! Streams to the host: over TCP, and over the host's socket device.
//!
//! Data passes through a buffer of [`BUFFER`] bytes; sizes are in bytes.

#![expect(unsafe_code, reason = "the standard library has no sockets of this family")]

use crate::checksum::Fnv1a;
use crate::content::{self, PAGE_SIZE};
use crate::files::{BUFFER, Summed};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

/// The name of the host in commands, for its socket device.
const HOST: &str = "vsock";
/// In commands the other end that is to connect to the guest.
const LISTEN: &str = "listen";
/// How long a connection over TCP is tried, because the other end may start later.
const PATIENCE: Duration = Duration::from_secs(60);
/// The time between two attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// Reads all that a program of `host` sends from `port`. With `listen` as the host, `ready` is called when it can
/// connect.
///
/// # Errors
/// Fails if nobody listens there, or if the connection breaks.
pub fn get(host: &str, port: u32, ready: impl FnOnce()) -> io::Result<Summed> {
    let mut stream = open(host, port, ready)?;
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

/// Sends the first `bytes` bytes of the stream of `seed`, and waits until the other end has closed. With `listen`
/// as the host, `ready` is called when it can connect.
///
/// # Errors
/// Fails if nobody listens there, or if the connection breaks.
pub fn put(host: &str, port: u32, bytes: u64, seed: u64, ready: impl FnOnce()) -> io::Result<Summed> {
    let mut stream = open(host, port, ready)?;
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

/// Returns a connection to `port` of `host`, or the first one to `port` of the guest.
fn open(host: &str, port: u32, ready: impl FnOnce()) -> io::Result<File> {
    if host == HOST {
        return connect_to_host(port);
    }
    let port = u16::try_from(port).map_err(|_| io::ErrorKind::InvalidInput)?;
    let stream = if host == LISTEN {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
        ready();
        listener.accept()?.0
    } else {
        connect(host, port)?
    };
    Ok(File::from(OwnedFd::from(stream)))
}

/// Connects over TCP. Another guest may not listen yet, or may not have an address yet.
fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let address = SocketAddrV4::new(host.parse().map_err(|_| io::ErrorKind::InvalidInput)?, port);
    let start = Instant::now();
    loop {
        match TcpStream::connect(address) {
            Err(error)
                if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::HostUnreachable)
                    && start.elapsed() < PATIENCE =>
            {
                thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

fn connect_to_host(port: u32) -> io::Result<File> {
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
    use std::sync::mpsc;

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
        let put = put("127.0.0.1", port, 300_000, 5, || ()).unwrap();
        let got = get("127.0.0.1", port, || ()).unwrap();
        assert_eq!((put.bytes, put), (300_000, got));
        assert!(server.join().unwrap() == content::bytes(5, 300_000));
        assert!(get("127.0.0.1", 70_000, || ()).is_err());
        assert!(get("localhost", port, || ()).is_err());
    }

    #[test]
    fn the_other_end_may_connect_instead() {
        // A port that nobody has, as the kernel says.
        let port = u32::from(TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
        let (listens, listening) = mpsc::channel();
        let server = thread::spawn(move || put("listen", port, 100_000, 6, || listens.send(()).unwrap()));
        listening.recv().unwrap();
        let got = get("127.0.0.1", port, || ()).unwrap();
        assert_eq!((got.bytes, got), (100_000, server.join().unwrap().unwrap()));
    }
}
