//! qcow2 images and their backing images.
//!
//! The crate imago knows the format. This module decides which files may be opened, and which image of the
//! chain holds a block. Each image of a chain has its own view of the disk, from itself downwards. A block of
//! a backing image is read through that image's view. So a simultaneous write to the overlay cannot change
//! the content that is read.
//!
//! # Trust
//! An image names its backing files. So a user who can write an image could show any file of the host to a
//! guest. For this reason, an image whose format was guessed may not refer to another file.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard};

use imago::file::File as ImagoFile;
use imago::format::drivers::FormatDriverInstance as _;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, ShallowMapping};

use super::Format;
use super::cache::ImageId;
use super::image::{Image, Layer, Location, SECTOR_SIZE};
use super::open::{ImageFile, OpenError, ResizeError};

pub(super) mod create;
mod header;

use header::{Header, convert, quoted};

/// Longest chain of images.
const MAX_LAYERS: usize = 32;

type View = FormatAccess<ImagoFile>;
type Overlay = Qcow2<ImagoFile, Arc<View>>;

/// A backing image.
struct Backing {
    view: Arc<View>,
    file: ImageFile,
    format: Format,
    /// The file's length in bytes at the last check.
    len: AtomicU64,
}

/// A disk on a qcow2 image. The views are dropped before the files, because dropping a file releases its
/// locks.
pub(super) struct Qcow2Image {
    /// Reads and writes share the lock. Operations that free storage take it exclusively.
    top: RwLock<View>,
    /// The backing images, from the top one downwards.
    backing: Vec<Backing>,
    file: ImageFile,
    /// The file's length in bytes at the last check.
    len: AtomicU64,
    size: u64,
    /// Whether a mark can zero a cluster. If not, zeros must be written.
    can_zero: bool,
    notice: Option<String>,
}

impl fmt::Debug for Qcow2Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2Image").field("path", &self.file.path).finish_non_exhaustive()
    }
}

impl Qcow2Image {
    /// Returns the disk on the open image `file`. With `direct`, it bypasses the page cache if possible.
    /// `trusted` allows it to refer to other files.
    pub(super) fn open(file: ImageFile, direct: bool, trusted: bool) -> Result<Self, OpenError> {
        let mut backing = Vec::new();
        let header = Header::read(&file)?;
        let notice = header.has_bitmaps && !file.read_only;
        let notice = notice.then(|| {
            format!(
                "disk {}: its bitmaps become invalid; make the next backup a full one",
                file.path.display()
            )
        });
        let (cluster_size, has_zero_clusters) = (header.cluster_size, header.has_zero_clusters);
        let overlay = open_layer(&file, header, direct, trusted, 1, &mut backing)?;
        let size = overlay.size();
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(refused(
                &file.path,
                format!("its disk of {size} bytes is not a whole number of sectors"),
            ));
        }
        // They were opened from the bottom up.
        backing.reverse();
        let len = AtomicU64::new(file.size);
        // Imago 0.2.6 miscounts on disks smaller than a cluster, and zeros too much.
        let can_zero = has_zero_clusters && size >= cluster_size;
        let top = RwLock::new(FormatAccess::new(overlay));
        Ok(Self { top, backing, file, len, size, can_zero, notice })
    }

    /// Returns a sentence for the user, if there is one.
    pub(super) fn notice(&self) -> Option<String> {
        self.notice.clone()
    }

    fn top(&self) -> io::Result<RwLockReadGuard<'_, View>> {
        self.top.read().map_err(|_| lost())
    }

    fn exclusively(&self, change: impl FnOnce(&mut View) -> io::Result<()>) -> io::Result<()> {
        change(&mut *self.top.write().map_err(|_| lost())?)
    }
}

/// Fails if the file has been truncated: the lost part would read as zeros.
fn check_length(file: &ImageFile, len: &AtomicU64) -> io::Result<()> {
    let metadata = file.file.metadata()?;
    if metadata.is_file() && metadata.len() < len.fetch_max(metadata.len(), Ordering::Relaxed) {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "an image file has become too short"));
    }
    Ok(())
}

fn lost() -> io::Error {
    io::Error::other("an earlier request left the image in an unknown state")
}

