//! Unpacked kernels, which VMs that are built at the same time share.
//!
//! Ten VMs with one kernel unpack it once: whoever validates a VM holds the unpacked kernel until the VM is built.
//! Nothing holds it longer, since it would be memory that no guest uses. A file counts as the same as long as its
//! device, inode, size and times are.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use super::ImageError;
use super::unpack::{Compression, unpack};

/// A compressed kernel in a bzImage. Offset and length in the file are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Payload {
    pub(super) compression: Compression,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// Declared length of the unpacked kernel.
    pub(super) unpacked: u64,
}

/// What tells a file from all others, and its content from earlier ones.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds of the last write, and of the last change of the inode.
    times: [i64; 4],
}

impl Identity {
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            times: [metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()],
        })
    }
}

/// A file's kernel, filled by the first who needs it. The others wait. Bytes without a file have no identity.
#[derive(Debug)]
struct Slot {
    identity: Option<Identity>,
    kernel: OnceLock<Result<Vec<u8>, String>>,
}

/// The slots that somebody holds. They depend on files alone, so all VMs of the process may use them.
static SLOTS: Mutex<Vec<Weak<Slot>>> = Mutex::new(Vec::new());

/// An unpacked kernel. As long as it is held, others need not unpack the same file.
#[derive(Debug, Clone)]
pub(crate) struct Unpacked(Arc<Slot>);

impl Unpacked {
    /// Returns the kernel of the file with this identity. `read` reads the payload, if nobody has unpacked it.
    ///
    /// # Errors
    /// Fails if the payload cannot be read or unpacked.
    pub(super) fn of(
        identity: Option<Identity>,
        payload: Payload,
        read: impl FnOnce() -> io::Result<Vec<u8>>,
    ) -> Result<Self, ImageError> {
        let slot = find_or_add(identity);
        let kernel = slot.kernel.get_or_init(|| {
            let kernel =
                read().and_then(|packed| unpack(payload.compression, packed, payload.unpacked as usize));
            kernel.map_err(|error| error.to_string())
        });
        match kernel {
            Ok(_) => Ok(Self(slot)),
            Err(reason) => {
                let compression = payload.compression.to_string();
                Err(ImageError::CannotUnpack { compression, reason: reason.clone() })
            }
        }
    }
}

impl AsRef<[u8]> for Unpacked {
    fn as_ref(&self) -> &[u8] {
        // It was made with a filled slot.
        self.0.kernel.get().and_then(|kernel| kernel.as_deref().ok()).unwrap_or_default()
    }
}

fn find_or_add(identity: Option<Identity>) -> Arc<Slot> {
    let mut slots = SLOTS.lock();
    slots.retain(|slot| slot.strong_count() > 0);
    let held = || slots.iter().filter_map(Weak::upgrade).find(|slot| slot.identity == identity);
    if let Some(slot) = identity.is_some().then(held).flatten() {
        return slot;
    }
    let slot = Arc::new(Slot { identity, kernel: OnceLock::new() });
    slots.push(Arc::downgrade(&slot));
    slot
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::test_images::pack;
    use super::*;

    fn payload_of(packed: &[u8], unpacked: usize) -> Payload {
        let compression = Compression::of(packed).unwrap();
        Payload { compression, offset: 0, bytes: packed.len() as u64, unpacked: unpacked as u64 }
    }

    #[test]
    fn a_file_is_unpacked_once_while_somebody_holds_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let packed = pack("gzip", b"\x7fELF");
        let payload = payload_of(&packed, 4);
        let reads = AtomicUsize::new(0);
        let get = || {
            Unpacked::of(Some(Identity::of(file.as_file()).unwrap()), payload, || {
                reads.fetch_add(1, Ordering::Relaxed);
                Ok(packed.clone())
            })
        };
        let first = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(get)).collect();
            let all: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect();
            all.into_iter().next_back().unwrap()
        });
        assert_eq!((first.as_ref(), reads.load(Ordering::Relaxed)), (&b"\x7fELF"[..], 1));
        // Another content is another file.
        std::fs::write(file.path(), "changed").unwrap();
        drop(get().unwrap());
        assert_eq!(reads.load(Ordering::Relaxed), 2);
        // What nobody holds is gone.
        drop(first);
        drop(get().unwrap());
        assert_eq!(reads.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn bytes_without_a_file_are_shared_with_nobody() {
        let [one, two] = [b"one", b"two"].map(|content| {
            let packed = pack("gzip", content);
            Unpacked::of(None, payload_of(&packed, 3), || Ok(packed.clone())).unwrap()
        });
        assert_eq!((one.as_ref(), two.as_ref()), (&b"one"[..], &b"two"[..]));
    }

    #[test]
    fn errors_name_the_compression() {
        let mut packed = pack("zstd", b"\x7fELF");
        let payload = payload_of(&packed, 4);
        packed[10] ^= 0xff;
        let error = Unpacked::of(None, payload, || Ok(packed)).unwrap_err().to_string();
        assert!(error.contains("zstd") && error.contains("copy the file again"), "{error}");
    }
}
