//! Memory images in files: raw images, ELF cores, and files of LiME.
//!
//! A hole in a sparse file is never read and counts as untouched memory. Files are not trusted: each fault is
//! an error that names it.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::oracle::{Image, PAGE_SIZE, TooManyPages};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use thiserror::Error;

use super::elf::{self, CoreError};
use super::foreign;
use super::lime::{self, LimeError};
use super::progress::Progress;
use crate::args::ImageFormatArg;

const PAGE: u64 = PAGE_SIZE as u64;
/// Bytes to read at a time: whole pages.
const CHUNK: usize = 1 << 20;

/// The reason why an image cannot be read.
#[derive(Debug, Error)]
pub(super) enum ImageError {
    #[error("it cannot be opened: {0}")]
    Open(io::Error),
    #[error("it is {0}: give a file with a memory image, or a running VM with --pid")]
    Kind(&'static str),
    #[error("it is empty: there is no memory in it")]
    Empty,
    #[error("it is {0}: {1}")]
    Format(&'static str, &'static str),
    #[error("it does not begin like {0}; leave out --format, or use another one")]
    NotAsSaid(&'static str),
    #[error(
        "it is {0} bytes long, which is not a whole number of pages of 4,096 bytes: it is truncated, or not \
         a raw memory image"
    )]
    Length(u64),
    #[error(transparent)]
    Core(#[from] CoreError),
    #[error(transparent)]
    Lime(#[from] LimeError),
    #[error("reading {bytes} bytes at offset {offset} failed: {error}")]
    Read { offset: u64, bytes: usize, error: io::Error },
    #[error(transparent)]
    TooManyPages(#[from] TooManyPages),
}

/// A part of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// The address in memory.
    pub(super) address: u64,
    /// The offset in the file.
    pub(super) offset: u64,
    /// The number of stored bytes.
    pub(super) stored: u64,
    /// The number of following bytes that are not in the file.
    pub(super) absent: u64,
}

/// The format of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Raw memory.
    Raw,
    /// An ELF core.
    Core,
    /// Ranges with headers.
    Lime,
}

/// An open and valid image.
#[derive(Debug)]
pub(super) struct FileImage {
    file: File,
    format: Format,
    regions: Vec<Region>,
    /// Device and inode of the file.
    identity: (u64, u64),
}

impl FileImage {
    /// Opens an image and reads its headers, in the given format. `least` is the size in bytes of the
    /// smallest mapping that counts in the core of a process.
    pub(super) fn open(path: &Path, said: ImageFormatArg, least: u64) -> Result<Self, ImageError> {
        // Opening a FIFO would block, so check the kind first.
        let metadata = std::fs::metadata(path).map_err(ImageError::Open)?;
        if metadata.is_dir() {
            return Err(ImageError::Kind("a directory"));
        }
        if !metadata.is_file() {
            return Err(ImageError::Kind("not a regular file"));
        }
        let file = File::open(path).map_err(ImageError::Open)?;
        let metadata = file.metadata().map_err(ImageError::Open)?;
        let (length, identity) = (metadata.len(), (metadata.dev(), metadata.ino()));
        if length == 0 {
            return Err(ImageError::Empty);
        }
        let mut head = [0; foreign::HEAD];
        let head = &mut head[..length.min(foreign::HEAD as u64) as usize];
        read(&file, head, 0)?;
        let format = recognise(head, said)?;
        let regions = match format {
            Format::Core => elf::regions(&file, length, least)?,
            Format::Lime => lime::regions(&file, length)?,
            Format::Raw if !length.is_multiple_of(PAGE) => return Err(ImageError::Length(length)),
            Format::Raw => vec![Region { address: 0, offset: 0, stored: length, absent: 0 }],
        };
        Ok(Self { file, format, regions, identity })
    }

    /// Returns a value that only the same file has.
    pub(super) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Returns the format of the file.
    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// Returns the amount of memory to process, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.stored).sum()
    }