fn refused(path: &Path, reason: impl ToString) -> OpenError {
    OpenError::Qcow2 { path: path.to_owned(), reason: reason.to_string() }
}

/// Opens an image and its backing images. The backing images are appended to `backing`, the lowest first.
fn open_layer(
    file: &ImageFile,
    header: Header,
    direct: bool,
    trusted: bool,
    depth: usize,
    backing: &mut Vec<Backing>,
) -> Result<Overlay, OpenError> {
    let storage = storage(file, direct)?;
    let mut overlay =
        Overlay::open_image(storage, !file.read_only).map_err(|error| refused(&file.path, error))?;
    overlay.set_data_file(None);
    let Some(name) = header.backing else {
        overlay.set_backing(None);
        return Ok(overlay);
    };
    if !trusted {
        let reason = "it is a qcow2 image that refers to another file, and its format was not given";
        return Err(OpenError::Format { path: file.path.clone(), reason });
    }
    let lower = open_backing(file, &name, header.backing_format.as_deref(), direct, depth, backing)
        .map_err(|source| OpenError::Backing { path: file.path.clone(), source: Box::new(source) })?;
    overlay.set_backing(Some(lower));
    Ok(overlay)
}

fn open_backing(
    overlay: &ImageFile,
    name: &str,
    format: Option<&str>,
    direct: bool,
    depth: usize,
    backing: &mut Vec<Backing>,
) -> Result<Arc<View>, OpenError> {
    let Some(name) = file_name(name) else {
        let how = convert(&overlay.path, "qcow2");
        return Err(refused(
            &overlay.path,
            format!("it is backed by {name:?}, which is not a plain file; {how}"),
        ));
    };
    // A name is relative to the image that contains it.
    let path: PathBuf = overlay.path.parent().unwrap_or(Path::new("")).join(name);
    if depth >= MAX_LAYERS {
        return Err(refused(&path, format!("its chain of backing files has more than {MAX_LAYERS} images")));
    }
    let file = ImageFile::open(&path, true)?;
    let (format, trusted) = match format {
        Some("qcow2") => (Format::Qcow2, true),
        Some("raw" | "file" | "host_device") => (Format::Raw, true),
        None if file.looks_like_qcow2()? => (Format::Qcow2, false),
        None => (Format::Raw, false),
        Some(format) => {
            let how = convert(&overlay.path, "qcow2");
            let reason = format!("it is backed by an image of the unknown format {format:?}; {how}");
            return Err(refused(&overlay.path, reason));
        }
    };
    let view = match format {
        Format::Qcow2 => {
            let header = Header::read(&file)?;
            if header.backing.is_some() && !trusted {
                let (backing, overlay) = (quoted(&path), quoted(&overlay.path));
                let reason = format!(
                    "it looks like a qcow2 image with a backing file, and {overlay} does not record its \
                     format; record it: qemu-img rebase -u -f qcow2 -F qcow2 -b {backing} {overlay}"
                );
                return Err(refused(&path, reason));
            }
            FormatAccess::new(open_layer(&file, header, direct, trusted, depth + 1, backing)?)
        }
        Format::Raw => {
            let raw =
                Raw::open_image(storage(&file, direct)?, false).map_err(|error| refused(&path, error))?;
            FormatAccess::new(raw)
        }
    };
    let view = Arc::new(view);
    let len = AtomicU64::new(file.size);
    backing.push(Backing { view: view.clone(), file, format, len });
    Ok(view)
}

/// Checks that an image has the backing image that the user expects.
pub(super) fn check_backing(file: &ImageFile, wanted: &Path) -> Result<(), OpenError> {
    let header = Header::read(file)?;
    let recorded = header.backing.as_deref().map(|name| (name, file_name(name)));
    let number = |path: &Path| path.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
    let found = match recorded {
        None => "no other image".to_owned(),
        Some((name, None)) => format!("{name:?}"),
        Some((_, Some(name))) => {
            let path = file.path.parent().unwrap_or(Path::new("")).join(name);
            if number(&path).is_ok_and(|path| number(wanted).is_ok_and(|wanted| path == wanted)) {
                return Ok(());
            }
            path.display().to_string()
        }
    };
    Err(refused(
        &file.path,
        format!(
            "it is backed by {found}, and not by {}; name its own backing image, or give another path for a new \
             image",
            wanted.display()
        ),
    ))
}

