//! The back end of a disk: images, the channels to them, and the cache of their blocks.
//!
//! - [`image::Image`] is an array of bytes in some format. [`raw`] images are files and block devices with
//!   the same bytes as the disk. A qcow2 image holds only differences from its backing image.
//! - A channel carries the operations of one queue to an image, many at a time. It uses io_uring if the image
//!   is raw and the kernel allows io_uring, and a few threads otherwise.
//! - A disk asks the [`cache::BlockCache`] before it reads whole blocks, and tells it of writes before they
//!   begin.
//! - A cache in another process has a [`line::CacheLine`] for each queue, and reads missing blocks itself, by a
//!   [`reader::BlockReader`].
//! - [`limit::RateLimiter`] limits the bytes and operations of a disk per second.
//!
//! # Caches of data
//! With [`CachePolicy::Buffered`], data is in the kernel's page cache. All other policies bypass it
//! (`O_DIRECT`). If the file system does not support that, its page cache is used, and [`Disk::notices`] says
//! so.
//!
//! Host I/O never reads into guest memory. It reads into the cache's memory or into bounce buffers. It writes
//! from these or from guest memory.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

pub mod cache;
pub(crate) mod channel;
mod identity;
pub mod image;
pub mod limit;
pub mod line;
mod locks;
pub(crate) mod memory;
mod open;
mod qcow2;
pub(crate) mod ranges;
pub mod raw;
pub mod reader;
mod threads;
mod uring;
pub(crate) mod wakers;

pub use open::{OpenError, ResizeError};
pub use qcow2::create::NewFile;
use samepage_spec::RateLimits;
pub use samepage_spec::{CachePolicy, Format};

use cache::BlockCache;
use channel::Channel;
use image::Image;
use limit::RateLimiter;
use open::ImageFile;
use qcow2::Qcow2Image;
use ranges::RangeLocks;
use raw::RawFile;
use threads::{ThreadChannel, ThreadPool};
use uring::UringChannel;
use wakers::Wakers;

/// The mechanism that carries out operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring if the image is raw and io_uring is available, otherwise threads.
    #[default]
    Auto,
    /// Threads in any case.
    Threads,
}

/// The description of a disk.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// An image file or a block device.
    pub path: PathBuf,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The image's format, or `None` to detect it. Detection is refused where a wrong guess would be
    /// dangerous.
    pub format: Option<Format>,
    /// The cache that keeps blocks in host memory.
    pub policy: CachePolicy,
    /// The mechanism that carries out operations.
    pub engine: Engine,
    /// The backing image that a qcow2 image must have.
    pub backing: Option<PathBuf>,
    /// How a missing image is created. `None` to create none.
    pub create: Option<NewImage>,
}

/// An image that is created if it is missing.
#[derive(Clone, Debug, Default)]
pub struct NewImage {
    /// The size in bytes, a multiple of [`SECTOR_SIZE`](image::SECTOR_SIZE). By default the size of the backing
    /// image.
    pub size: Option<u64>,
    /// The format of the backing image, or `None` to detect it. Detection is refused where a wrong guess would be
    /// dangerous.
    pub backing_format: Option<Format>,
}

impl DiskOptions {
    /// Returns a writable disk on the image at `path`, with the default policy.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            format: None,
            policy: CachePolicy::default(),
            engine: Engine::Auto,
            backing: None,
            create: None,
        }
    }
}

/// An open image, with everything that its queues share.
pub struct Disk {
    image: Arc<dyn Image>,
    use_uring: bool,
    cache: Option<Arc<dyn BlockCache>>,
    limiter: Arc<RateLimiter>,
    locks: Arc<RangeLocks>,
    wakers: Arc<Wakers>,
    threads: Mutex<Weak<ThreadPool>>,
    notices: Vec<String>,
    new_file: Option<NewFile>,
    lost: AtomicBool,
    must_write_zeros: AtomicBool,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("size", &self.image.size()).finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens and locks the image and its backing images. Creates a missing image if the options say so.
    ///
    /// # Errors
    /// Fails if a file cannot be opened, is in use, or is not an image of the format, if its backing image is another
    /// one, or if it cannot be created.
    pub fn open(options: &DiskOptions) -> Result<Self, OpenError> {
        let new_file = match &options.create {
            Some(new) => qcow2::create::if_missing(&options.path, options.backing.as_deref(), new)?,
            None => None,
        };
        match Self::open_existing(options) {
            Ok(disk) => Ok(Self { new_file, ..disk }),
            Err(error) => {
                new_file.inspect(NewFile::remove);
                Err(error)
            }
        }
    }

