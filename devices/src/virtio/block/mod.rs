//! Virtio block device (virtio 1.2, section 5.2): one queue, one worker thread, one [`Backend`].
//!
//! Data moves through a bounce buffer of the worker's: host I/O never goes to guest memory directly, so
//! nothing pins a guest page, and a page that the host write-protects for a moment just delays the copy.
//!
//! # What a completed request means
//! A read or write that succeeded moved all of its data. A flush that succeeded put all completed writes on
//! the medium (`fdatasync`). A driver that does not know flushes gets writes that are on the medium when
//! they complete.
//!
//! # Errors
//! Host errors, requests beyond the end of the disk, of no or of part of a sector, with buffers outside
//! guest memory or of the wrong direction end in VIRTIO_BLK_S_IOERR; unknown types in VIRTIO_BLK_S_UNSUPP.
//! A request without a place for the status breaks the device until it is reset. Either way it is counted
//! in [`BlockStats`].

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestAddress;

use super::queue::ServedQueue;
use super::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice, read_config};

mod backend;
mod service;
mod stats;
#[cfg(test)]
mod tests;

pub use backend::{Backend, OpenError, RawFile};
pub use stats::BlockStats;

use service::Service;

/// Unit of request positions and lengths, in bytes.
pub const SECTOR_SIZE: u64 = 512;
/// Longest serial number that virtio can carry, in bytes.
pub const MAX_ID_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

const QUEUE_SIZES: [u16; 1] = [256];
/// Descriptors of one request: as many data segments as the driver is told, a header and a status.
const MAX_DESCRIPTORS: usize = QUEUE_SIZES[0] as usize;

/// A disk of one VM.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// The VM's name, for the worker's thread name.
    pub vm: String,
    /// The disk's name within the VM, which the guest sees as its serial number: 1 to 20 bytes.
    pub id: String,
    /// A raw image file or a block device.
    pub path: PathBuf,
    /// The guest may not write.
    pub read_only: bool,
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
    /// The file cannot be a disk.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Is told what reads put into guest memory.
pub trait ReadObserver: Send + Sync {
    /// Guest memory at `address` now holds `bytes` bytes of the disk, from byte `offset` on. Called by the
    /// disk's worker before the request completes; the guest may have written there since.
    fn filled(&self, address: GuestAddress, bytes: usize, offset: u64);
}

/// A virtio block device.
pub struct Block {
    thread_name: String,
    id: [u8; MAX_ID_LEN],
    backend: Arc<Mutex<Box<dyn Backend>>>,
    capacity: u64,
    features: u64,
    config: [u8; 32],
    stats: Arc<BlockStats>,
    observer: Option<Arc<dyn ReadObserver>>,
    worker: Option<Worker>,
}

impl Block {
    /// A disk on the raw file or block device of `config`, which it locks for its own life.
    pub fn open(config: BlockConfig) -> Result<Self, BlockError> {
        // A bad name is found before the file is touched.
        serial_number(&config.id)?;
        let file = RawFile::open(&config.path, config.read_only)?;
        Self::with_backend(&config.vm, &config.id, Box::new(file))
    }

    /// A disk called `id` of the VM `vm` on any back end.
    pub fn with_backend(vm: &str, id: &str, backend: Box<dyn Backend>) -> Result<Self, BlockError> {
        let serial = serial_number(id)?;
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        if backend.is_read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        Ok(Self {
            // The kernel keeps 15 bytes of a thread's name; a zero byte would end it early.
            thread_name: format!("block-{vm}-{id}").replace('\0', "?"),
            id: serial,
            capacity: backend.size(),
            features,
            config: config_space(backend.as_ref()),
            backend: Arc::new(Mutex::new(backend)),
            stats: Arc::default(),
            observer: None,
            worker: None,
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
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.backend.is_poisoned() {
            return Err(ActivateError::BackendLost);
        }
        let Activation { memory, features, queues, interrupt } = activation;
        let active =
            queues.into_iter().find(|queue| queue.index == 0).ok_or(ActivateError::QueueNotReady(0))?;

        let mut service = Service::new(
            ServedQueue::new(active.queue, memory, interrupt.clone()),
            self.id,
            self.capacity,
            features & (1 << VIRTIO_BLK_F_FLUSH) == 0,
            self.stats.clone(),
            self.observer.clone(),
        );
        let backend = self.backend.clone();
        let stats = self.stats.clone();
        let worker = Worker::spawn(self.thread_name.clone(), active.event, interrupt, move |stop| {
            // Nobody else takes this lock while the worker runs; a panic with it held ends the worker.
            let mut backend = backend.lock().unwrap_or_else(PoisonError::into_inner);
            service.serve(backend.as_mut(), stop).inspect_err(|error| stats.record_error(error.to_string()))
        })
        .map_err(ActivateError::Worker)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

fn serial_number(id: &str) -> Result<[u8; MAX_ID_LEN], BlockError> {
    if id.is_empty() || id.len() > MAX_ID_LEN || id.contains('\0') {
        return Err(BlockError::Id { id: id.to_owned() });
    }
    let mut serial = [0; MAX_ID_LEN];
    serial[..id.len()].copy_from_slice(id.as_bytes());
    Ok(serial)
}

/// The first fields of `struct virtio_blk_config`, up to the topology (virtio 1.2, section 5.2.4).
fn config_space(backend: &dyn Backend) -> [u8; 32] {
    let capacity = backend.size() / SECTOR_SIZE;
    let segments = MAX_DESCRIPTORS as u32 - 2;
    let logical = SECTOR_SIZE as u32;
    let physical = backend.physical_block_size().max(logical);

    let mut config = [0; 32];
    config[0..8].copy_from_slice(&capacity.to_le_bytes());
    config[12..16].copy_from_slice(&segments.to_le_bytes());
    config[20..24].copy_from_slice(&logical.to_le_bytes());
    // Logical blocks in a physical one, as a power of two; the first of them is aligned.
    config[24] = (physical / logical).ilog2() as u8;
    config[26..28].copy_from_slice(&u16::try_from(physical / logical).unwrap_or(u16::MAX).to_le_bytes());
    config
}
