//! Opens the files of images: finds their kind, their other users and the possible ways of access.
//!
//! A file stays [locked](super::locks) while it is open: it has one writer or any number of readers. A block
//! device opened for writing is also claimed from the kernel (`O_EXCL`), so a mounted device is refused.

#![expect(unsafe_code, reason = "statx, fcntl and ioctl have no safe form for what is asked here")]

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Format;
use super::cache::ImageId;
use super::identity::Identity;
use super::image::SECTOR_SIZE;
use super::locks::{self, Access, LockError};

/// The reason why a file cannot be a disk, or part of a disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be opened for this access.
    #[error("open disk {path} for {access}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// "reading" or "reading and writing".
        access: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
    /// The file's kind, size or content could not be found out, or the file could not be locked.
    #[error("{action} disk {path}: {source}")]
    Io {
        /// The action that failed.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// Another program uses the file in a conflicting way.
    #[error(
        "lock disk {path} for {access}: it is in use: {user}; end that use first, or make a copy or an overlay \
         for this VM. A disk has one writer or any number of readers"
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// "reading" or "reading and writing".
        access: &'static str,
        /// The other user, and how it uses the file.
        user: String,
    },
    /// A directory, a pipe, a socket or a character device.
    #[error("open disk {path}: it is {kind}; give a regular file or a block device")]
    NotADisk {
        /// The file.
        path: PathBuf,
        /// The kind of the file.
        kind: &'static str,
    },
    /// The size is zero or not a whole number of sectors.
    #[error(
        "open disk {path}: its size of {size} bytes is not a positive multiple of 512; resize it (truncate -s)"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The user gave no format, and a wrong guess would be dangerous.
    #[error("open disk {path}: {reason}; add format=qcow2 or format=raw")]
    Format {
        /// The file.
        path: PathBuf,
        /// The reason why the format is not guessed.
        reason: &'static str,
    },
    /// A qcow2 image that is damaged or uses unsupported features.
    #[error("open qcow2 image {path}: {reason}")]
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// The fault of the image.
        reason: String,
    },
    /// A qcow2 image could not be created.
    #[error("create qcow2 image {path}: {reason}")]
    Create {
        /// The file.
        path: PathBuf,
        /// What went wrong, and what to do.
        reason: String,
    },
    /// A fault of a backing image.
    #[error("{path} is backed by another image: {source}")]
    Backing {
        /// The image that refers to the backing image.
        path: PathBuf,
        /// The fault of the backing image.
        source: Box<OpenError>,
    },
}

/// The reason why a disk keeps its earlier size.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The file's size cannot be found out.
    #[error("measure disk {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The path now refers to another file.
    #[error(
        "resize disk {path}: the path leads to another file now, but the VM uses the earlier file; stop the \
         VM and start it again to use the new file"
    )]
    Replaced {
        /// The path.
        path: PathBuf,
    },
    /// The size is zero or not a multiple of the disk's unit of access.
    #[error(
        "resize disk {path}: its size of {size} bytes is not a positive multiple of {unit}; \
         resize it again (truncate -s)"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The unit of access, in bytes.
        unit: u64,
    },
}

/// The alignment that direct I/O on a file requires, in bytes. Both values are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirectAlignment {
    /// Alignment of addresses in memory.
    pub(crate) memory: u32,
    /// Alignment of offsets and lengths.
    pub(crate) offset: u32,
}

/// An open and locked file.
#[derive(Debug)]
pub(crate) struct ImageFile {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) metadata: Metadata,
    /// The size in bytes.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    identity: Identity,
}

impl ImageFile {
    /// Opens and locks the file at `path`.
    pub(crate) fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let access = if read_only { "reading" } else { "reading and writing" };
        let in_use = |user| OpenError::InUse { path: path.to_owned(), access, user };
        let failed = |action| move |source| OpenError::Io { action, path: path.to_owned(), source };