    fn open_existing(options: &DiskOptions) -> Result<Self, OpenError> {
        let file = ImageFile::open(&options.path, options.read_only)?;
        let looks_like_qcow2 = file.looks_like_qcow2()?;
        let (format, trusted) = match options.format {
            Some(format) => (format, true),
            None if looks_like_qcow2 && !options.read_only => {
                let reason =
                    "it begins like a qcow2 image, but a guest could have written these bytes to a raw disk";
                return Err(OpenError::Format { path: options.path.clone(), reason });
            }
            None if looks_like_qcow2 => (Format::Qcow2, false),
            None => (Format::Raw, true),
        };
        let direct = options.policy != CachePolicy::Buffered;
        let path = options.path.display();
        let mut notices = Vec::new();
        let image: Arc<dyn Image> = match format {
            Format::Qcow2 => {
                if let Some(backing) = &options.backing {
                    qcow2::check_backing(&file, backing)?;
                }
                let image = Qcow2Image::open(file, direct, trusted)?;
                notices.extend(image.notice());
                Arc::new(image)
            }
            Format::Raw => {
                let raw = RawFile::new(file, direct)?;
                if direct && raw.direct().is_none() {
                    notices.push(format!(
                        "disk {path}: it does not support direct I/O, so the kernel's page cache is used too"
                    ));
                }
                Arc::new(raw)
            }
        };
        let mut disk = Self::new(image, options.engine);
        if disk.use_uring
            && let Err(error) = uring::probe()
        {
            disk.use_uring = false;
            notices.push(format!("disk {path}: io_uring cannot be used ({error}), so threads do its I/O"));
        }
        disk.notices = notices;
        Ok(disk)
    }

    /// Returns a disk on any image, without limits and without a cache.
    pub fn new(image: Arc<dyn Image>, engine: Engine) -> Self {
        let wakers = Arc::<Wakers>::default();
        Self {
            use_uring: engine == Engine::Auto && image.raw().is_some(),
            image,
            cache: None,
            limiter: Arc::new(RateLimiter::new(RateLimits::default(), wakers.clone())),
            locks: Arc::new(RangeLocks::new(wakers.clone())),
            wakers,
            threads: Mutex::default(),
            notices: Vec::new(),
            new_file: None,
            lost: AtomicBool::new(false),
            must_write_zeros: AtomicBool::new(false),
        }
    }

    /// Makes reads of whole blocks go through `cache`.
    pub fn set_cache(&mut self, cache: Arc<dyn BlockCache>) {
        self.cache = Some(cache);
    }

    /// Returns the image.
    pub fn image(&self) -> &dyn Image {
        self.image.as_ref()
    }

    /// Returns the cache, if there is one.
    pub fn cache(&self) -> Option<&Arc<dyn BlockCache>> {
        self.cache.as_ref()
    }

    /// Returns the limits, which may change at any time.
    pub fn limiter(&self) -> &Arc<RateLimiter> {
        &self.limiter
    }

    /// Returns sentences for the user about how the disk is accessed.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Returns the file of the image if [`open`](Self::open) has created it.
    pub fn new_file(&self) -> Option<&NewFile> {
        self.new_file.as_ref()
    }

    pub(crate) fn locks(&self) -> &Arc<RangeLocks> {
        &self.locks
    }

    pub(crate) fn wakers(&self) -> &Wakers {
        &self.wakers
    }

    /// Returns a channel to the image for one queue. Threads that it may need get the name `name`.
    pub(crate) fn channel(&self, name: &str) -> io::Result<Box<dyn Channel>> {
        // If there is not enough memory for a ring, there may be enough for threads.
        if self.use_uring
            && let Ok(ring) = UringChannel::new(self.image.clone())
        {
            return Ok(Box::new(ring));
        }
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let pool = match threads.upgrade() {
            Some(pool) => pool,
            None => Arc::new(ThreadPool::start(name, &self.image)?),
        };
        *threads = Arc::downgrade(&pool);
        Ok(Box::new(ThreadChannel::new(pool)?))
    }

    /// Returns whether the image has become unusable.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    pub(crate) fn set_lost(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Returns whether the image turned out to be unable to zero ranges itself.
    pub(crate) fn must_write_zeros(&self) -> bool {
        self.must_write_zeros.load(Ordering::Relaxed)
    }

    pub(crate) fn set_must_write_zeros(&self) {
        self.must_write_zeros.store(true, Ordering::Relaxed);
    }
}
