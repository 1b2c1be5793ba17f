//! Opens the files that images lie in: what they are, who else uses them, how they can be accessed.
//!
//! A file is [locked](super::locks) as long as it is open: it has one writer or any number of readers. A block
//! device opened for writing is claimed from the kernel as well (`O_EXCL`), so a mounted one is refused.

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

/// Why a file cannot be a disk, or part of one.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be opened as asked.
    #[error("open disk {path} for {access}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// "reading" or "reading and writing".
        access: &'static str,
        /// Error of the system call.
        source: io::Error,
    },
    /// The file's kind, size or content could not be found out, or it could not be locked.
    #[error("{action} disk {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
    /// Somebody else uses the file in a way that excludes this one.
    #[error(
        "lock disk {path} for {access}: it is in use: {user}; end that use first, or make a copy or an overlay \
         for this VM. A disk has one writer or any number of readers"
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// "reading" or "reading and writing".
        access: &'static str,
        /// Who uses it, and how.
        user: String,
    },
    /// A directory, a pipe, a socket or a character device.
    #[error("open disk {path}: it is {kind}; give a regular file or a block device")]
    NotADisk {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Not a whole number of sectors, or none.
    #[error(
        "open disk {path}: its size of {size} bytes is not a positive multiple of 512; resize it (truncate -s)"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// A disk whose format was not given, and which it would be dangerous to guess.
    #[error("open disk {path}: {reason}; add format=qcow2 or format=raw")]
    Format {
        /// The file.
        path: PathBuf,
        /// Why it is not guessed.
        reason: &'static str,
    },
    /// A qcow2 image that is damaged or uses what is not supported.
    #[error("open qcow2 image {path}: {reason}")]
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Something that an image refers to.
    #[error("{path} is backed by another image: {source}")]
    Backing {
        /// The image that refers to it.
        path: PathBuf,
        /// What is wrong with the other one.
        source: Box<OpenError>,
    },
}

/// Why a disk keeps the size that it had.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The file's size cannot be found out.
    #[error("measure disk {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
    /// Another file has its name.
    #[error(
        "resize disk {path}: the path leads to another file now, but the VM uses the earlier file; stop the \
         VM and start it again to use the new file"
    )]
    Replaced {
        /// The file's name.
        path: PathBuf,
    },
    /// Not a whole number of the pieces that the disk is accessed in.
    #[error(
        "resize disk {path}: its size of {size} bytes is not a positive multiple of {unit}; \
         resize it again (truncate -s)"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// In bytes.
        unit: u64,
    },
}

/// What direct I/O on a file has to keep to, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirectAlignment {
    /// Of addresses in memory.
    pub(crate) memory: u32,
    /// Of offsets and lengths.
    pub(crate) offset: u32,
}

/// An open and locked file.
#[derive(Debug)]
pub(crate) struct ImageFile {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) metadata: Metadata,
    /// In bytes.
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

        // Opening a pipe must not wait for its other end. O_EXCL without O_CREAT concerns block devices
        // alone.
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

        // O_NONBLOCK has done its work, and io_uring would take it for a wish to fail early.
        set_flags(&file, |flags| flags & !libc::O_NONBLOCK).map_err(failed("inspect"))?;
        // From here on nobody else writes it. The end of a block device is found by seeking; its metadata
        // has no size.
        let metadata = file.metadata().map_err(failed("inspect"))?;
        let size = file.seek(SeekFrom::End(0)).map_err(failed("measure"))?;
        let identity = Identity::of(&file, &metadata);
        Ok(Self { path: path.to_owned(), file, metadata, size, read_only, identity })
    }

    /// What blocks that lie in it are known by, read in a format.
    pub(crate) fn id(&self, format: Format) -> ImageId {
        self.identity.image(format)
    }

    /// Whether the file begins as qcow2 images do.
    pub(crate) fn looks_like_qcow2(&self) -> Result<bool, OpenError> {
        let mut magic = [0; 4];
        match self.file.read_exact_at(&mut magic, 0) {
            Ok(()) => Ok(magic == *b"QFI\xfb"),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(source) => Err(OpenError::Io { action: "read", path: self.path.clone(), source }),
        }
    }

    /// What reads and writes past the page cache have to keep to; none where the file system has no such
    /// thing.
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

    /// Has reads and writes go past the page cache from now on, if the file system can do that.
    pub(crate) fn use_direct_io(&self) -> Result<bool, OpenError> {
        match set_flags(&self.file, |flags| flags | libc::O_DIRECT) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(source) => Err(OpenError::Io { action: "inspect", path: self.path.clone(), source }),
        }
    }

    /// Bytes of the file now, if it is still the one that its name refers to.
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
        // Reads and writes say where; nothing else depends on the file's position.
        (&self.file).seek(SeekFrom::End(0)).map_err(failed)
    }

    /// Checks that the file is a whole number of sectors.
    pub(crate) fn check_sectors(&self) -> Result<(), OpenError> {
        if self.size == 0 || !self.size.is_multiple_of(SECTOR_SIZE) {
            return Err(OpenError::Size { path: self.path.clone(), size: self.size });
        }
        Ok(())
    }

    /// The file system's preferred block, as far as it is fit to be told to a guest.
    pub(crate) fn preferred_block_size(&self) -> u32 {
        match u32::try_from(self.metadata.blksize()) {
            Ok(size) if size.is_power_of_two() && (512..=65536).contains(&size) => size,
            _ => 4096,
        }
    }

    /// Whether storage can be given back, found out without a change to the file.
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
    /// What reads and writes the file through a copy of the descriptor is gone by now: images drop it last.
    fn drop(&mut self) {
        locks::unlock(&self.file, lock_for(self.read_only));
    }
}

fn lock_for(read_only: bool) -> Access {
    if read_only { Access::Reading } else { Access::Writing }
}

/// `fallocate(2)`.
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

/// What the file system says about direct I/O on a file; an offset alignment of 0 if there is none. Linux
/// before 6.1 and some file systems say nothing.
fn stated_alignment(file: &File) -> io::Result<Option<DirectAlignment>> {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, and the answer is as large as the kernel takes it to be.
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
    // SAFETY: all zeroes are a value of this type, and so is what the kernel has made of them.
    let answer = unsafe { answer.assume_init() };
    let stated = answer.stx_mask & libc::STATX_DIOALIGN != 0;
    Ok(stated.then_some(DirectAlignment {
        memory: answer.stx_dio_mem_align.max(1),
        offset: answer.stx_dio_offset_align,
    }))
}

/// The unit of a block device, or for a file what suits every device that it may lie on.
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
