//! Locks that keep programs from using the same image in conflicting ways, compatible with QEMU's.
//!
//! The locks are open file description locks on single bytes of the file (QEMU, `block/file-posix.c`). A lock
//! on byte 100 + n means "I use permission n", and a lock on byte 200 + n means "I do not share permission
//! n". All of them are read locks, so any number of programs can hold the same byte. A program takes its own
//! locks first. It then checks the bytes that conflict with them, and gives up if another program holds one.
//!
//! The locks do not cover the data itself. `flock` is not used for two reasons. Network file systems
//! implement it as locks on byte ranges, which would conflict with these locks. And the device manager takes
//! it briefly on block devices.

#![expect(unsafe_code, reason = "open file description locks have no safe form")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

const USED: i64 = 100;
const NOT_SHARED: i64 = 200;

/// QEMU's permissions (`BLK_PERM_*`), by number. All programs share the permission for writes that change
/// nothing, and none uses it.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// The use of a file.
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

    /// Readers and writers both exclude other writers.
    fn not_shared() -> &'static [i64] {
        &[WRITE, RESIZE]
    }

    fn bytes(self) -> impl Iterator<Item = i64> {
        let used = self.used().iter().map(|permission| USED + permission);
        used.chain(Self::not_shared().iter().map(|permission| NOT_SHARED + permission))
    }

    /// Returns the bytes that no other program may have locked. The bytes that describe the conflict best
    /// come first.
    fn excluded(self) -> impl Iterator<Item = i64> {
        let not_shared = Self::not_shared().iter().map(|permission| USED + permission);
        not_shared.chain(self.used().iter().map(|permission| NOT_SHARED + permission))
    }
}

/// The reason why a file could not be locked.
#[derive(Debug)]
pub(super) enum LockError {
    /// Another program uses the file. The text says which program and how, and completes the sentence "it is
    /// in use: …".
    InUse(String),
    /// The file system does not support these locks.
    Io(io::Error),
}

/// Serialises locking in this process. Otherwise two disks that open the same file at the same time could
/// both be refused.
static TURN: Mutex<()> = Mutex::new(());

/// Locks a file until it is closed.
pub(super) fn lock(file: &File, access: Access) -> Result<(), LockError> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let conflict = match take(file, access) {
        Ok(None) => return Ok(()),
        Ok(Some(byte)) => Ok(byte),
        Err(error) => Err(error),
    };
    // Release the locks, which would otherwise exclude others until the file is closed.
    unlock(file, access);
    drop(turn);
    match conflict {
        Ok(byte) => Err(LockError::InUse(describe(file, byte))),
        Err(error) => Err(LockError::Io(error)),
    }
}

/// Releases all locks. Closing the file also releases them, but later if a starting child process still has a
/// copy.
pub(super) fn unlock(file: &File, access: Access) {
    for byte in access.bytes() {
        // A lock that cannot be released ends with the file.
        let _ = set(file, byte, libc::F_UNLCK);
    }
}

/// Takes all locks. Returns a byte on which another program has a conflicting lock.
fn take(file: &File, access: Access) -> io::Result<Option<i64>> {
    for byte in access.bytes() {
        match set(file, byte, libc::F_RDLCK) {
            // Another program has locked the whole file for writing.
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

/// Returns the holder of the lock on a byte, and what the lock means.
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

/// Returns the program that holds a lock on a byte of a file, if this process has the right to see it.
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

/// Returns whether the text of `/proc/PID/fdinfo` about an open file contains a lock on a byte. The line of a
/// lock ends with its first and last byte: `lock: 1: OFDLCK ADVISORY READ -1 fe:00:17 100 100`.
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
