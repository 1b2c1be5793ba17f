//! The size of a disk while its guest runs. It follows the image's size on request.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::SECTOR_SIZE;
use crate::disk::{Disk, ResizeError};
use crate::virtio::Interrupt;

/// The size of a disk, for the checks of requests and for the driver.
pub struct DiskSize {
    disk: Arc<Disk>,
    announced: Mutex<Announced>,
}

/// The size that the driver sees.
struct Announced {
    bytes: u64,
    /// Changes with the size.
    generation: u32,
    /// The connection to the driver, while there is one.
    interrupt: Option<Arc<Interrupt>>,
}

impl DiskSize {
    pub(super) fn new(disk: Arc<Disk>) -> Self {
        let announced = Announced { bytes: disk.image().size(), generation: 0, interrupt: None };
        Self { disk, announced: Mutex::new(announced) }
    }

    fn announced(&self) -> MutexGuard<'_, Announced> {
        self.announced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the size in bytes.
    pub fn bytes(&self) -> u64 {
        self.announced().bytes
    }

    /// Adopts the image's present size, and notifies the driver. Returns the size in bytes. Requests beyond
    /// the new end fail from then on.
    ///
    /// # Errors
    /// Fails if the disk keeps its earlier size.
    pub fn refresh(&self) -> Result<u64, ResizeError> {
        let mut announced = self.announced();
        let bytes = self.disk.image().refresh_size()?;
        // If the image shrank and then grew again, the lost part is zeros now, and nothing reveals whether
        // that happened. So drop all cached blocks.
        if let (Some(cache), Some(image)) = (self.disk.cache(), self.disk.image().identity()) {
            cache.begin_write(image, 0..u64::MAX);
            cache.end_write(image, 0..u64::MAX);
        }
        if bytes != announced.bytes {
            announced.bytes = bytes;
            announced.generation = announced.generation.wrapping_add(1);
            if let Some(interrupt) = &announced.interrupt {
                interrupt.signal_config();
            }
        }
        Ok(bytes)
    }

    /// Returns the capacity field of the configuration space.
    pub(super) fn capacity(&self) -> [u8; 8] {
        (self.bytes() / SECTOR_SIZE).to_le_bytes()
    }

    pub(super) fn generation(&self) -> u32 {
        self.announced().generation
    }

    /// Sets the connection to the driver, or removes it.
    pub(super) fn set_driver(&self, interrupt: Option<Arc<Interrupt>>) {
        self.announced().interrupt = interrupt;
    }
}
