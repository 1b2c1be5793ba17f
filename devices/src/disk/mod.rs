//! What lies behind a disk: images, the ways to read and write them, and the cache of their blocks.
//!
//! - [`image::Image`] is an array of bytes in some format. [`raw`] images are files and block devices whose
//!   bytes are the disk's; qcow2 images hold what differs from others that back them.
//! - A channel carries operations of one queue to an image, many at a time: by io_uring where the image is
//!   raw and the kernel allows it, by a few threads otherwise.
//! - [`cache::BlockCache`] is asked before whole blocks are read, and told before any are written.
//! - [`limit::RateLimiter`] bounds what the disk does a second.
//!
//! # What holds data
//! With [`CachePolicy::Buffered`] the kernel's page cache does. All other policies go past it (`O_DIRECT`).
//! A file system that cannot do that is used through its page cache; [`Disk::notices`] says so.
//!
//! Host I/O never reads into guest memory. It reads into the cache's memory or into bounce buffers, and
//! writes from either or from guest memory.

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
mod locks;
pub(crate) mod memory;
mod open;
mod qcow2;
pub(crate) mod ranges;
pub mod raw;
mod threads;
mod uring;
pub(crate) mod wakers;

pub use open::{OpenError, ResizeError};
pub use samepage_spec::{CachePolicy, Format};

use cache::BlockCache;
use channel::Channel;
use image::Image;
use limit::{RateLimiter, RateLimits};
use open::ImageFile;
use qcow2::Qcow2Image;
use ranges::RangeLocks;
use raw::RawFile;
use threads::{ThreadChannel, ThreadPool};
use uring::UringChannel;
use wakers::Wakers;

/// What carries operations out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring where it is to be had and the image is raw; threads otherwise.
    #[default]
    Auto,
    /// Threads in any case.
    Threads,
}

/// What a disk is made from.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// An image file or a block device.
    pub path: PathBuf,
    /// Nothing is to be written.
    pub read_only: bool,
    /// The image's format; none to have it found out, which is refused where it would be dangerous.
    pub format: Option<Format>,
    /// Who keeps blocks in host memory.
    pub policy: CachePolicy,
    /// What carries operations out.
    pub engine: Engine,
}

impl DiskOptions {
    /// A disk on the image at `path` that can be written, with the default policy.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            format: None,
            policy: CachePolicy::default(),
            engine: Engine::Auto,
        }
    }
}

/// An open image with all that its queues have in common.
pub struct Disk {
    image: Arc<dyn Image>,
    use_uring: bool,
    cache: Option<Arc<dyn BlockCache>>,
    limiter: Arc<RateLimiter>,
    locks: Arc<RangeLocks>,
    wakers: Arc<Wakers>,
    threads: Mutex<Weak<ThreadPool>>,
    notices: Vec<String>,
    lost: AtomicBool,
    zeroes_have_to_be_written: AtomicBool,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("size", &self.image.size()).finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens the image and all that back it, and locks them.
    ///
    /// # Errors
    /// Where a file cannot be opened, is in use, or is no image of the format.
    pub fn open(options: &DiskOptions) -> Result<Self, OpenError> {
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

    /// A disk on any image, without limits and without a cache.
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
            lost: AtomicBool::new(false),
            zeroes_have_to_be_written: AtomicBool::new(false),
        }
    }

    /// Has reads of whole blocks go through `cache`.
    pub fn set_cache(&mut self, cache: Arc<dyn BlockCache>) {
        self.cache = Some(cache);
    }

    /// The image.
    pub fn image(&self) -> &dyn Image {
        self.image.as_ref()
    }

    /// The cache, if there is one.
    pub fn cache(&self) -> Option<&Arc<dyn BlockCache>> {
        self.cache.as_ref()
    }

    /// The limits, to be changed at any time.
    pub fn limiter(&self) -> &Arc<RateLimiter> {
        &self.limiter
    }

    /// What the user should know about how the disk is accessed, in sentences.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    pub(crate) fn locks(&self) -> &Arc<RangeLocks> {
        &self.locks
    }

    pub(crate) fn wakers(&self) -> &Wakers {
        &self.wakers
    }

    /// A way to the image for one queue. Threads that it may need are called `name`.
    pub(crate) fn channel(&self, name: &str) -> io::Result<Box<dyn Channel>> {
        // Where there is no memory for a ring, there may be for threads.
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

    /// The image cannot be used any more.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    pub(crate) fn set_lost(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// The image was found unable to make zeroes by itself.
    pub(crate) fn zeroes_have_to_be_written(&self) -> bool {
        self.zeroes_have_to_be_written.load(Ordering::Relaxed)
    }

    pub(crate) fn write_zeroes_from_now_on(&self) {
        self.zeroes_have_to_be_written.store(true, Ordering::Relaxed);
    }
}
