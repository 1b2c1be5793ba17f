//! The locks by which programs that use the same image keep out of each other's way: QEMU's.
//!
//! They are open file description locks on single bytes of the file (QEMU, `block/file-posix.c`). A lock on
//! byte 100 + n says "I use permission n", one on byte 200 + n says "I do not share permission n". All are
//! locks for reading, so that any number of programs can hold the same byte. Whoever has taken its own looks
//! for others on the bytes that exclude them, and gives up where there are any.
//!
//! The data itself is not locked, and `flock` is not used: network file systems make byte ranges of it, which
//! would conflict with these, and the device manager takes it on block devices for moments at a time.

#![expect(unsafe_code, reason = "open file description locks have no safe form")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

const USED: i64 = 100;
const NOT_SHARED: i64 = 200;

/// QEMU's permissions (`BLK_PERM_*`), by number. That for writes which change nothing is shared by all and
/// used by none.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What is done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Reading,
    Writing,
}

impl Access {
    fn used(self) -> &'static [i64] {
        match self {
            Self::Reading => &[CONSISTENT_READ],
            // Images of some formats grow.
            Self::Writing => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    /// Whoever reads wants no other to write, and so does whoever writes.
    fn not_shared() -> &'static [i64] {
        &[WRITE, RESIZE]
    }

    fn bytes(self) -> impl Iterator<Item = i64> {
        let used = self.used().iter().map(|permission| USED + permission);
        used.chain(Self::not_shared().iter().map(|permission| NOT_SHARED + permission))
    }

    /// Bytes on which nobody else may have a lock; those first that say most of what the other does.
    fn excluded(self) -> impl Iterator<Item = i64> {
        let not_shared = Self::not_shared().iter().map(|permission| USED + permission);
        not_shared.chain(self.used().iter().map(|permission| NOT_SHARED + permission))
    }
}

/// Why a file could not be locked.
#[derive(Debug)]
pub(super) enum LockError {
    /// Somebody else uses it: who, and how, as the end of a sentence that begins with "it is in use".
    InUse(String),
    /// The file system has no such locks.
    Io(io::Error),
}

/// Of two disks of this process that are opened at a time, one is to be refused and not both.
static TURN: Mutex<()> = Mutex::new(());

/// Locks a file for as long as it is open.
pub(super) fn lock(file: &File, access: Access) -> Result<(), LockError> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let conflict = match take(file, access) {
        Ok(None) => return Ok(()),
        Ok(Some(byte)) => Ok(byte),
        Err(error) => Err(error),
    };
    // What was taken would be in others' way for as long as the file stays open.
    unlock(file, access);
    drop(turn);
    match conflict {
        Ok(byte) => Err(LockError::InUse(describe(file, byte))),
        Err(error) => Err(LockError::Io(error)),
    }
}

/// Gives all locks up. Closing the file does so too, but later where a process that is being started still has
/// a copy of it.
pub(super) fn unlock(file: &File, access: Access) {
    for byte in access.bytes() {
        // What cannot be given up ends with the file.
        let _ = set(file, byte, libc::F_UNLCK);
    }
}

/// Takes all locks. Returns a byte on which somebody else has one that excludes them.
fn take(file: &File, access: Access) -> io::Result<Option<i64>> {
    for byte in access.bytes() {
        match set(file, byte, libc::F_RDLCK) {
            // Somebody has locked the whole file for writing.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Ok(Some(byte));
            }
            result => result?,
        }
    }
    for byte in access.excluded() {
        if is_locked_by_others(file, byte)? {
            return Ok(Some(byte));
        }
    }
    Ok(None)
}

fn request(byte: i64, kind: i32) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

fn set(file: &File, byte: i64, kind: i32) -> io::Result<()> {
    let request = request(byte, kind);
    // SAFETY: the kernel reads the request, which outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn is_locked_by_others(file: &File, byte: i64) -> io::Result<bool> {
    let mut request = request(byte, libc::F_WRLCK);
    // SAFETY: the kernel reads and writes the request, which outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(request.l_type) != libc::F_UNLCK)
}

/// Who has the lock on a byte, and what it means.
fn describe(file: &File, byte: i64) -> String {
    let who = holder(file, byte).unwrap_or_else(|| "another VM or program".to_owned());
    let does = match byte {
        _ if byte == USED + WRITE => "writes to it",
        _ if byte == USED + RESIZE => "may change its size",
        _ if byte > NOT_SHARED => "uses it and forbids changes",
        _ => "has it locked",
    };
    format!("{who} {does}")
}

/// The program that has a lock on a byte of a file, among those that this process may look at.
fn holder(file: &File, byte: i64) -> Option<String> {
    let metadata = file.metadata().ok()?;
    let numbers = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| {
        let name = entry.file_name();
        name.to_str()?.parse::<u32>().ok()
    });
    for process in numbers {
        let Ok(files) = fs::read_dir(format!("/proc/{process}/fdinfo")) else { continue };
        for entry in files.flatten() {
            let has_lock = fs::read_to_string(entry.path()).is_ok_and(|text| locks_byte(&text, byte));
            let opened = || fs::metadata(format!("/proc/{process}/fd/{}", entry.file_name().display()));
            let same = |other: fs::Metadata| (other.dev(), other.ino()) == (metadata.dev(), metadata.ino());
            if !has_lock || !opened().is_ok_and(same) {
                continue;
            }
            if process == std::process::id() {
                return Some(format!("another disk of this process ({process})"));
            }
            let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            return Some(format!("{} (process {process})", name.trim_end()));
        }
    }
    None
}

/// Whether what the kernel tells of an open file (`/proc/PID/fdinfo`) has a lock on a byte. A line of a lock
/// ends in its first and last byte: `lock: 1: OFDLCK ADVISORY READ -1 fe:00:17 100 100`.
fn locks_byte(text: &str, byte: i64) -> bool {
    let locks = text.lines().filter_map(|line| line.strip_prefix("lock:"));
    let mut ranges = locks.filter_map(|lock| {
        let mut fields = lock.split_whitespace().rev();
        let end = fields.next()?;
        let start: i64 = fields.next()?.parse().ok()?;
        Some(start..=if end == "EOF" { i64::MAX } else { end.parse().ok()? })
    });
    ranges.any(|range| range.contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_found_in_what_the_kernel_tells() {
        let text = "pos:\t0\nflags:\t02\nlock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:17 100 101\n\
                    lock:\t2: FLOCK  ADVISORY  WRITE 17 fe:00:17 300 EOF\n";
        let locked: Vec<_> = [99, 100, 101, 102, 299, 300, 1 << 40].map(|byte| locks_byte(text, byte)).into();
        assert_eq!(locked, [false, true, true, false, false, true, true]);
        assert!(!locks_byte("lock:\tnonsense\nlock:\n", 0));
    }

    #[test]
    fn one_who_is_refused_leaves_no_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (reader, writer, other) = (open(), open(), open());
        lock(&reader, Access::Reading).unwrap();
        let Err(LockError::InUse(why)) = lock(&writer, Access::Writing) else { panic!("a reader is there") };
        assert!(why.contains(&format!("this process ({})", std::process::id())), "{why}");
        lock(&other, Access::Reading).unwrap();
        drop((reader, other));
        lock(&writer, Access::Writing).unwrap();
    }
}
