//! Virtio block device (virtio 1.2, section 5.2) on a [`Disk`]: up to [`MAX_QUEUES`] queues, each with a
//! worker thread of its own.
//!
//! Requests of a queue are in progress at the same time and complete in any order. Host I/O never reads into
//! guest memory, so it never pins a guest page for writing. If the engine write-protects a page briefly, the
//! copy to that page just waits.
//!
//! # Meaning of a completed request
//! A successful read or write has transferred all of its data. A successful flush has put all writes that
//! completed before it on the medium (`fdatasync`). If the driver does not support flushes, each write is on
//! the medium when it completes.
//!
//! # Errors
//! VIRTIO_BLK_S_IOERR is the answer to errors of the host and to invalid requests: beyond the end of the
//! disk, of no or partial sectors, with buffers outside guest memory or of the wrong direction. Unknown types
//! and flags get VIRTIO_BLK_S_UNSUPP. A request without a place for the status breaks the device until it is
//! reset. [`BlockStats`] counts all of them.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestAddress;

use super::queue::ServedQueue;
use super::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice, read_config};
use crate::disk::cache::{BlockCache, ImageId};
use crate::disk::image::Image;
use crate::disk::limit::RateLimiter;
use crate::disk::{Disk, DiskOptions, NewFile, OpenError};

mod far;
mod request;
mod service;
mod size;
mod stats;
#[cfg(test)]
mod tests;
mod transfer;

pub use crate::disk::image::SECTOR_SIZE;
pub use size::DiskSize;
pub use stats::{BlockStats, HostErrorObserver};

use request::Rules;
use service::{Common, Service};

/// Longest serial number in virtio, in bytes.
pub const MAX_ID_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Most queues of a disk.
pub const MAX_QUEUES: usize = 16;

const MAX_QUEUE_SIZE: u16 = 256;
/// Descriptors of one request: the largest number of data segments, a header and a status.
const MAX_DESCRIPTORS: usize = MAX_QUEUE_SIZE as usize;
/// Most ranges of one request to discard or zero.
const MAX_CLEAR_RANGES: u32 = 16;
/// Length limit of such a range, in bytes.
const MAX_CLEAR_BYTES: u64 = 1 << 30;

/// A disk of one VM.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// The VM's name, for the workers' thread names.
    pub vm: String,
    /// The disk's name within the VM: 1 to 20 bytes. The guest sees the name as the serial number.
    pub id: String,
    /// Number of queues offered to the driver: 1 to [`MAX_QUEUES`].
    pub queues: usize,
    /// The disk's image and the way to access it.
    pub disk: DiskOptions,
}

/// The reason why a disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The name does not fit into a serial number.
    #[error("name a disk {id:?}: a name has 1 to 20 bytes, none of them zero")]
    Id {
        /// The name as given.
        id: String,
    },
    /// The number of queues is out of range.
    #[error("give a disk {queues} queues: it can have 1 to {MAX_QUEUES}")]
    Queues {
        /// The requested number.
        queues: usize,
    },
    /// The file cannot be a disk.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Receives reads that put data into guest memory without the block cache.
pub trait ReadObserver: Send + Sync {
    /// Reports that guest memory at `address` now holds `bytes` bytes of `image` from byte `offset` on. The
    /// disk's workers call this before the request completes. The guest may have written to the memory since.
    fn filled(&self, image: ImageId, address: GuestAddress, bytes: usize, offset: u64);
}

/// A virtio block device.
pub struct Block {
    thread_name: String,
    id: [u8; MAX_ID_LEN],
    disk: Arc<Disk>,
    features: u64,
    /// Configuration space. `size` provides the capacity.
    config: [u8; 60],
    size: Arc<DiskSize>,
    queue_sizes: Vec<u16>,
    stats: Arc<BlockStats>,
    observer: Option<Arc<dyn ReadObserver>>,
    workers: Vec<Worker>,
}

impl Block {
    /// Opens the image of `config` and locks it for the life of the disk. If the disk's policy uses the
    /// cache, `cache` serves reads of whole blocks.
    pub fn open(config: &BlockConfig, cache: Option<Arc<dyn BlockCache>>) -> Result<Self, BlockError> {
        // Check the values before touching the file.
        serial_number(&config.id)?;
        check_queues(config.queues)?;
        let mut disk = Disk::open(&config.disk)?;
        if let Some(cache) = cache.filter(|_| config.disk.policy.wants_cache()) {
            disk.set_cache(cache);
        }
        Self::new(&config.vm, &config.id, config.queues, disk)
    }

    /// Returns the file of the image if [`open`](Self::open) has created it.
    pub fn new_file(&self) -> Option<&NewFile> {
        self.disk.new_file()
    }

