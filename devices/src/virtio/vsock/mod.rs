//! Virtio socket device (virtio 1.2, section 5.10): streams between programs of the guest and of the host,
//! without a network.
//!
//! On the host they are Unix sockets, in Firecracker's convention:
//! - A program of the host connects to the device's socket and writes `CONNECT PORT\n`. If a program of the guest
//!   listens on this port, the answer is `OK PORT\n` with the host's port, and data follows. If not, the connection
//!   is closed.
//! - A program of the guest connects to port P of the host (address 2). The device connects to the socket whose
//!   path is that of the device's, `_` and P. If nobody listens there, the guest's connection is refused.
//!
//! | queue | purpose |
//! | --- | --- |
//! | 0, 1 | packets for the guest, and of the guest |
//! | 2 | events; there are none |
//!
//! One worker thread serves all connections in turn. There are [`MAX_CONNECTIONS`] at most. The device holds 64 KiB
//! of data for each. The guest knows how much room is left, and the device knows the guest's room.
//!
//! A program has a minute to write its line, and the guest 10 s to answer. Then the program's connection is closed.
//! At most [`MAX_PENDING`] programs wait, so those that get no answer leave room for others' connections.
//!
//! Either end can end its half of a connection and go on reading. If the guest has ended a connection and forgets it,
//! the program of the host still gets what the device holds for it.
//!
//! # Errors
//! What is wrong in a packet resets its connection. Packets that are too short, or that are not between the guest
//! and the host, are dropped. An invalid ring or chain breaks the device until it is reset.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice, read_config};

mod connection;
mod packet;
mod service;
#[cfg(test)]
mod tests;
mod waits;

use service::Service;
use waits::Limits;

/// Upper limit for the connections of a device.
pub const MAX_CONNECTIONS: usize = 256;
/// Upper limit for those of them that programs of the host have asked for, and that are not answered.
pub const MAX_PENDING: usize = 64;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// Counters of a device since the last boot.
#[derive(Debug, Default)]
pub struct VsockStats {
    /// Connections that were opened, in both directions.
    pub connections: AtomicU64,
    /// Those of them that are over.
    pub ended: AtomicU64,
    /// Connections that were refused, ended or broken by the device.
    pub resets: AtomicU64,
    /// Programs of the host that were turned away because they said no port in time, or the guest did not answer.
    pub timeouts: AtomicU64,
    /// Packets for the guest.
    pub received_packets: AtomicU64,
    /// Bytes of data for the guest.
    pub received_bytes: AtomicU64,
    /// Packets of the guest.
    pub sent_packets: AtomicU64,
    /// Bytes of data of the guest.
    pub sent_bytes: AtomicU64,
    /// How often the device broke.
    pub errors: AtomicU64,
}

/// Why a device's socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// A program listens there.
    #[error("open the socket {path}: a program listens there already; give each VM a path of its own", path = .0.display())]
    InUse(PathBuf),
    /// The system refuses it.
    #[error("open the socket {path}: {source}{hint}", path = .path.display(), hint = hint(.source))]
    Bind {
        /// The path.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; make its folder, or give another path",
        io::ErrorKind::AlreadyExists => "; remove it, or give another path",
        _ => "",
    }
}

/// What the worker needs, and the VMM sees.
struct Common {
    cid: u32,
    path: PathBuf,
    /// Device and inode of the socket's file.
    file: Option<(u64, u64)>,
    listener: UnixListener,
    limits: Limits,
    stats: Arc<VsockStats>,
}

impl Drop for Common {
    fn drop(&mut self) {
        // Somebody may have removed it already, and another VM may have made its own there.
        if self.file.is_some() && self.file == file_of(&self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A socket device.
pub struct Vsock {
    thread_name: String,
    common: Arc<Common>,
    worker: Option<Worker>,
}

impl Vsock {
    /// Returns the device of the VM `vm`, with this address of the guest and the socket at `path`. A socket that a
    /// dead process has left there is replaced.
    ///
    /// # Errors
    /// Fails if the socket cannot be opened.
    pub fn new(vm: &str, cid: u32, path: &Path) -> Result<Self, VsockError> {
        let listener = bind(path)?;
        let failed = |source| VsockError::Bind { path: path.to_owned(), source };
        listener.set_nonblocking(true).map_err(failed)?;
        let (path, file) = (path.to_owned(), file_of(path));
        let common = Common { cid, path, file, listener, limits: Limits::default(), stats: Arc::default() };
        // A zero byte would end the thread's name early.
        let thread_name = format!("vsock-{vm}").replace('\0', "?");
        Ok(Self { thread_name, common: Arc::new(common), worker: None })
    }

    /// Returns the counters. They outlive the device.
    pub fn stats(&self) -> Arc<VsockStats> {
        self.common.stats.clone()
    }
}

/// Connects to the socket at `path`, and does not wait: a program that accepts too slowly is as one that does not
/// listen.
fn dial(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Returns what identifies a file.
fn file_of(path: &Path) -> Option<(u64, u64)> {
    let file = path.symlink_metadata().ok()?;
    Some((file.dev(), file.ino()))
}

fn bind(path: &Path) -> Result<UnixListener, VsockError> {
    let failed = |source| VsockError::Bind { path: path.to_owned(), source };
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        result => return result.map_err(failed),
    }
    // A file that is no socket refuses connections as well, and is not the device's to remove.
    if !path.symlink_metadata().is_ok_and(|file| file.file_type().is_socket()) {
        return Err(failed(io::Error::from_raw_os_error(libc::EEXIST)));
    }
    match dial(path) {
        Err(Errno::CONNREFUSED) => {
            std::fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path).map_err(failed)
        }
        // A program listens, and is slow to accept.
        Ok(_) | Err(Errno::AGAIN) => Err(VsockError::InUse(path.to_owned())),
        Err(error) => Err(failed(error.into())),
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&u64::from(self.common.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let (receiving, sending) = (activation.take(0)?, activation.take(1)?);
        let common = self.common.clone();
        let make = move || Service::new(common, receiving, sending);
        let worker = Worker::spawn(self.thread_name.clone(), activation.interrupt, make)
            .map_err(ActivateError::Worker)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        // All connections end.
        self.worker = None;
    }
}
