//! The folder in which workers are found by the next managing process.
//!
//! A worker has three files in it, which are named after the number of its process: a lock that it holds while it
//! lives, a socket at which the next managing process takes it over, and, if nobody has, a report on the ends of its
//! VMs. The managing process holds a lock of its own, so that a folder has one managing process at a time.
//!
//! Only the owner may use the folder and the sockets.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

/// The managing process's lock.
const LOCK: &str = "supervisor.lock";
/// What the names of workers' files begin with.
const WORKER: &str = "worker-";
/// Bytes of the longest path of a socket (`sun_path` without its end).
const LONGEST: usize = 107;
/// What the names of reports begin with.
const REPORT: &str = "ended-";

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The folder cannot be made, or a file in it cannot be used.
    #[error("{what} {path}: {source}")]
    Io {
        /// The action that failed.
        what: &'static str,
        /// The folder or the file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// Another process could place sockets in the folder.
    #[error("others may write to the state folder {0}, or own it; make a folder of mode 700 for --state")]
    Open(PathBuf),
    /// The paths of sockets would be longer than the kernel allows.
    #[error(
        "the state folder {0} has too long a path: sockets in it can have at most 107 bytes; use a shorter --state"
    )]
    TooLong(PathBuf),
    /// The folder has a managing process.
    #[error(
        "another samepage uses the state folder {path}{holder}; end that process, or use another --state"
    )]
    Taken {
        /// The folder.
        path: PathBuf,
        /// The process, in words.
        holder: String,
    },
}

/// The folder, which is this process's while the value lasts.
#[derive(Debug)]
pub struct StateFolder {
    path: PathBuf,
    /// How long workers whose VMs have all ended wait for the next managing process.
    patience: Duration,
    lock: File,
}

impl StateFolder {
    /// Makes the folder if it is missing, and locks it.
    ///
    /// # Errors
    /// Fails if another process uses the folder, or if others may write to it.
    pub fn take(path: &Path, patience: Duration) -> Result<Self, StateError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { what, path, source }
        };
        let path = std::path::absolute(path).map_err(failed("find the state folder", path))?;
        if Files::of(&path, u32::MAX).socket.as_os_str().len() > LONGEST {
            return Err(StateError::TooLong(path));
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(failed("make the state folder", &path))?;
        let metadata = fs::metadata(&path).map_err(failed("look at the state folder", &path))?;
        if metadata.uid() != own_user() || metadata.mode() & 0o022 != 0 {
            return Err(StateError::Open(path));
        }
        let file = path.join(LOCK);
        let mut lock = loop {
            let mut lock = create(&file).map_err(failed("open", &file))?;
            match try_lock(&lock) {
                Ok(true) if is_at(&lock, &file) => break lock,
                // Its last holder has removed it meanwhile.
                Ok(true) => {}
                Ok(false) => {
                    let mut holder = String::new();
                    // The number helps to find the process, and is not needed.
                    let _ = lock.read_to_string(&mut holder);
                    let holder = holder.trim().parse::<u32>();
                    let holder = holder.map_or_else(|_| String::new(), |id| format!(" (process {id})"));
                    return Err(StateError::Taken { path, holder });
                }
                Err(error) => return Err(failed("lock", &file)(error)),
            }
        };
        // As above.
        let _ = lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id()));
        Ok(Self { path, patience, lock })
    }

    /// Returns the folder's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn patience(&self) -> Duration {
        self.patience
    }

    /// Returns the numbers of the workers that live, and removes the files of the others.
    pub(crate) fn workers(&self) -> io::Result<Vec<u32>> {
        let mut live = Vec::new();
        for name in self.names()? {
            let Some(id) = number(&name, WORKER, ".lock").or_else(|| number(&name, WORKER, ".sock")) else {
                continue;
            };
            let files = Files::of(&self.path, id);
            let holder = File::open(&files.lock);
            if holder.is_ok_and(|lock| matches!(try_lock(&lock), Ok(false))) {
                live.push(id);
            } else {
                files.remove();
            }
        }
        live.sort_unstable();
        live.dedup();
        Ok(live)
    }

    /// Returns the path of a worker's socket.
    pub(crate) fn socket(&self, id: u32) -> PathBuf {
        Files::of(&self.path, id).socket
    }

    /// Removes the files of a worker that has ended.
    pub(crate) fn remove(&self, id: u32) {
        Files::of(&self.path, id).remove();
    }

    /// Returns the reports of workers for which nobody came in time, and removes them.
    pub(crate) fn take_reports(&self) -> io::Result<Vec<(u32, Vec<u8>)>> {
        let mut reports = Vec::new();
        for name in self.names()? {
            let Some(id) = number(&name, REPORT, ".json") else { continue };
            let path = self.path.join(name);
            if let Ok(report) = fs::read(&path) {
                reports.push((id, report));
            }
            let _ = fs::remove_file(path);
        }
        Ok(reports)
    }

    /// Removes this process's lock from the folder. It is held until this value goes.
    pub(crate) fn leave(&self) {
        let path = self.path.join(LOCK);
        // A later process may have a lock of its own there.
        if is_at(&self.lock, &path) {
            let _ = fs::remove_file(path);
        }
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(&self.path)?;
        Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
    }
}

