//! The worker's side of a disk: takes requests from the queue, carries them out, completes them.

use std::io;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{Bytes, GuestMemoryError};

use super::stats::add;
use super::{Backend, BlockStats, MAX_DESCRIPTORS, MAX_ID_LEN, ReadObserver, SECTOR_SIZE};
use crate::virtio::chain::Buffers;
use crate::virtio::queue::{QueueError, ServedQueue};
use crate::virtio::worker::StopFlag;

/// Bytes that one step moves. As much as the kernel reads ahead; more would not save system calls that
/// matter and would leave the processor's cache between the two copies.
const STEP: usize = 128 << 10;

/// Type, reserved, sector.
const HEADER_LEN: usize = 16;

/// Why a request failed; the guest sees a status byte.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{action} {len} bytes at sector {sector}: {source}")]
    Host { action: &'static str, len: usize, sector: u64, source: io::Error },
    #[error("flush: {0}")]
    Flush(#[source] io::Error),
    #[error("copy to or from guest memory: {0}")]
    Guest(#[from] GuestMemoryError),
    #[error("refuse a request: {0}")]
    Malformed(&'static str),
    #[error("refuse a request of unknown type {0}")]
    Unsupported(u32),
    #[error("give up a request: the device is being reset")]
    Stopped,
}

/// A request's header (virtio 1.2, section 5.2.6).
struct Header {
    kind: u32,
    sector: u64,
}

/// Everything that serving the queue takes, but the back end.
pub(super) struct Service {
    queue: ServedQueue,
    id: [u8; MAX_ID_LEN],
    /// In bytes.
    capacity: u64,
    /// Writes go to the medium before they complete.
    write_through: bool,
    stats: Arc<BlockStats>,
    observer: Option<Arc<dyn ReadObserver>>,
    buffers: Buffers,
    bounce: Vec<u8>,
}

impl Service {
    pub(super) fn new(
        queue: ServedQueue,
        id: [u8; MAX_ID_LEN],
        capacity: u64,
        write_through: bool,
        stats: Arc<BlockStats>,
        observer: Option<Arc<dyn ReadObserver>>,
    ) -> Self {
        let (buffers, bounce) = (Buffers::new(MAX_DESCRIPTORS), vec![0; STEP]);
        Self { queue, id, capacity, write_through, stats, observer, buffers, bounce }
    }

    /// Serves requests until there are none or the device stops.
    pub(super) fn serve(&mut self, backend: &mut dyn Backend, stop: &StopFlag) -> Result<(), QueueError> {
        loop {
            self.queue.silence_driver()?;
            let mut unannounced = 0;
            while !stop.is_set() {
                let Some(taken) = self.queue.take(&mut self.buffers)? else {
                    break;
                };
                let Some(status_address) = self.buffers.writable.split_last_byte() else {
                    return Err(taken.break_queue(QueueError::NoStatus));
                };
                let room = self.buffers.writable.remaining();
                let status = self.execute(backend, stop);
                let written = room - self.buffers.writable.remaining();

                if self.queue.memory().write_obj(status, status_address).is_err() {
                    return Err(taken.break_queue(QueueError::NoStatus));
                }
                self.queue.complete(taken, u32::try_from(written + 1).unwrap_or(u32::MAX))?;

                // Small requests share an interrupt; the driver does not wait for the rest of a long queue.
                unannounced += written as usize;
                if unannounced >= STEP {
                    self.queue.notify_driver()?;
                    unannounced = 0;
                }
            }
            self.queue.notify_driver()?;
            if stop.is_set() || !self.queue.listen_to_driver()? {
                return Ok(());
            }
        }
    }

    /// Carries out the request in the buffers. Returns its status byte.
    fn execute(&mut self, backend: &mut dyn Backend, stop: &StopFlag) -> u8 {
        let status = match self.try_execute(backend, stop) {
            Ok(()) => return VIRTIO_BLK_S_OK as u8,
            Err(failure) => {
                self.stats.record_error(failure.to_string());
                match failure {
                    Failure::Unsupported(_) => VIRTIO_BLK_S_UNSUPP,
                    _ => VIRTIO_BLK_S_IOERR,
                }
            }
        };
        status as u8
    }

    fn try_execute(&mut self, backend: &mut dyn Backend, stop: &StopFlag) -> Result<(), Failure> {
        if !self.buffers.in_memory {
            return Err(Failure::Malformed("a buffer is outside guest memory"));
        }
        let header = self.read_header()?;
        let (incoming, outgoing) = (self.buffers.readable.remaining(), self.buffers.writable.remaining());
        match header.kind {
            VIRTIO_BLK_T_IN if incoming > 0 => Err(Failure::Malformed("a read brings data")),
            VIRTIO_BLK_T_IN => {
                let offset = self.disk_offset(&header, outgoing)?;
                self.read(backend, offset, stop)?;
                add(&self.stats.reads, 1);
                add(&self.stats.read_bytes, outgoing);
                Ok(())
            }
            VIRTIO_BLK_T_OUT if outgoing > 0 => Err(Failure::Malformed("a write asks for data")),
            VIRTIO_BLK_T_OUT if backend.is_read_only() => Err(Failure::Malformed("the disk is read-only")),
            VIRTIO_BLK_T_OUT => {
                let offset = self.disk_offset(&header, incoming)?;
                self.write(backend, offset, stop)?;
                if self.write_through {
                    backend.flush().map_err(Failure::Flush)?;
                }
                add(&self.stats.writes, 1);
                add(&self.stats.written_bytes, incoming);
                Ok(())
            }
            VIRTIO_BLK_T_FLUSH => {
                backend.flush().map_err(Failure::Flush)?;
                add(&self.stats.flushes, 1);
                Ok(())
            }
            VIRTIO_BLK_T_GET_ID => {
                let len = self.id.len().min(usize::try_from(outgoing).unwrap_or(usize::MAX));
                Ok(self.buffers.writable.write(self.queue.memory(), &self.id[..len])?)
            }
            kind => Err(Failure::Unsupported(kind)),
        }
    }

    fn read_header(&mut self) -> Result<Header, Failure> {
        if self.buffers.readable.remaining() < HEADER_LEN as u64 {
            return Err(Failure::Malformed("the header is incomplete"));
        }
        let mut header = [0; HEADER_LEN];
        self.buffers.readable.read(self.queue.memory(), &mut header)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        Ok(Header { kind: u32::from_le_bytes([k0, k1, k2, k3]), sector: u64::from_le_bytes(sector) })
    }

    /// Where on the disk `len` bytes at the header's sector begin, if all of them are on it.
    fn disk_offset(&self, header: &Header, len: u64) -> Result<u64, Failure> {
        if len == 0 || !len.is_multiple_of(SECTOR_SIZE) {
            return Err(Failure::Malformed("the data is not a positive number of whole sectors"));
        }
        header
            .sector
            .checked_mul(SECTOR_SIZE)
            .filter(|offset| offset.checked_add(len).is_some_and(|end| end <= self.capacity))
            .ok_or(Failure::Malformed("the sectors are beyond the end of the disk"))
    }

    fn read(&mut self, backend: &mut dyn Backend, mut offset: u64, stop: &StopFlag) -> Result<(), Failure> {
        while let Some(step) = next_step(self.buffers.writable.remaining(), stop)? {
            let data = &mut self.bounce[..step];
            backend.read_at(offset, data).map_err(host_failure("read", offset, step))?;
            let observer = self.observer.as_deref();
            self.buffers.writable.write_to(self.queue.memory(), data, |address, part| {
                if let Some(observer) = observer {
                    observer.filled(address, part.len(), offset + part.start as u64);
                }
            })?;
            offset += step as u64;
        }
        Ok(())
    }

    fn write(&mut self, backend: &mut dyn Backend, mut offset: u64, stop: &StopFlag) -> Result<(), Failure> {
        while let Some(step) = next_step(self.buffers.readable.remaining(), stop)? {
            let data = &mut self.bounce[..step];
            self.buffers.readable.read(self.queue.memory(), data)?;
            backend.write_at(offset, data).map_err(host_failure("write", offset, step))?;
            offset += step as u64;
        }
        Ok(())
    }
}

/// Bytes of the next step, if anything remains to be moved.
fn next_step(remaining: u64, stop: &StopFlag) -> Result<Option<usize>, Failure> {
    match remaining {
        0 => Ok(None),
        _ if stop.is_set() => Err(Failure::Stopped),
        _ => Ok(Some(usize::try_from(remaining).map_or(STEP, |remaining| remaining.min(STEP)))),
    }
}

fn host_failure(action: &'static str, offset: u64, len: usize) -> impl FnOnce(io::Error) -> Failure {
    move |source| Failure::Host { action, len, sector: offset / SECTOR_SIZE, source }
}
