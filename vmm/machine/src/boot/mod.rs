//! Puts a kernel, its initrd and its boot structures into guest memory.
//!
//! Three kinds of image boot: an ELF file with a PVH note, a plain 64-bit ELF file, and a bzImage with a
//! 64-bit entry. The ELF file inside a bzImage is unpacked here, so that the guest need not do it. Errors name other known formats, and tell how to get a kernel from them. Images are
//! untrusted: every address and length is checked against the file and against guest RAM before anything is
//! copied.

mod bzimage;
mod foreign;
pub(crate) mod image;
pub(crate) mod load;
mod notes;
pub(crate) mod params;
#[cfg(any(test, feature = "test-images"))]
pub mod test_images;
mod unpack;
mod unpacked;

pub use load::{BootError, Description, Entry, describe};

use std::borrow::Cow;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::PathBuf;

use thiserror::Error;
pub(crate) use unpacked::Unpacked;
use unpacked::{Identity, Payload};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// The source of the bytes of a kernel or an initrd.
#[derive(Debug, Clone)]
pub enum ImageSource {
    /// A file, read directly into guest memory when the VM is built.
    Path(PathBuf),
    /// Bytes in the program itself.
    Bytes {
        /// The name in error messages.
        name: &'static str,
        /// The image, with the same bytes as a file.
        bytes: Cow<'static, [u8]>,
    },
}

impl fmt::Display for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageSource::Path(path) => path.display().fmt(f),
            ImageSource::Bytes { name, .. } => f.write_str(name),
        }
    }
}

impl From<PathBuf> for ImageSource {
    fn from(path: PathBuf) -> Self {
        ImageSource::Path(path)
    }
}

/// A fault of an image, or of an image in a VM of this size. Sizes are in bytes.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file could not be opened or read.
    #[error("cannot read it: {0}")]
    Read(#[from] io::Error),
    /// The file is not a kernel of a supported kind.
    #[error("it is {what}: {help}")]
    NotAKernel {
        /// The kind of the file.
        what: String,
        /// How to get a kernel.
        help: String,
    },
    /// A header contradicts itself.
    #[error("its headers are damaged: {0}")]
    Malformed(String),
    /// The file ends before data that its headers refer to.
    #[error("it is truncated: {what} ends at byte {end}, the file at {length}; copy the file again")]
    Truncated {
        /// The missing data.
        what: String,
        /// The end of that data.
        end: u64,
        /// The end of the file.
        length: u64,
    },
    /// A part of the kernel would lie outside RAM.
    #[error(
        "{what} must lie at {start:#x}-{end:#x}, but usable RAM ends at {ram_end:#x}; \
         give the VM more memory"
    )]
    OutsideRam {
        /// The part.
        what: String,
        /// The first address.
        start: u64,
        /// The address after the last byte.
        end: u64,
        /// The end of RAM below 4 GiB.
        ram_end: u64,
    },
    /// A part of the kernel would overwrite the boot structures.
    #[error("{what} must lie at {start:#x}, below 1 MiB, where the boot structures are")]
    OverBootStructures {
        /// The part.
        what: String,
        /// The first address.
        start: u64,
    },
    /// The kernel in a bzImage cannot be unpacked.
    #[error(
        "its compressed kernel ({compression}) cannot be unpacked: {reason}; copy the file again, or give the \
         vmlinux that it was made from"
    )]
    CannotUnpack {
        /// The name of the compression.
        compression: String,
        /// The fault.
        reason: String,
    },
    /// The kernel in a bzImage is larger than RAM.
    #[error("it unpacks to {size} bytes, but usable RAM ends at {ram_end:#x}; give the VM more memory")]
    UnpackedTooLarge {
        /// The size in bytes.
        size: u64,
        /// The end of RAM below 4 GiB.
        ram_end: u64,
    },
    /// The initrd does not fit above the kernel.
    #[error(
        "the initrd of {size} bytes does not fit between the kernel's end at {kernel_end:#x} and {limit:#x}; \
         give the VM more memory"
    )]
    InitrdTooLarge {
        /// The size in bytes.
        size: u64,
        /// The first address after the kernel.
        kernel_end: u64,
        /// The address at which the initrd must end.
        limit: u64,
    },
    /// The initrd has no content.
    #[error("it is empty; leave out --initrd to boot without one")]
    EmptyInitrd,
    /// The command line is longer than the kernel's limit.
    #[error(
        "the kernel accepts a command line of {limit} bytes at most; this one has {length}, and parameters for devices \
         add {added}; shorten it"
    )]
    CommandLineTooLong {
        /// Length of the configured command line, in bytes.
        length: usize,
        /// Length of the parameters for devices, in bytes.
        added: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The command line contains characters that no kernel parameter can contain.
    #[error("the kernel's command line contains {0:?}; it can hold printable ASCII only")]
    CommandLineCharacter(char),
    /// The loader refused an image that passed the checks before, or the file changed meanwhile.
    #[error("cannot load it: {0}")]
    Load(#[from] linux_loader::loader::Error),
    /// Guest memory could not be written.
    #[error("cannot write {what} to guest memory: {source}")]
    GuestMemory {
        /// The data to write.
        what: &'static str,
        /// The error of vm-memory.
        source: vm_memory::GuestMemoryError,
    },
}

/// An open image: a reader with a known length.
pub(crate) struct OpenImage<'a> {
    reader: Reader<'a>,
    length: u64,
}