    /// Reads the memory, in guest order.
    pub(super) fn feed(&self, image: &mut Image<'_>, progress: &mut Progress) -> Result<(), ImageError> {
        let mut buffer = vec![0; CHUNK];
        let mut end = None;
        for region in &self.regions {
            if end != Some(region.address) {
                image.gap();
            }
            self.stored(region, &mut buffer, image, progress)?;
            // An incomplete page counts as not dumped.
            let unread = (region.stored % PAGE).saturating_add(region.absent).div_ceil(PAGE);
            image.unread(unread);
            end = region.address.checked_add(region.stored).and_then(|end| end.checked_add(region.absent));
        }
        Ok(())
    }

    fn stored(
        &self,
        region: &Region,
        buffer: &mut [u8],
        image: &mut Image<'_>,
        progress: &mut Progress,
    ) -> Result<(), ImageError> {
        let mut position = region.offset;
        let end = region.offset + (region.stored - region.stored % PAGE);
        while position < end {
            let data = self.next(SeekFrom::Data(position), end)?.clamp(position, end);
            let hole = (data - position) / PAGE;
            image.untouched(hole);
            progress.add(hole * PAGE);
            position += hole * PAGE;
            if position == end {
                break;
            }
            let hole = self.next(SeekFrom::Hole(data.max(position)), end)?.clamp(position + 1, end);
            // Pages need not be aligned in the file, so a page may end within the hole.
            let data_end = position + (hole - position).next_multiple_of(PAGE);
            while position < data_end {
                let buffer = &mut buffer[..(data_end - position).min(CHUNK as u64) as usize];
                read(&self.file, buffer, position)?;
                for page in buffer.as_chunks::<PAGE_SIZE>().0 {
                    image.page(page)?;
                }
                position += buffer.len() as u64;
                progress.add(buffer.len() as u64);
            }
        }
        Ok(())
    }

    /// Returns the next start of data or of a hole, or `end` if there is none or the file system does not
    /// support holes.
    fn next(&self, what: SeekFrom, end: u64) -> Result<u64, ImageError> {
        let (SeekFrom::Data(from) | SeekFrom::Hole(from)) = what else { return Ok(end) };
        match seek(&self.file, what) {
            Ok(found) => Ok(found),
            // No data follows.
            Err(Errno::NXIO) => Ok(end),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                Ok(if matches!(what, SeekFrom::Data(_)) { from } else { end })
            }
            Err(error) => Err(ImageError::Read { offset: from, bytes: 0, error: error.into() }),
        }
    }
}

/// Returns the format of a file with these first bytes, given the format that the user chose.
fn recognise(head: &[u8], said: ImageFormatArg) -> Result<Format, ImageError> {
    let (is_elf, is_lime) = (head.starts_with(elf::MAGIC), head.starts_with(lime::MAGIC));
    match said {
        ImageFormatArg::Raw => Ok(Format::Raw),
        ImageFormatArg::Elf if is_elf => Ok(Format::Core),
        ImageFormatArg::Elf => Err(ImageError::NotAsSaid("an ELF core")),
        ImageFormatArg::Lime if is_lime => Ok(Format::Lime),
        ImageFormatArg::Lime => Err(ImageError::NotAsSaid("memory of LiME's")),
        ImageFormatArg::Auto if is_elf => Ok(Format::Core),
        ImageFormatArg::Auto if is_lime => Ok(Format::Lime),
        ImageFormatArg::Auto => match foreign::name(head) {
            Some((what, help)) => Err(ImageError::Format(what, help)),
            None => Ok(Format::Raw),
        },
    }
}

