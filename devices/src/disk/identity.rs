//! Identities for the blocks of images, such that equal identities mean equal contents.
//!
//! An [`ImageId`] contains everything that decides the content of a block in an image: the file, a version of
//! the file's content, and the format. It does not contain the backing images, because blocks in a backing
//! image have the identity of that image.
//!
//! If a file has been unmodified for a while, its version is its time of last change. Every write and every
//! change of size updates that time. File systems record the time in steps of up to [`STEP`], so the time of
//! a recently changed file proves nothing yet. A block device has no time of its last write, and network file
//! systems use the clocks and caches of other hosts. In these cases the version is a number of this process.
//! The number is valid only while this process has the file open and locked.

#![expect(unsafe_code, reason = "fstatfs has no safe form")]

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use super::Format;
use super::cache::ImageId;

/// The longest step of the time of change on this host's file systems (two seconds on FAT), plus a margin.
const STEP: Duration = Duration::from_secs(3);
/// File systems that do not record times of change, or use other hosts' clocks: FAT, NFS, SMB and CIFS, FUSE,
/// 9P, Ceph, AFS and Coda (`statfs(2)`).
const UNRELIABLE: [i64; 9] = [
    0x4d44,
    0x6969,
    0xfe53_4d42,
    0xff53_4d42,
    0x6573_5546,
    0x0102_1997,
    0x00c3_6400,
    0x5346_414f,
    0x7375_7245,
];
/// The bit that marks this process's own numbers. Times of change in nanoseconds have it only from the year
/// 2262 on.
const OWN: u64 = 1 << 63;

/// A file with one state of its content, in any format.
#[derive(Debug)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    version: u64,
    /// Keeps this process's own version for later users of the same file.
    _open: Option<Arc<u64>>,
}

impl Identity {
    /// Returns the identity of a file that was just opened and locked.
    pub(super) fn of(file: &File, metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            let own = own_version([metadata.rdev(), 0, 0, 0], || None);
            // No file system has this device number.
            return Self { device: u64::MAX, inode: metadata.rdev(), version: *own.0, _open: own.1 };
        }
        let is_conclusive = has_conclusive_time(metadata, SystemTime::now()) && has_reliable_times(file);
        let changed = changed(metadata);
        let key = [metadata.dev(), metadata.ino(), changed, metadata.size()];
        let version = own_version(key, || is_conclusive.then_some(changed));
        Self { device: metadata.dev(), inode: metadata.ino(), version: *version.0, _open: version.1 }
    }

    /// Returns the identity of the file's blocks, read in a format.
    pub(super) fn image(&self, format: Format) -> ImageId {
        ImageId::new(self.device, self.inode, self.version, format)
    }
}

/// Returns the time of change in nanoseconds.
fn changed(metadata: &Metadata) -> u64 {
    let seconds = metadata.ctime() as u64;
    seconds.wrapping_mul(1_000_000_000).wrapping_add(metadata.ctime_nsec() as u64) & !OWN
}

/// Returns whether the next change of the file certainly gets another time.
fn has_conclusive_time(metadata: &Metadata, now: SystemTime) -> bool {
    let changed = SystemTime::UNIX_EPOCH + Duration::from_nanos(changed(metadata));
    // A time in the future means that the clock was set back.
    now.duration_since(changed).is_ok_and(|age| age >= STEP)
}

/// Returns whether the file system records times of change with this host's clock.
fn has_reliable_times(file: &File) -> bool {
    let mut answer = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the answer has the size that the kernel expects.
    if unsafe { libc::fstatfs(file.as_raw_fd(), answer.as_mut_ptr()) } < 0 {
        return false;
    }
    // SAFETY: all zeros are a valid value of this type, and so is the kernel's answer.
    let kind = unsafe { answer.assume_init() }.f_type;
    !UNRELIABLE.contains(&(kind & 0xffff_ffff))
}

/// This process's own versions of files, and the last number in use.
#[derive(Default)]
struct Versions {
    last: u64,
    open: HashMap<[u64; 4], Weak<u64>>,
}

static VERSIONS: Mutex<Option<Versions>> = Mutex::new(None);

/// Returns the version that present users of the file have. For a new file, returns the version of `known`,
/// or a new number.
fn own_version(key: [u64; 4], known: impl FnOnce() -> Option<u64>) -> (Arc<u64>, Option<Arc<u64>>) {
    let mut versions = VERSIONS.lock().unwrap_or_else(PoisonError::into_inner);
    let Versions { last, open } = versions.get_or_insert_default();
    open.retain(|_, version| version.strong_count() > 0);
    if let Some(version) = open.get(&key).and_then(Weak::upgrade) {
        return (version.clone(), Some(version));
    }
    if let Some(version) = known() {
        return (Arc::new(version), None);
    }
    *last += 1;
    let version = Arc::new(*last | OWN);
    open.insert(key, Arc::downgrade(&version));
    (version.clone(), Some(version))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn of(file: &File) -> Identity {
        Identity::of(file, &file.metadata().unwrap())
    }

    #[test]
    fn a_file_that_changed_a_moment_ago_has_an_identity_while_it_is_open() {
        let file = tempfile::tempfile().unwrap();
        fs::File::set_len(&file, 4096).unwrap();
        let raw = |identity: &Identity| identity.image(Format::Raw);
        let first = of(&file);
        let second = of(&file);
        assert_eq!(raw(&first), raw(&second), "those who have it open together agree");
        assert_ne!(raw(&first), first.image(Format::Qcow2));
        let closed = raw(&first);
        drop((first, second));
        assert_ne!(raw(&of(&file)), closed, "it may have changed within one step of the clock");
    }

    #[test]
    fn only_time_that_has_passed_proves_rest() {
        let file = tempfile::tempfile().unwrap();
        let metadata = file.metadata().unwrap();
        let changed = SystemTime::UNIX_EPOCH + Duration::from_nanos(changed(&metadata));
        assert!(!has_conclusive_time(&metadata, changed - Duration::from_secs(60)));
        assert!(!has_conclusive_time(&metadata, changed + Duration::from_secs(1)));
        assert!(has_conclusive_time(&metadata, changed + STEP));
    }
}
