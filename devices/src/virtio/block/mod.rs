//! Virtio block device (virtio 1.2, section 5.2) on a [`Disk`]: up to [`MAX_QUEUES`] queues, each with a
//! worker thread of its own.
//!
//! Requests of a queue are under way together and complete in any order. Host I/O never reads into guest
//! memory, so nothing pins a page of it for writing; a page that the host write-protects for a moment just
//! delays the copy.
//!
//! # What a completed request means
//! A read or write that succeeded moved all of its data. A flush that succeeded put all writes that were
//! complete before it on the medium (`fdatasync`). A driver that does not know flushes gets writes that are
//! on the medium when they complete.
//!
//! # Errors
//! Host errors, requests beyond the end of the disk, of no or of part of a sector, with buffers outside
//! guest memory or of the wrong direction end in VIRTIO_BLK_S_IOERR; unknown types and flags in
//! VIRTIO_BLK_S_UNSUPP. A request without a place for the status breaks the device until it is reset.
//! Either way it is counted in [`BlockStats`].

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
use crate::disk::{Disk, DiskOptions, OpenError};

mod request;
mod service;
mod size;
mod stats;
#[cfg(test)]
mod tests;
mod transfer;

pub use crate::disk::image::SECTOR_SIZE;
pub use size::DiskSize;
pub use stats::{BlockStats, TroubleObserver};

use request::Rules;
use service::{Common, Service};

/// Longest serial number that virtio can carry, in bytes.
pub const MAX_ID_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Most queues of a disk.
pub const MAX_QUEUES: usize = 16;

const MAX_QUEUE_SIZE: u16 = 256;
/// Descriptors of one request: as many data segments as the driver is told, a header and a status.
const MAX_DESCRIPTORS: usize = MAX_QUEUE_SIZE as usize;
/// Most ranges of a request that discards or zeroes.
const MAX_CLEAR_RANGES: u32 = 16;
/// Longest of them, in bytes.
const MAX_CLEAR_BYTES: u64 = 1 << 30;

/// A disk of one VM.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// The VM's name, for the workers' thread names.
    pub vm: String,
    /// The disk's name within the VM, which the guest sees as its serial number: 1 to 20 bytes.
    pub id: String,
    /// How many queues the driver is offered: 1 to [`MAX_QUEUES`].
    pub queues: usize,
    /// What the disk is on.
    pub disk: DiskOptions,
}

/// Why a disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The name does not fit into a serial number.
    #[error("name a disk {id:?}: a name has 1 to 20 bytes, none of them zero")]
    Id {
        /// The name as given.
        id: String,
    },
    /// So many queues are not to be had.
    #[error("give a disk {queues} queues: it can have 1 to {MAX_QUEUES}")]
    Queues {
        /// As many as were asked for.
        queues: usize,
    },
    /// The file cannot be a disk.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Is told what reads put into guest memory without the block cache.
pub trait ReadObserver: Send + Sync {
    /// Guest memory at `address` now holds `bytes` bytes of `image`, from its byte `offset` on. Called by
    /// the disk's workers before the request completes; the guest may have written there since.
    fn filled(&self, image: ImageId, address: GuestAddress, bytes: usize, offset: u64);
}

/// A virtio block device.
pub struct Block {
    thread_name: String,
    id: [u8; MAX_ID_LEN],
    disk: Arc<Disk>,
    features: u64,
    /// Its capacity is kept by `size`.
    config: [u8; 60],
    size: Arc<DiskSize>,
    queue_sizes: Vec<u16>,
    stats: Arc<BlockStats>,
    observer: Option<Arc<dyn ReadObserver>>,
    workers: Vec<Worker>,
}

impl Block {
    /// A disk on the image of `config`, which it locks for its own life. `cache` serves the reads of whole
    /// blocks, if the disk's policy wants one.
    pub fn open(config: &BlockConfig, cache: Option<Arc<dyn BlockCache>>) -> Result<Self, BlockError> {
        // Bad values are found before the file is touched.
        serial_number(&config.id)?;
        check_queues(config.queues)?;
        let mut disk = Disk::open(&config.disk)?;
        if let Some(cache) = cache.filter(|_| config.disk.policy.wants_cache()) {
            disk.set_cache(cache);
        }
        Self::new(&config.vm, &config.id, config.queues, disk)
    }

    /// A disk called `id` of the VM `vm` on an open image.
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
            // The kernel keeps 15 bytes of a thread's name; a zero byte would end it early.
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

    /// Has `observer` told of reads from the next activation on.
    pub fn set_read_observer(&mut self, observer: Arc<dyn ReadObserver>) {
        self.observer = Some(observer);
    }

    /// The counters of this disk; they outlive it.
    pub fn stats(&self) -> Arc<BlockStats> {
        self.stats.clone()
    }

    /// The limits of this disk, to be changed at any time.
    pub fn limiter(&self) -> Arc<RateLimiter> {
        self.disk.limiter().clone()
    }

    /// The size of this disk, which can follow the image's at any time.
    pub fn size(&self) -> Arc<DiskSize> {
        self.size.clone()
    }

    /// What the user should know about how the disk is accessed, in sentences.
    pub fn notices(&self) -> &[String] {
        self.disk.notices()
    }
}

impl Drop for Block {
    /// However a VM ends, what its guest has written gets to the medium: who cuts its power off may cut off the
    /// host's next.
    fn drop(&mut self) {
        self.workers.clear();
        if self.disk.image().is_read_only() || self.disk.is_lost() || !self.stats.unflushed() {
            return;
        }
        if let Err(error) = self.disk.image().flush() {
            self.stats.record_trouble(format!("flush as the disk is closed: {error}"));
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
        // If one cannot be had, dropping those before it stops them.
        let mut workers = Vec::with_capacity(queues.len());
        for active in queues {
            let served = ServedQueue::new(active.queue, memory.clone(), interrupt.clone());
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

/// `struct virtio_blk_config` without the capacity, up to what zeroing may do (virtio 1.2, section 5.2.4).
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
    // Logical blocks in a physical one, as a power of two; the first of them is aligned.
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