enum Reader<'a> {
    File(File),
    Bytes(Cursor<&'a [u8]>),
    Unpacked(Cursor<Unpacked>),
}

impl ImageSource {
    pub(crate) fn open(&self) -> Result<OpenImage<'_>, ImageError> {
        match self {
            ImageSource::Path(path) => {
                // Check this before opening: opening a FIFO would wait for its writer.
                let metadata = fs::metadata(path)?;
                if !metadata.is_file() {
                    return Err(io::Error::other("it is not a regular file").into());
                }
                Ok(OpenImage { reader: Reader::File(File::open(path)?), length: metadata.len() })
            }
            ImageSource::Bytes { bytes, .. } => {
                Ok(OpenImage { reader: Reader::Bytes(Cursor::new(bytes)), length: bytes.len() as u64 })
            }
        }
    }
}

impl OpenImage<'_> {
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Replaces this image, a bzImage, by the kernel that it holds.
    fn unpack(&mut self, payload: Payload) -> Result<(), ImageError> {
        let identity = match &self.reader {
            Reader::File(file) => Some(Identity::of(file)?),
            Reader::Bytes(_) | Reader::Unpacked(_) => None,
        };
        let read = || self.read_at(payload.offset, payload.bytes as usize);
        let unpacked = Unpacked::of(identity, payload, read)?;
        self.length = unpacked.as_ref().len() as u64;
        self.reader = Reader::Unpacked(Cursor::new(unpacked));
        Ok(())
    }

    /// Returns the kernel that was unpacked from this image, if it was one.
    pub(crate) fn unpacked(&self) -> Option<&Unpacked> {
        match &self.reader {
            Reader::Unpacked(unpacked) => Some(unpacked.get_ref()),
            Reader::File(_) | Reader::Bytes(_) => None,
        }
    }

    /// Reads up to `length` bytes from `offset` on, and fewer at the end of the image.
    pub(crate) fn read_at(&mut self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let length = self.length.saturating_sub(offset).min(length as u64) as usize;
        let mut buffer = vec![0; length];
        self.seek(SeekFrom::Start(offset))?;
        self.read_exact(&mut buffer)?;
        Ok(buffer)
    }
}

impl Read for OpenImage<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.reader {
            Reader::File(file) => file.read(buffer),
            Reader::Bytes(bytes) => bytes.read(buffer),
            Reader::Unpacked(kernel) => kernel.read(buffer),
        }
    }
}

impl Seek for OpenImage<'_> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        match &mut self.reader {
            Reader::File(file) => file.seek(position),
            Reader::Bytes(bytes) => bytes.seek(position),
            Reader::Unpacked(kernel) => kernel.seek(position),
        }
    }
}

impl ReadVolatile for OpenImage<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        match &mut self.reader {
            Reader::File(file) => file.read_volatile(buffer),
            Reader::Bytes(bytes) => bytes.read_volatile(buffer),
            Reader::Unpacked(kernel) => kernel.read_volatile(buffer),
        }
    }
}