    /// Returns a disk with the name `id` of the VM `vm`, on an open image.
    pub fn new(vm: &str, id: &str, queues: usize, disk: Disk) -> Result<Self, BlockError> {
        let serial = serial_number(id)?;
        check_queues(queues)?;
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        if disk.image().is_read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_WRITE_ZEROES;
            if disk.image().can_discard() {
                features |= 1 << VIRTIO_BLK_F_DISCARD;
            }
        }
        if queues > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        let disk = Arc::new(disk);
        Ok(Self {
            // The kernel keeps 15 bytes of a thread's name, and a zero byte would end the name early.
            thread_name: format!("block-{vm}-{id}").replace('\0', "?"),
            id: serial,
            features,
            config: config_space(disk.image(), features, queues),
            queue_sizes: vec![MAX_QUEUE_SIZE; queues],
            size: Arc::new(DiskSize::new(disk.clone())),
            disk,
            stats: Arc::default(),
            observer: None,
            workers: Vec::new(),
        })
    }

    /// Sets the observer of reads from the next activation on.
    pub fn set_read_observer(&mut self, observer: Arc<dyn ReadObserver>) {
        self.observer = Some(observer);
    }

    /// Returns the counters of this disk. They outlive the disk.
    pub fn stats(&self) -> Arc<BlockStats> {
        self.stats.clone()
    }

    /// Returns the limits of this disk, which may change at any time.
    pub fn limiter(&self) -> Arc<RateLimiter> {
        self.disk.limiter().clone()
    }

    /// Returns the size of this disk. Its owner can make it follow the image's size at any time.
    pub fn size(&self) -> Arc<DiskSize> {
        self.size.clone()
    }

    /// Returns sentences for the user about how the disk is accessed.
    pub fn notices(&self) -> &[String] {
        self.disk.notices()
    }
}

impl Drop for Block {
    /// Puts the guest's writes on the medium, in whichever way the VM ends. A user who cuts the VM's power
    /// may cut the host's power next.
    fn drop(&mut self) {
        self.workers.clear();
        if self.disk.image().is_read_only() || self.disk.is_lost() || !self.stats.unflushed() {
            return;
        }
        if let Err(error) = self.disk.image().flush() {
            self.stats.record_host_error(format!("flush as the disk is closed: {error}"));
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.config;
        config[..8].copy_from_slice(&self.size.capacity());
        read_config(&config, offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.size.generation()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.disk.is_lost() {
            return Err(ActivateError::BackendLost);
        }
        let Activation { memory, features, mut queues, interrupt } = activation;
        if features & (1 << VIRTIO_BLK_F_MQ) == 0 {
            queues.retain(|queue| queue.index == 0);
        }
        if !queues.iter().any(|queue| queue.index == 0) {
            return Err(ActivateError::QueueNotReady(0));
        }
        let image = self.disk.image();
        let common = Arc::new(Common {
            rules: Rules { read_only: image.is_read_only(), features },
            disk: self.disk.clone(),
            id: self.id,
            write_through: features & (1 << VIRTIO_BLK_F_FLUSH) == 0,
            stats: self.stats.clone(),
            observer: self.observer.clone(),
        });
        // If a worker cannot be started, dropping the earlier ones stops them.
        let mut workers = Vec::with_capacity(queues.len());
        for active in queues {
            let served = ServedQueue::new(active.queue, memory.clone(), interrupt.clone());
            let served = served.with_index(active.index);
            let (common, name, notified) = (common.clone(), self.thread_name.clone(), active.event);
            let make = move || Service::new(common, served, notified, &name);
            let worker = Worker::spawn(self.thread_name.clone(), interrupt.clone(), make)
                .map_err(ActivateError::Worker)?;
            workers.push(worker);
        }
        self.workers = workers;
        self.size.set_driver(Some(interrupt));
        Ok(())
    }

    fn reset(&mut self) {
        self.size.set_driver(None);
        self.workers.clear();
    }
}

fn check_queues(queues: usize) -> Result<(), BlockError> {
    if (1..=MAX_QUEUES).contains(&queues) { Ok(()) } else { Err(BlockError::Queues { queues }) }
}

fn serial_number(id: &str) -> Result<[u8; MAX_ID_LEN], BlockError> {
    if id.is_empty() || id.len() > MAX_ID_LEN || id.contains('\0') {
        return Err(BlockError::Id { id: id.to_owned() });
    }
    let mut serial = [0; MAX_ID_LEN];
    serial[..id.len()].copy_from_slice(id.as_bytes());
    Ok(serial)
}

/// Returns `struct virtio_blk_config` without the capacity, up to the fields about zeroing (virtio 1.2,
/// section 5.2.4).
fn config_space(image: &dyn Image, features: u64, queues: usize) -> [u8; 60] {
    let segments = MAX_DESCRIPTORS as u32 - 2;
    let logical = SECTOR_SIZE as u32;
    let physical = image.physical_block_size().max(logical);
    let in_physical = physical / logical;
    let clear_sectors = (MAX_CLEAR_BYTES / SECTOR_SIZE) as u32;

    let mut config = [0; 60];
    let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(12, &segments.to_le_bytes());
    put(20, &logical.to_le_bytes());
    // Logical blocks per physical block, as a power of two. The first block is aligned.
    put(24, &[in_physical.ilog2() as u8]);
    put(26, &u16::try_from(in_physical).unwrap_or(u16::MAX).to_le_bytes());
    if features & (1 << VIRTIO_BLK_F_MQ) != 0 {
        put(34, &(queues as u16).to_le_bytes());
    }
    if features & (1 << VIRTIO_BLK_F_DISCARD) != 0 {
        put(36, &clear_sectors.to_le_bytes());
        put(40, &MAX_CLEAR_RANGES.to_le_bytes());
        put(44, &in_physical.to_le_bytes());
    }
    if features & (1 << VIRTIO_BLK_F_WRITE_ZEROES) != 0 {
        put(48, &clear_sectors.to_le_bytes());
        put(52, &MAX_CLEAR_RANGES.to_le_bytes());
        put(56, &[u8::from(image.can_discard())]);
    }
    config
}
