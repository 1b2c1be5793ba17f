//! New qcow2 images: overlays of a backing image, and empty images.
//!
//! An image appears at its path when it is complete. If two programs create it at the same time, both use the image of
//! one of them. A backing image is locked while its size is read, so no other program writes it then.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use imago::FormatCreateBuilder;
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2CreateBuilder;

use super::super::open::{ImageFile, OpenError};
use super::super::{Format, NewImage};
use super::header::{Header, MAX_NAME};
use super::{SECTOR_SIZE, View, file_name};

/// Largest size in bytes. The first table of such an image has 32 MiB, which is QEMU's limit.
const MAX_SIZE: u64 = 1 << 51;
/// Guests' files are nobody else's business.
const MODE: u32 = 0o600;

/// A backing image, which stays locked.
struct Base {
    /// The path without links: the content of an image depends on this very file.
    path: PathBuf,
    file: ImageFile,
    format: Format,
    /// The size of its disk in bytes.
    size: u64,
}

/// The file of an image that was created, and that no guest has used yet.
#[derive(Clone, Debug)]
pub struct NewFile {
    path: PathBuf,
    /// Its device and inode.
    file: (u64, u64),
}

impl NewFile {
    /// Removes the file, which nobody needs. To be called before a guest runs.
    pub fn remove(&self) {
        // Somebody may have put another file in its place.
        let there = self.path.symlink_metadata().map(|file| (file.dev(), file.ino()));
        if there.is_ok_and(|there| there == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Creates the image at `path` if there is nothing. Returns the file if it is this call's.
pub(in super::super) fn if_missing(
    path: &Path,
    backing: Option<&Path>,
    new: &NewImage,
) -> Result<Option<NewFile>, OpenError> {
    let failed = |reason: String| OpenError::Create { path: path.to_owned(), reason };
    match path.symlink_metadata() {
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(OpenError::Io { action: "inspect", path: path.to_owned(), source }),
    }
    let of_backing = |source| OpenError::Backing { path: path.to_owned(), source: Box::new(source) };
    let base =
        backing.map(|backing| Base::open(backing, new.backing_format)).transpose().map_err(of_backing)?;
    let size = match (new.size, &base) {
        (None, None) => return Err(failed("it needs a size or a backing image".to_owned())),
        (Some(size), Some(base)) if size < base.size => {
            let (least, base) = (base.size, base.path.display());
            return Err(failed(format!(
                "{size} bytes are less than its backing image {base} has; use {least} at least"
            )));
        }
        (Some(size), _) => size,
        (None, Some(base)) => base.size,
    };
    if size == 0 || size > MAX_SIZE || !size.is_multiple_of(SECTOR_SIZE) {
        return Err(failed(format!(
            "its size of {size} bytes is not a multiple of 512 from 512 to {MAX_SIZE}"
        )));
    }
    let base = base.as_ref();
    let name = base.map(|base| base.recorded_name(path)).transpose().map_err(failed)?;
    let backing = name.zip(base.map(|base| base.format));
    write(path, size, backing).map_err(|error| failed(error.to_string()))
}

impl Base {
    fn open(path: &Path, format: Option<Format>) -> Result<Self, OpenError> {
        let file = ImageFile::open(path, true)?;
        let header = |file: &ImageFile| Header::read(file);
        let (format, size) = match format {
            Some(Format::Qcow2) => (Format::Qcow2, header(&file)?.size),
            None if file.looks_like_qcow2()? => {
                let header = header(&file)?;
                if header.backing.is_some() {
                    let reason =
                        "it looks like a qcow2 image with a backing file, but a guest could have written \
                                  these bytes to a raw disk; add backing-format=qcow2 or backing-format=raw"
                            .to_owned();
                    return Err(OpenError::Qcow2 { path: path.to_owned(), reason });
                }
                (Format::Qcow2, header.size)
            }
            Some(Format::Raw) | None => {
                file.check_sectors()?;
                (Format::Raw, file.size)
            }
        };
        let failed = |source| OpenError::Io { action: "inspect", path: path.to_owned(), source };
        Ok(Self { path: path.canonicalize().map_err(failed)?, file, format, size })
    }

    /// Returns the name of the backing image for the header of the image at `path`: a name alone if both are in one
    /// folder, so that the folder can be moved.
    fn recorded_name(&self, path: &Path) -> Result<String, String> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = folder.canonicalize().map_err(|error| format!("find its folder: {error}"))?;
        let alone = self.path.file_name().filter(|_| self.path.parent() == Some(&folder));
        // A colon would end the name of a protocol.
        let alone = alone.map(Path::new).filter(|name| !name.as_os_str().as_encoded_bytes().contains(&b':'));
        let name = alone.unwrap_or(&self.path).to_str();
        match name.filter(|name| name.len() <= MAX_NAME && file_name(name).is_some()) {
            Some(name) => Ok(name.to_owned()),
            None => Err(format!(
                "the path of its backing image {} is not UTF-8, or has more than {MAX_NAME} bytes",
                self.file.path.display()
            )),
        }
    }
}

/// Writes a new image next to its path, and moves it there. Returns `None` if there is another one by then.
fn write(path: &Path, size: u64, backing: Option<(String, Format)>) -> io::Result<Option<NewFile>> {
    let (temporary, file) = temporary(path)?;
    let written = fill(&file, size, backing).and_then(|()| match fs::hard_link(&temporary, path) {
        // Another program has been faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
        Err(error) => Err(error),
        Ok(()) => {
            let file = file.metadata()?;
            Ok(Some(NewFile { path: path.to_owned(), file: (file.dev(), file.ino()) }))
        }
    });
    let removed = fs::remove_file(&temporary);
    let new = written?;
    removed?;
    // The name must last as long as the guest's data.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()?;
    Ok(new)
}

/// Creates a file that has no user yet.
fn temporary(path: &Path) -> io::Result<(PathBuf, File)> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    loop {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(".{name}.{}.{number}", std::process::id()));
        let mut options = File::options();
        match options.read(true).write(true).create_new(true).mode(MODE).open(&temporary) {
            // A process with the same number was killed here.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            opened => return opened.map(|file| (temporary, file)),
        }
    }
}

fn fill(file: &File, size: u64, backing: Option<(String, Format)>) -> io::Result<()> {
    let storage = ImagoFile::try_from(file.try_clone()?)?;
    let mut image = Qcow2CreateBuilder::<ImagoFile, View>::new(storage).size(size);
    if let Some((name, format)) = backing {
        let format = match format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        };
        image = image.backing(name, format.to_owned());
    }
    image.create()?;
    file.sync_all()
}
