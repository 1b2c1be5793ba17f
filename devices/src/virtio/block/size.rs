//! The size of a disk while its guest runs: it follows the image's when somebody asks for that.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::SECTOR_SIZE;
use crate::disk::{Disk, ResizeError};
use crate::virtio::Interrupt;

/// The size of a disk, as requests are checked against it and as its driver is told.
pub struct DiskSize {
    disk: Arc<Disk>,
    told: Mutex<Told>,
}

/// What the driver is told.
struct Told {
    bytes: u64,
    /// Changes with the size.
    generation: u32,
    /// How the driver is reached, while there is one.
    interrupt: Option<Arc<Interrupt>>,
}

impl DiskSize {
    pub(super) fn new(disk: Arc<Disk>) -> Self {
        let told = Told { bytes: disk.image().size(), generation: 0, interrupt: None };
        Self { disk, told: Mutex::new(told) }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In bytes.
    pub fn bytes(&self) -> u64 {
        self.told().bytes
    }

    /// Takes over the size that the image has now, and tells the driver of it. Returns it in bytes. Requests
    /// beyond the end fail from then on.
    ///
    /// # Errors
    /// Where the disk keeps the size that it had.
    pub fn refresh(&self) -> Result<u64, ResizeError> {
        let mut told = self.told();
        let bytes = self.disk.image().refresh_size()?;
        // What was cut off is zeroes if it is there again, and nobody says whether it was.
        if let (Some(cache), Some(image)) = (self.disk.cache(), self.disk.image().identity()) {
            cache.begin_write(image, 0..u64::MAX);
            cache.end_write(image, 0..u64::MAX);
        }
        if bytes != told.bytes {
            told.bytes = bytes;
            told.generation = told.generation.wrapping_add(1);
            if let Some(interrupt) = &told.interrupt {
                interrupt.signal_config();
            }
        }
        Ok(bytes)
    }

    /// The capacity field of the configuration space.
    pub(super) fn capacity(&self) -> [u8; 8] {
        (self.bytes() / SECTOR_SIZE).to_le_bytes()
    }

    pub(super) fn generation(&self) -> u32 {
        self.told().generation
    }

    /// A driver has come or gone.
    pub(super) fn set_driver(&self, interrupt: Option<Arc<Interrupt>>) {
        self.told().interrupt = interrupt;
    }
}
