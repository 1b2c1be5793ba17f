//! qcow2 images and the images that back them.
//!
//! What is where in them is imago's knowledge; here is who may open what, and which image of the chain a
//! block comes from. Each image of a chain has its own view of the disk, down from itself, and a block that
//! comes from a backing image is read through that image's view: whatever is written to the overlay
//! meanwhile, what was read is the backing image's.
//!
//! # Trust
//! An image names the files that back it, so whoever can write an image can have any file of the host shown
//! to a guest. An image whose format was guessed may therefore refer to no other file.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard};

use imago::file::File as ImagoFile;
use imago::format::drivers::FormatDriverInstance as _;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, ShallowMapping};

use super::cache::ImageId;
use super::image::{Image, Layer, Location, SECTOR_SIZE};
use super::open::{ImageFile, OpenError};

/// Longest chain of images.
const MAX_LAYERS: usize = 32;

type View = FormatAccess<ImagoFile>;
type Overlay = Qcow2<ImagoFile, Arc<View>>;

/// An image that backs another one.
struct Backing {
    view: Arc<View>,
    file: ImageFile,
    /// Bytes of the file when it was looked at last.
    len: AtomicU64,
}

/// A disk on a qcow2 image.
pub(super) struct Qcow2Image {
    /// Reads and writes share it; what takes storage away from under them has it alone.
    top: RwLock<View>,
    /// From the image that backs the top one downwards.
    backing: Vec<Backing>,
    file: ImageFile,
    /// Bytes of the file when it was looked at last.
    len: AtomicU64,
    size: u64,
}

impl fmt::Debug for Qcow2Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2Image").field("path", &self.file.path).finish_non_exhaustive()
    }
}

impl Qcow2Image {
    /// The disk on the open image `file`. `direct` has it bypass the page cache where that is possible;
    /// `trusted` lets it refer to other files.
    pub(super) fn open(file: ImageFile, direct: bool, trusted: bool) -> Result<Self, OpenError> {
        let mut backing = Vec::new();
        let overlay = open_layer(&file, direct, trusted, 1, &mut backing)?;
        let size = overlay.size();
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(damaged(
                &file.path,
                format!("its disk of {size} bytes is not a whole number of sectors"),
            ));
        }
        // They were opened from the bottom up.
        backing.reverse();
        let len = AtomicU64::new(file.size);
        Ok(Self { top: RwLock::new(FormatAccess::new(overlay)), backing, file, len, size })
    }

    fn top(&self) -> io::Result<RwLockReadGuard<'_, View>> {
        self.top.read().map_err(|_| lost())
    }

    fn exclusively(&self, change: impl FnOnce(&mut View) -> io::Result<()>) -> io::Result<()> {
        change(&mut *self.top.write().map_err(|_| lost())?)
    }
}

/// Fails if somebody has cut the file: what it has lost would be read as zeroes.
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

fn damaged(path: &Path, reason: impl ToString) -> OpenError {
    OpenError::Qcow2 { path: path.to_owned(), reason: reason.to_string() }
}

/// Opens an image and all that back it; these end up in `backing`, the lowest first.
fn open_layer(
    file: &ImageFile,
    direct: bool,
    trusted: bool,
    depth: usize,
    backing: &mut Vec<Backing>,
) -> Result<Overlay, OpenError> {
    let storage = storage(file, direct)?;
    let mut overlay =
        Overlay::open_image(storage, !file.read_only).map_err(|error| damaged(&file.path, error))?;
    if overlay.requires_external_data_file() {
        return Err(damaged(&file.path, "it keeps its data in another file, which is not supported"));
    }
    overlay.set_data_file(None);
    let name = overlay.implicit_backing_file().cloned();
    let format = overlay.implicit_backing_format().cloned();
    let Some(name) = name else {
        overlay.set_backing(None);
        return Ok(overlay);
    };
    if !trusted {
        let reason = "it is a qcow2 image that refers to another file, and its format was not given";
        return Err(OpenError::Format { path: file.path.clone(), reason });
    }
    let lower = open_backing(file, &name, format.as_deref(), direct, depth, backing)
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
    // A name is relative to the image that it is written in.
    let path: PathBuf = overlay.path.parent().unwrap_or(Path::new("")).join(name);
    if depth >= MAX_LAYERS {
        return Err(damaged(&path, format!("more than {MAX_LAYERS} images back each other")));
    }
    let file = ImageFile::open(&path, true)?;
    let (is_qcow2, trusted) = match format {
        Some("qcow2") => (true, true),
        Some("raw" | "file") => (false, true),
        None => (file.looks_like_qcow2()?, false),
        Some(format) => {
            return Err(damaged(
                &overlay.path,
                format!("it is backed by an image of unknown format {format:?}"),
            ));
        }
    };
    let view = if is_qcow2 {
        FormatAccess::new(open_layer(&file, direct, trusted, depth + 1, backing)?)
    } else {
        let raw = Raw::open_image(storage(&file, direct)?, false).map_err(|error| damaged(&path, error))?;
        FormatAccess::new(raw)
    };
    let view = Arc::new(view);
    let len = AtomicU64::new(file.size);
    backing.push(Backing { view: view.clone(), file, len });
    Ok(view)
}

fn storage(file: &ImageFile, direct: bool) -> Result<ImagoFile, OpenError> {
    if direct {
        // Where it cannot be, the page cache does it.
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

    fn is_read_only(&self) -> bool {
        self.file.read_only
    }

    fn physical_block_size(&self) -> u32 {
        4096
    }

    fn can_discard(&self) -> bool {
        !self.file.read_only
    }

    fn identity(&self) -> Option<ImageId> {
        Some(self.file.id)
    }

    fn locate(&self, offset: u64, len: u64) -> io::Result<Location> {
        let top = self.top()?;
        let mut len = len;
        for (layer, image) in
            std::iter::once(self.file.id).chain(self.backing.iter().map(|b| b.file.id)).enumerate()
        {
            let view = layer.checked_sub(1).map_or(&*top, |lower| &*self.backing[lower].view);
            let (mapping, mapped) = view.get_shallow_mapping(offset, len)?;
            let image = match mapping {
                ShallowMapping::Indirect { .. } if mapped > 0 && layer < self.backing.len() => {
                    len = len.min(mapped);
                    continue;
                }
                ShallowMapping::Raw { .. } | ShallowMapping::Special { .. } if mapped > 0 => Some(image),
                // Zeroes, or beyond the end of a backing image that is smaller: no image holds them.
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
        // Tables first: they must not be on the medium before what they refer to, which imago sees to.
        top.flush()?;
        top.sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        // Zeroing makes whole clusters zero whose other parts it has found to be zeroes, which a write must
        // not change meanwhile.
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
            // Whatever the guest wanted kept it has flushed. What was not can only be tried.
            let _ = top.flush();
        }
    }
}
