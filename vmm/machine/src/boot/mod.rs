//! Puts a kernel, its initrd and its boot structures into guest memory.
//!
//! Three kinds of image boot: an ELF with a PVH note, a plain 64-bit ELF, and a bzImage through its
//! 64-bit entry. What is known and does not boot is named, with what makes a kernel of it. Images are foreign input: every field that names an address or a length is checked
//! against the file and against guest RAM before anything is copied.

mod foreign;
pub(crate) mod image;
pub(crate) mod load;
mod notes;
pub(crate) mod params;
#[cfg(any(test, feature = "test-images"))]
pub mod test_images;

pub use load::BootError;

use std::borrow::Cow;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::PathBuf;

use thiserror::Error;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// Where the bytes of a kernel or an initrd come from.
#[derive(Debug, Clone)]
pub enum ImageSource {
    /// A file, read straight into guest memory when the VM is built.
    Path(PathBuf),
    /// Bytes held by the program itself.
    Bytes {
        /// What error texts call them.
        name: &'static str,
        /// The image, as a file would hold it.
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

/// What is wrong with an image, or with it in a VM of this size. Sizes are in bytes.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file could not be opened or read.
    #[error("cannot read it: {0}")]
    Read(#[from] io::Error),
    /// The file is no kernel of a supported kind.
    #[error("it is {what}: {help}")]
    NotAKernel {
        /// What it is.
        what: String,
        /// How to get one.
        help: String,
    },
    /// A header contradicts itself.
    #[error("its headers are damaged: {0}")]
    Malformed(String),
    /// The file ends before something its headers speak of.
    #[error("it is truncated: {what} ends at byte {end}, the file at {length}; copy the file again")]
    Truncated {
        /// What should be in the file.
        what: String,
        /// Where that would end.
        end: u64,
        /// Where the file ends.
        length: u64,
    },
    /// Part of the kernel would lie outside RAM.
    #[error(
        "{what} is to lie at {start:#x}-{end:#x}, and RAM that can hold it ends at {ram_end:#x}; \
         give the VM more memory"
    )]
    OutsideRam {
        /// Which part.
        what: String,
        /// Its first address.
        start: u64,
        /// The address behind its last.
        end: u64,
        /// The end of RAM below 4 GiB.
        ram_end: u64,
    },
    /// Part of the kernel would overwrite the boot structures.
    #[error("{what} is to lie at {start:#x}, below 1 MiB, where the boot structures are")]
    OverBootStructures {
        /// Which part.
        what: String,
        /// Its first address.
        start: u64,
    },
    /// The initrd does not fit above the kernel.
    #[error(
        "the initrd of {size} bytes does not fit between the kernel's end at {kernel_end:#x} and {limit:#x}; \
         give the VM more memory"
    )]
    InitrdTooLarge {
        /// Its size.
        size: u64,
        /// The first address behind the kernel.
        kernel_end: u64,
        /// The address it has to end at.
        limit: u64,
    },
    /// The initrd has no content.
    #[error("it is empty; leave out --initrd to boot without one")]
    EmptyInitrd,
    /// The command line is longer than the kernel takes.
    #[error(
        "the kernel takes a command line of {limit} bytes at most, this one has {length}, and parameters for devices \
         add {added}; shorten it"
    )]
    CommandLineTooLong {
        /// Its length as configured, in bytes.
        length: usize,
        /// Bytes that parameters for devices add.
        added: usize,
        /// Bytes that fit.
        limit: usize,
    },
    /// The command line has bytes that no kernel parameter can hold.
    #[error("the kernel's command line contains {0:?}; it can hold printable ASCII only")]
    CommandLineCharacter(char),
    /// The loader refused what the checks before it let pass, or the file changed meanwhile.
    #[error("cannot load it: {0}")]
    Load(#[from] linux_loader::loader::Error),
    /// Guest memory could not be written.
    #[error("cannot write {what} to guest memory: {source}")]
    GuestMemory {
        /// What was to be written.
        what: &'static str,
        /// What vm-memory said.
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
}

impl ImageSource {
    pub(crate) fn open(&self) -> Result<OpenImage<'_>, ImageError> {
        match self {
            ImageSource::Path(path) => {
                // Asked before opening: opening a FIFO would wait for its writer.
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

    /// Up to `length` bytes from `offset` on; fewer at the end of the image.
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
        }
    }
}

impl Seek for OpenImage<'_> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        match &mut self.reader {
            Reader::File(file) => file.seek(position),
            Reader::Bytes(bytes) => bytes.seek(position),
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
        }
    }
}