fn read(file: &File, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
    file.read_exact_at(buffer, offset).map_err(|error| {
        let error = if error.kind() == io::ErrorKind::UnexpectedEof {
            io::Error::new(error.kind(), "the file became shorter while it was read")
        } else {
            error
        };
        ImageError::Read { offset, bytes: buffer.len(), error }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{Oracle, Report};
    use std::io::{Seek, Write};
    use tempfile::NamedTempFile;

    fn analyze(image: &FileImage) -> Report {
        let mut oracle = Oracle::new().unwrap();
        image.feed(&mut oracle.image("test"), &mut Progress::off()).unwrap();
        oracle.report()
    }

    #[test]
    fn holes_are_not_read() {
        let mut file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 40).unwrap();
        file.seek(io::SeekFrom::Start(1 << 39)).unwrap();
        file.write_all(&[1; 2 * PAGE_SIZE]).unwrap();
        let image = FileImage::open(file.path(), ImageFormatArg::Auto, 0).unwrap();
        let total = analyze(&image).total;
        assert_eq!((total.pages, total.within), (1 << 28, 2));
        assert_eq!(total.untouched + total.zero + 2, 1 << 28);
        // File systems store some zeros around data at most.
        assert!(total.zero < 64, "{total:?}");
    }

    #[test]
    fn pages_may_lie_anywhere_in_the_file() {
        let mut file = NamedTempFile::new().unwrap();
        file.as_file().set_len(10 << 20).unwrap();
        file.seek(io::SeekFrom::Start((1 << 20) + 100)).unwrap();
        file.write_all(&[1; 2 * PAGE_SIZE]).unwrap();
        for offset in [100, 100 + PAGE, 50, 4095] {
            let region = Region { address: 0, offset, stored: 4 << 20, absent: PAGE };
            let file = file.reopen().unwrap();
            let image = FileImage { file, format: Format::Core, regions: vec![region], identity: (0, 0) };
            let total = analyze(&image).total;
            assert_eq!((total.pages, total.unread), (1025, 1), "{offset}");
            let whole = (offset % PAGE) == 100;
            assert_eq!(total.within, if whole { 2 } else { 0 }, "{offset}: {total:?}");
            assert_eq!(total.unique + total.within, if whole { 2 } else { 3 }, "{offset}: {total:?}");
        }
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let file = |content: &[u8]| {
            let mut file = NamedTempFile::new().unwrap();
            file.write_all(content).unwrap();
            FileImage::open(file.path(), ImageFormatArg::Auto, 0).map(drop)
        };
        let open = |path: &str| FileImage::open(Path::new(path), ImageFormatArg::Auto, 0);
        assert!(matches!(file(b""), Err(ImageError::Empty)));
        assert!(matches!(file(&[1; 4095]), Err(ImageError::Length(4095))));
        assert!(matches!(file(b"\x7fELF"), Err(ImageError::Core(CoreError::Truncated(_)))));
        assert!(matches!(file(&[b"KDUMP   ", &[0; 4088][..]].concat()), Err(ImageError::Format(..))));
        assert!(matches!(open("/"), Err(ImageError::Kind("a directory"))));
        assert!(matches!(open("/dev/zero"), Err(ImageError::Kind(_))));
        assert!(matches!(open("/no/such/file"), Err(ImageError::Open(_))));
    }

    #[test]
    fn what_is_said_to_be_raw_is_read_as_it_is() {
        let mut file = NamedTempFile::new().unwrap();
        // As QEMU's pmemsave writes it of a machine whose kernel lies at its beginning.
        let mut program = [0; 2 * PAGE_SIZE];
        program[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
        file.write_all(&program).unwrap();
        let open = |said| FileImage::open(file.path(), said, 0);
        let refused = open(ImageFormatArg::Auto).unwrap_err();
        assert!(refused.to_string().contains("--format raw"), "{refused}");
        let total = analyze(&open(ImageFormatArg::Raw).unwrap()).total;
        assert_eq!((total.pages, total.unique, total.zero), (2, 1, 1));
        assert!(matches!(open(ImageFormatArg::Elf), Err(ImageError::Core(CoreError::NoCore(2)))));
        assert!(matches!(open(ImageFormatArg::Lime), Err(ImageError::NotAsSaid(_))));
    }
}