impl Drop for StateFolder {
    fn drop(&mut self) {
        self.leave();
    }
}

/// The files of one worker.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) lock: PathBuf,
    pub(crate) socket: PathBuf,
    report: PathBuf,
}

impl Files {
    pub(crate) fn of(folder: &Path, id: u32) -> Self {
        let file = |prefix, suffix| folder.join(format!("{prefix}{id}{suffix}"));
        Self { lock: file(WORKER, ".lock"), socket: file(WORKER, ".sock"), report: file(REPORT, ".json") }
    }

    /// Creates and takes the lock of this process, which is a worker.
    pub(crate) fn take_lock(&self) -> io::Result<File> {
        let lock = create(&self.lock)?;
        if try_lock(&lock)? && is_at(&lock, &self.lock) {
            return Ok(lock);
        }
        Err(io::Error::other(format!("{} is locked by another process", self.lock.display())))
    }

    /// Writes the report. A reader sees all of it or none.
    pub(crate) fn write_report(&self, report: &[u8]) -> io::Result<()> {
        let new = self.report.with_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(report)?;
        fs::rename(&new, &self.report)
    }

    /// Removes the lock and the socket. They may be gone already.
    pub(crate) fn remove(&self) {
        let _ = fs::remove_file(&self.socket);
        let _ = fs::remove_file(&self.lock);
    }
}

/// The user whose rights this process has.
pub(crate) fn own_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn number(name: &str, prefix: &str, suffix: &str) -> Option<u32> {
    name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok()
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Whether the lock is this process's now. It is given back when the file is closed.
fn try_lock(file: &File) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => identity(open) == identity(named),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn take(path: &Path) -> Result<StateFolder, StateError> {
        StateFolder::take(path, Duration::from_secs(1))
    }

    #[test]
    fn a_folder_has_one_managing_process_and_is_left_empty() {
        let outer = tempfile::tempdir().unwrap();
        let path = outer.path().join("a/b");
        let first = take(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        let refused = take(&path).unwrap_err().to_string();
        let id = std::process::id();
        assert!(refused.contains(&format!("(process {id})")) && refused.contains("--state"), "{refused}");
        drop(first);
        drop(take(&path).unwrap());
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_to_which_others_may_write_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o770)).unwrap();
        assert!(matches!(take(folder.path()), Err(StateError::Open(_))));
    }

    #[test]
    fn files_of_workers_that_have_ended_are_removed() {
        let outer = tempfile::tempdir().unwrap();
        let folder = take(outer.path()).unwrap();
        let live = Files::of(outer.path(), 7);
        let _lock = live.take_lock().unwrap();
        assert!(live.take_lock().is_err());
        drop(Files::of(outer.path(), 8).take_lock().unwrap());
        fs::write(folder.socket(9), "").unwrap();
        fs::write(outer.path().join("another's"), "").unwrap();
        assert_eq!(folder.workers().unwrap(), [7]);
        let left: Vec<_> =
            folder.names().unwrap().into_iter().filter(|name| name.contains("worker")).collect();
        assert_eq!(left, ["worker-7.lock"]);
        assert!(outer.path().join("another's").exists());
    }

    #[test]
    fn a_report_is_taken_once() {
        let outer = tempfile::tempdir().unwrap();
        let folder = take(outer.path()).unwrap();
        Files::of(outer.path(), 7).write_report(b"[]").unwrap();
        assert_eq!(folder.take_reports().unwrap(), [(7, b"[]".to_vec())]);
        assert!(folder.take_reports().unwrap().is_empty());
    }
}
