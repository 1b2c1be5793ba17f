//! The control socket. Only authorised users can connect, and a socket in use is never replaced.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use thiserror::Error;

/// Number of connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// The options of the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketOptions {
    /// The path.
    pub path: PathBuf,
    /// Permission bits. Users with write permission can connect.
    pub mode: u32,
    /// The group of the socket, by name or number.
    pub group: Option<String>,
}

/// The reason why the socket could not be opened.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Another process listens to the socket.
    #[error("{0} is the socket of a running process; end that process, or use another --socket")]
    Live(PathBuf),
    /// The path exists and is not a socket.
    #[error("{0} exists and is not a socket; remove it, or use another --socket")]
    NotASocket(PathBuf),
    /// The path is longer than the kernel's limit for sockets.
    #[error("{0}: a socket's path can have at most 107 bytes; use a shorter --socket")]
    PathTooLong(PathBuf),
    /// The group does not exist.
    #[error("there is no group {0}; use a group of /etc/group or a number for --socket-group")]
    NoSuchGroup(String),
    /// The process may not give the socket to the group.
    #[error(
        "give {path} to the group {group}: {source}; start the process as a member of the group \
         (SupplementaryGroups= in a unit of systemd), or with CAP_CHOWN"
    )]
    Group {
        /// The group, by name or number.
        group: String,
        /// The socket.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// Another system call failed.
    #[error("{what} {path}: {source}")]
    Io {
        /// The action that failed.
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

/// A listening socket. Dropping it removes the file.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    /// Device and inode of the file. A later file at the path may belong to another process.
    identity: (u64, u64),
}

/// Opens the socket. Replaces the socket of a process that has ended.
///
/// # Errors
/// Fails if another process uses the socket, or if the socket cannot be created.
pub fn open(options: &SocketOptions) -> Result<(UnixListener, Socket), SocketError> {
    let path = &options.path;
    let failed = |what| move |source: io::Error| SocketError::Io { what, path: path.clone(), source };
    let address = SocketAddrUnix::new(path).map_err(|_| SocketError::PathTooLong(path.clone()))?;
    let group = options.group.as_deref().map(|group| Ok((group, group_id(group)?))).transpose()?;

    // The lock keeps two starting processes from taking the socket away from each other.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = File::open(folder).map_err(failed("open the folder of"))?;
    flock(&folder, FlockOperation::LockExclusive).map_err(|e| failed("lock the folder of")(e.into()))?;
    remove_stale(path)?;

    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| failed("open")(e.into()))?;
    // The file is created with these permissions, minus the umask.
    fchmod(&socket, Mode::from_raw_mode(options.mode & 0o600)).map_err(|e| failed("open")(e.into()))?;
    bind(&socket, &address).map_err(|e| failed("make")(e.into()))?;
    let metadata = fs::symlink_metadata(path).map_err(failed("look at"))?;
    let guard = Socket { path: path.clone(), identity: (metadata.dev(), metadata.ino()) };
    if let Some((group, id)) = group {
        chown(path, None, Some(id)).map_err(|source| {
            let path = path.clone();
            match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    SocketError::Group { group: group.to_owned(), path, source }
                }
                _ => SocketError::Io { what: "change the group of", path, source },
            }
        })?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(options.mode))
        .map_err(failed("change the permissions of"))?;
    listen(&socket, BACKLOG).map_err(|e| failed("listen at")(e.into()))?;
    Ok((UnixListener::from(socket), guard))
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |what| move |source: io::Error| SocketError::Io { what, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at")(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove the old socket"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A refused permission or a full queue also means that a process uses the socket.
        Ok(_) | Err(_) => Err(SocketError::Live(path.to_owned())),
    }
}

fn group_id(group: &str) -> Result<u32, SocketError> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let file = fs::read_to_string("/etc/group").unwrap_or_default();
    let number = file.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    number.ok_or_else(|| SocketError::NoSuchGroup(group.to_owned()))
}

impl Drop for Socket {
    fn drop(&mut self) {
        let same = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if same {
            // The next process replaces a socket that cannot be removed.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(path: &Path) -> SocketOptions {
        SocketOptions { path: path.to_owned(), mode: 0o600, group: None }
    }

    #[test]
    fn a_live_socket_is_refused_and_a_stale_one_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (listener, guard) = open(&options(&path)).unwrap();
        assert!(matches!(open(&options(&path)), Err(SocketError::Live(_))));
        assert!(UnixStream::connect(&path).is_ok());
        drop(listener);
        // As it is left by a process that was killed.
        std::mem::forget(guard);
        let (listener, guard) = open(&options(&path)).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop((listener, guard));
        assert!(!path.exists());
    }

    #[test]
    fn permissions_are_as_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        for mode in [0o600, 0o660] {
            let opened = open(&SocketOptions { mode, ..options(&path) }).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, mode);
            drop(opened);
        }
        let group = Some("no such group".to_owned());
        assert!(matches!(open(&SocketOptions { group, ..options(&path) }), Err(SocketError::NoSuchGroup(_))));
        assert_eq!(group_id("root").unwrap(), 0);
    }

    #[test]
    fn what_is_no_socket_stays() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(open(&options(file.path())), Err(SocketError::NotASocket(_))));
        assert!(file.path().exists());
        let long = format!("/tmp/{}", "x".repeat(200));
        assert!(matches!(open(&options(long.as_ref())), Err(SocketError::PathTooLong(_))));
    }

    #[test]
    fn a_socket_that_another_made_meanwhile_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (_listener, guard) = open(&options(&path)).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(guard);
        assert!(path.exists());
    }
}