/// Returns the path of a backing file. QEMU takes the text before a colon in the first part of a path as a
/// protocol. `None` if the name has one.
fn file_name(name: &str) -> Option<&str> {
    match name.split_once(':') {
        Some((protocol, _)) if protocol.contains('/') => Some(name),
        Some(("file", path)) => Some(path),
        Some(_) => None,
        None => Some(name),
    }
}

fn storage(file: &ImageFile, direct: bool) -> Result<ImagoFile, OpenError> {
    if direct {
        // If direct I/O is impossible, the page cache is used.
        file.use_direct_io()?;
    }
    let failed = |source| OpenError::Io { action: "open", path: file.path.clone(), source };
    // The copy shares the lock, which ends with the last of the two.
    file.file.try_clone().and_then(ImagoFile::try_from).map_err(failed)
}

impl Image for Qcow2Image {
    fn size(&self) -> u64 {
        self.size
    }

    /// The image's own header decides the size of the disk, and locks keep other writers out.
    fn refresh_size(&self) -> Result<u64, ResizeError> {
        self.file.measure().map(|_| self.size)
    }

    fn is_read_only(&self) -> bool {
        self.file.read_only
    }

    fn physical_block_size(&self) -> u32 {
        4096
    }

    fn can_discard(&self) -> bool {
        !self.file.read_only && self.can_zero
    }

    fn identity(&self) -> Option<ImageId> {
        Some(self.file.id(Format::Qcow2))
    }

    fn locate(&self, offset: u64, len: u64) -> io::Result<Location> {
        let top = self.top()?;
        let mut len = len;
        let backing = self.backing.iter().map(|backing| backing.file.id(backing.format));
        for (layer, image) in std::iter::once(self.file.id(Format::Qcow2)).chain(backing).enumerate() {
            let view = layer.checked_sub(1).map_or(&*top, |lower| &*self.backing[lower].view);
            let (mapping, mapped) = view.get_shallow_mapping(offset, len)?;
            let image = match mapping {
                ShallowMapping::Indirect { .. } if mapped > 0 && layer < self.backing.len() => {
                    len = len.min(mapped);
                    continue;
                }
                ShallowMapping::Raw { .. } | ShallowMapping::Special { .. } if mapped > 0 => Some(image),
                // Zeros, or beyond the end of a smaller backing image: no image holds the bytes.
                _ => None,
            };
            let mapped = if mapped == 0 { len } else { len.min(mapped) };
            return Ok(match mapped / SECTOR_SIZE * SECTOR_SIZE {
                // A backing image ends within the sector.
                0 => Location { layer: Layer(0), image: None, len: len.min(SECTOR_SIZE) },
                len => Location { layer: Layer(layer), image, len },
            });
        }
        Ok(Location { layer: Layer(0), image: None, len })
    }

    fn read_at(&self, layer: Layer, offset: u64, data: &mut [u8]) -> io::Result<()> {
        check_length(&self.file, &self.len)?;
        self.backing.iter().try_for_each(|backing| check_length(&backing.file, &backing.len))?;
        match layer.0.checked_sub(1) {
            None => self.top()?.read(data, offset),
            Some(lower) => {
                let backing = self.backing.get(lower).ok_or(io::ErrorKind::InvalidInput)?;
                backing.view.read(data, offset)
            }
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.top()?.write(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        let top = self.top()?;
        // Flush the tables first: they must not be on the medium before the data that they refer to. Imago
        // takes care of the order.
        top.flush()?;
        top.sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if !self.can_zero {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // Zeroing a whole cluster requires that its other parts are zeros. No write may change them
        // meanwhile.
        self.exclusively(
            |top| {
                if unmap { top.discard_to_zero(offset, len) } else { top.write_zeroes(offset, len) }
            },
        )
    }
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        if !self.file.read_only
            && let Ok(top) = self.top.get_mut()
        {
            // The guest has flushed the data that it needs. The rest is only attempted.
            let _ = top.flush();
        }
    }
}