        // Opening a pipe must not wait for its other end. O_EXCL without O_CREAT affects only block devices.
        let exclusive = if read_only { 0 } else { libc::O_EXCL };
        let mut file = File::options()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK | exclusive)
            .open(path)
            .map_err(|source| match source.kind() {
                io::ErrorKind::ResourceBusy => in_use("this host has mounted or claimed it".to_owned()),
                io::ErrorKind::IsADirectory => {
                    OpenError::NotADisk { path: path.to_owned(), kind: "a directory" }
                }
                _ => OpenError::Open { path: path.to_owned(), access, source },
            })?;

        let kind = file.metadata().map_err(failed("inspect"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let kind = if kind.is_dir() { "a directory" } else { "not a file that holds data" };
            return Err(OpenError::NotADisk { path: path.to_owned(), kind });
        }
        locks::lock(&file, lock_for(read_only)).map_err(|error| match error {
            LockError::InUse(user) => in_use(user),
            LockError::Io(source) => failed("lock")(source),
        })?;

        // O_NONBLOCK is no longer needed, and io_uring would take it as a request to fail early.
        set_flags(&file, |flags| flags & !libc::O_NONBLOCK).map_err(failed("inspect"))?;
        // From here on no other program writes the file. The end of a block device is found by seeking,
        // because its metadata has no size.
        let metadata = file.metadata().map_err(failed("inspect"))?;
        let size = file.seek(SeekFrom::End(0)).map_err(failed("measure"))?;
        let identity = Identity::of(&file, &metadata);
        Ok(Self { path: path.to_owned(), file, metadata, size, read_only, identity })
    }

    /// Returns the identity of blocks in this file, read in a format.
    pub(crate) fn id(&self, format: Format) -> ImageId {
        self.identity.image(format)
    }

    /// Returns whether the file begins like a qcow2 image.
    pub(crate) fn looks_like_qcow2(&self) -> Result<bool, OpenError> {
        let mut magic = [0; 4];
        match self.file.read_exact_at(&mut magic, 0) {
            Ok(()) => Ok(magic == *b"QFI\xfb"),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(source) => Err(OpenError::Io { action: "read", path: self.path.clone(), source }),
        }
    }

    /// Returns the alignment that direct I/O requires, or `None` if the file system does not support direct
    /// I/O.
    pub(crate) fn direct_alignment(&self) -> Result<Option<DirectAlignment>, OpenError> {
        let failed = |source| OpenError::Io { action: "inspect", path: self.path.clone(), source };
        Ok(match stated_alignment(&self.file).map_err(failed)? {
            Some(alignment) => (alignment.offset > 0)
                .then_some(DirectAlignment { offset: alignment.offset.max(SECTOR_SIZE as u32), ..alignment }),
            None => {
                let block = logical_block_size(&self.file, &self.metadata);
                Some(DirectAlignment { memory: block, offset: block })
            }
        })
    }

    /// Makes reads and writes bypass the page cache, if the file system supports it. Returns whether it does.
    pub(crate) fn use_direct_io(&self) -> Result<bool, OpenError> {
        match set_flags(&self.file, |flags| flags | libc::O_DIRECT) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(source) => Err(OpenError::Io { action: "inspect", path: self.path.clone(), source }),
        }
    }

    /// Returns the present size of the file in bytes, if the path still refers to this file.
    pub(crate) fn measure(&self) -> Result<u64, ResizeError> {
        let failed = |source| ResizeError::Io { path: self.path.clone(), source };
        let named = std::fs::metadata(&self.path).map_err(failed)?;
        let number = |metadata: &Metadata| match metadata.file_type().is_block_device() {
            true => (u64::MAX, metadata.rdev()),
            false => (metadata.dev(), metadata.ino()),
        };
        if number(&named) != number(&self.metadata) {
            return Err(ResizeError::Replaced { path: self.path.clone() });
        }
        // Reads and writes give their own offset, so nothing depends on the file's position.
        (&self.file).seek(SeekFrom::End(0)).map_err(failed)
    }

    /// Checks that the file is a whole number of sectors.
    pub(crate) fn check_sectors(&self) -> Result<(), OpenError> {
        if self.size == 0 || !self.size.is_multiple_of(SECTOR_SIZE) {
            return Err(OpenError::Size { path: self.path.clone(), size: self.size });
        }
        Ok(())
    }

    /// Returns the file system's preferred block size in bytes, or 4096 if a guest cannot use that size.
    pub(crate) fn preferred_block_size(&self) -> u32 {
        match u32::try_from(self.metadata.blksize()) {
            Ok(size) if size.is_power_of_two() && (512..=65536).contains(&size) => size,
            _ => 4096,
        }
    }

    /// Returns whether storage can be freed, without a change to the file.
    pub(crate) fn can_discard(&self) -> bool {
        if self.read_only {
            return false;
        }
        if self.metadata.file_type().is_block_device() {
            let device = self.metadata.rdev();
            let (major, minor) = (libc::major(device), libc::minor(device));
            let limit = format!("/sys/dev/block/{major}:{minor}/queue/discard_max_bytes");
            return std::fs::read_to_string(limit).is_ok_and(|bytes| bytes.trim() != "0");
        }
        // A hole beyond the end of a file changes nothing.
        let start = self.size.next_multiple_of(4096);
        fallocate(&self.file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, start, 4096).is_ok()
    }
}

impl Drop for ImageFile {
    /// Users of a copy of the descriptor have finished by now, because images drop the file last.
    fn drop(&mut self) {
        locks::unlock(&self.file, lock_for(self.read_only));
    }
}

fn lock_for(read_only: bool) -> Access {
    if read_only { Access::Reading } else { Access::Writing }
}

/// Calls `fallocate(2)`, again after an interruption.
pub(crate) fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let position = |value| i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let (offset, len) = (position(offset)?, position(len)?);
    loop {
        // SAFETY: no memory is involved.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn set_flags(file: &File, change: impl FnOnce(i32) -> i32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, change(flags)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Returns the file system's statement about direct I/O on a file. An offset alignment of 0 means no direct
/// I/O. `None` if there is no statement, as in Linux before 6.1 and on some file systems.
fn stated_alignment(file: &File) -> io::Result<Option<DirectAlignment>> {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, and the answer has the size that the kernel expects.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            answer.as_mut_ptr(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeros are a valid value of this type, and so is the kernel's answer.
    let answer = unsafe { answer.assume_init() };
    let stated = answer.stx_mask & libc::STATX_DIOALIGN != 0;
    Ok(stated.then_some(DirectAlignment {
        memory: answer.stx_dio_mem_align.max(1),
        offset: answer.stx_dio_offset_align,
    }))
}

/// Returns the block size of a block device, or for a file a size that suits any device below it.
fn logical_block_size(file: &File, metadata: &Metadata) -> u32 {
    let mut size: libc::c_int = 0;
    // SAFETY: the kernel writes an int there.
    let asked = metadata.file_type().is_block_device()
        && unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut size) } == 0;
    match u32::try_from(size) {
        Ok(size) if asked && size.is_power_of_two() && size >= 512 => size,
        _ => 4096,
    }
}
