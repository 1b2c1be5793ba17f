//! By what the blocks of an image are known, so that equal identities mean equal contents.
//!
//! An [`ImageId`] names all that decides the content of a block which lies in an image: the file, a version
//! of its content, and the format that it is read in. The images that back it are not part of it, since
//! blocks that lie in those have those images' identities.
//!
//! The version of a file that has rested is its time of change, which every write and every change of size
//! moves. File systems note that time in steps of up to [`STEP`], so for a file that changed a moment ago the
//! time proves nothing yet. Nothing tells when a block device was written last, and the clocks and caches of
//! network file systems are others'. In these cases the version is a number of this process's own, which
//! holds only while somebody here has the file open, and so its locks.

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

/// The longest step of the time of change on file systems of this host, two seconds on FAT, and some more.
const STEP: Duration = Duration::from_secs(3);
/// File systems whose times of change are not this host's, or not kept: FAT, NFS, SMB and CIFS, FUSE, 9P,
/// Ceph, AFS and Coda (`statfs(2)`).
const UNPROVEN: [i64; 9] = [
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
/// Numbers of this process's own have this bit; times of change in nanoseconds do not before the year 2262.
const OWN: u64 = 1 << 63;

/// A file at one state of its content, in whatever format it is read.
#[derive(Debug)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    version: u64,
    /// Keeps a version of this process's own for those who open the file as well.
    _open: Option<Arc<u64>>,
}

impl Identity {
    /// The identity of a file that was just opened and locked.
    pub(super) fn of(file: &File, metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            let own = own_version([metadata.rdev(), 0, 0, 0], || None);
            // No file system has this device number.
            return Self { device: u64::MAX, inode: metadata.rdev(), version: *own.0, _open: own.1 };
        }
        let rests = has_rested(metadata, SystemTime::now()) && is_proven(file);
        let changed = changed(metadata);
        let key = [metadata.dev(), metadata.ino(), changed, metadata.size()];
        let version = own_version(key, || rests.then_some(changed));
        Self { device: metadata.dev(), inode: metadata.ino(), version: *version.0, _open: version.1 }
    }

    /// What its blocks are known by, read in a format.
    pub(super) fn image(&self, format: Format) -> ImageId {
        ImageId::new(self.device, self.inode, self.version, format)
    }
}

/// The time of change in nanoseconds.
fn changed(metadata: &Metadata) -> u64 {
    let seconds = metadata.ctime() as u64;
    seconds.wrapping_mul(1_000_000_000).wrapping_add(metadata.ctime_nsec() as u64) & !OWN
}

/// Whether the next change of the file is bound to have another time.
fn has_rested(metadata: &Metadata, now: SystemTime) -> bool {
    let changed = SystemTime::UNIX_EPOCH + Duration::from_nanos(changed(metadata));
    // A time to come is a clock that was set back.
    now.duration_since(changed).is_ok_and(|age| age >= STEP)
}

/// Whether the file system keeps times of change by this host's clock.
fn is_proven(file: &File) -> bool {
    let mut answer = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the answer is as large as the kernel takes it to be.
    if unsafe { libc::fstatfs(file.as_raw_fd(), answer.as_mut_ptr()) } < 0 {
        return false;
    }
    // SAFETY: all zeroes are a value of this type, and so is what the kernel has made of them.
    let kind = unsafe { answer.assume_init() }.f_type;
    !UNPROVEN.contains(&(kind & 0xffff_ffff))
}

/// Versions of this process's own by what is known of the file, and the last one given out.
#[derive(Default)]
struct Versions {
    last: u64,
    open: HashMap<[u64; 4], Weak<u64>>,
}

static VERSIONS: Mutex<Option<Versions>> = Mutex::new(None);

/// The version that the file has for those who have it open already; else the one that `proven` knows; else
/// one that it never had.
fn own_version(key: [u64; 4], proven: impl FnOnce() -> Option<u64>) -> (Arc<u64>, Option<Arc<u64>>) {
    let mut versions = VERSIONS.lock().unwrap_or_else(PoisonError::into_inner);
    let Versions { last, open } = versions.get_or_insert_default();
    open.retain(|_, version| version.strong_count() > 0);
    if let Some(version) = open.get(&key).and_then(Weak::upgrade) {
        return (version.clone(), Some(version));
    }
    if let Some(version) = proven() {
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
        assert!(!has_rested(&metadata, changed - Duration::from_secs(60)));
        assert!(!has_rested(&metadata, changed + Duration::from_secs(1)));
        assert!(has_rested(&metadata, changed + STEP));
    }
}
