//! Requests of the driver (virtio 1.2, section 5.2.6): checks them and translates them into the device's
//! terms.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestMemoryError;

use super::{MAX_CLEAR_BYTES, MAX_CLEAR_RANGES, SECTOR_SIZE};
use crate::GuestMemory;
use crate::virtio::chain::Buffers;

/// Length of type, reserved field and sector, in bytes.
const HEADER_LEN: usize = 16;
/// Length of sector, number of sectors and flags, in bytes.
const RANGE_LEN: usize = 16;

/// The reason why a request failed. The guest sees a status byte.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{action} {len} bytes at sector {sector}: {source}")]
    Host { action: &'static str, len: u64, sector: u64, source: io::Error },
    #[error("flush: {0}")]
    Flush(#[source] io::Error),
    #[error("copy to or from guest memory: {0}")]
    Guest(#[from] GuestMemoryError),
    #[error("drop a request: the host has lost a part of guest memory; the VM must end")]
    MemoryLost,
    #[error("refuse a request: {0}")]
    Malformed(&'static str),
    #[error("refuse a request of unknown type {0}")]
    UnknownType(u32),
    #[error("refuse a request: {0}")]
    Unsupported(&'static str),
    #[error("drop a request: the device is being reset")]
    Stopped,
}

impl Failure {
    /// Returns whether the host caused the failure, so that the operator should know.
    pub(super) fn is_host_error(&self) -> bool {
        matches!(self, Self::Host { .. } | Self::Flush(_))
    }

    pub(super) fn is_unsupported(&self) -> bool {
        matches!(self, Self::UnknownType(_) | Self::Unsupported(_))
    }
}

/// The way in which the content of a range is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clearing {
    Discard,
    Zero { unmap: bool },
}

/// The parts of a request that have not begun. Positions are bytes on the disk.
#[derive(Debug)]
pub(super) enum Job {
    Read(Range<u64>),
    Write(Range<u64>),
    Flush,
    GetId,
    Clear {
        how: Clearing,
        ranges: VecDeque<Range<u64>>,
        /// Ranges to fill with zeros.
        fill: VecDeque<Range<u64>>,
    },
}

/// The rules for checking requests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) read_only: bool,
    /// Negotiated feature bits.
    pub(super) features: u64,
}

impl Rules {
    /// Reads the header and the ranges, if there are any, and checks the whole request for a disk of
    /// `capacity` bytes. `buffers` then contains only the data.
    pub(super) fn parse(
        &self,
        buffers: &mut Buffers,
        memory: &GuestMemory,
        capacity: u64,
    ) -> Result<Job, Failure> {
        if !buffers.is_in_memory {
            return Err(Failure::Malformed("a buffer is outside guest memory"));
        }
        if buffers.readable.remaining() < HEADER_LEN as u64 {
            return Err(Failure::Malformed("the header is incomplete"));
        }
        let mut header = [0; HEADER_LEN];
        buffers.readable.read(memory, &mut header)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes(sector));
        let (incoming, outgoing) = (buffers.readable.remaining(), buffers.writable.remaining());
        match kind {
            VIRTIO_BLK_T_IN if incoming > 0 => Err(Failure::Malformed("a read has data of its own")),
            VIRTIO_BLK_T_IN => Ok(Job::Read(bytes_of(sector, outgoing, capacity)?)),
            VIRTIO_BLK_T_OUT if outgoing > 0 => Err(Failure::Malformed("a write has room for data")),
            VIRTIO_BLK_T_OUT if self.read_only => Err(Failure::Malformed("the disk is read-only")),
            VIRTIO_BLK_T_OUT => Ok(Job::Write(bytes_of(sector, incoming, capacity)?)),
            VIRTIO_BLK_T_FLUSH => Ok(Job::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Job::GetId),
            VIRTIO_BLK_T_DISCARD if self.has(VIRTIO_BLK_F_DISCARD) => {
                self.parse_ranges(kind, buffers, memory, capacity)
            }
            VIRTIO_BLK_T_WRITE_ZEROES if self.has(VIRTIO_BLK_F_WRITE_ZEROES) => {
                self.parse_ranges(kind, buffers, memory, capacity)
            }
            kind => Err(Failure::UnknownType(kind)),
        }
    }

    fn has(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }

    fn parse_ranges(
        &self,
        kind: u32,
        buffers: &mut Buffers,
        memory: &GuestMemory,
        capacity: u64,
    ) -> Result<Job, Failure> {
        let len = buffers.readable.remaining();
        let most = u64::from(MAX_CLEAR_RANGES) * RANGE_LEN as u64;
        if buffers.writable.remaining() > 0 || len == 0 || !len.is_multiple_of(RANGE_LEN as u64) || len > most
        {
            return Err(Failure::Malformed("it has no range, too many ranges, or an incomplete range"));
        }
        let mut how = match kind {
            VIRTIO_BLK_T_DISCARD => Clearing::Discard,
            // Unmapping requires that all ranges allow it.
            _ => Clearing::Zero { unmap: true },
        };
        let mut ranges = VecDeque::new();
        while buffers.readable.remaining() > 0 {
            let mut range = [0; RANGE_LEN];
            buffers.readable.read(memory, &mut range)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let len = u64::from(u32::from_le_bytes([n0, n1, n2, n3])) * SECTOR_SIZE;
            let flags = u32::from_le_bytes(flags);
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            match &mut how {
                _ if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 => {
                    return Err(Failure::Unsupported("a range has unknown flags"));
                }
                Clearing::Discard if unmap => {
                    return Err(Failure::Unsupported("a range to discard has the unmap flag"));
                }
                Clearing::Zero { unmap: all } => *all &= unmap,
                Clearing::Discard => {}
            }
            if len > MAX_CLEAR_BYTES {
                return Err(Failure::Malformed("a range is longer than the device allows"));
            }
            ranges.push_back(bytes_of(sector, len, capacity)?);
        }
        if self.read_only {
            return Err(Failure::Malformed("the disk is read-only"));
        }
        Ok(Job::Clear { how, ranges, fill: VecDeque::new() })
    }
}

/// Returns the bytes of `len` bytes at `sector`, if all of them are on a disk of `capacity` bytes.
fn bytes_of(sector: u64, len: u64, capacity: u64) -> Result<Range<u64>, Failure> {
    if len == 0 || !len.is_multiple_of(SECTOR_SIZE) {
        return Err(Failure::Malformed("the data is not a positive number of whole sectors"));
    }
    sector
        .checked_mul(SECTOR_SIZE)
        .and_then(|start| Some(start..start.checked_add(len)?))
        .filter(|range| range.end <= capacity)
        .ok_or(Failure::Malformed("the sectors are beyond the end of the disk"))
}

impl Job {
    /// Returns whether all parts have begun.
    pub(super) fn is_begun(&self) -> bool {
        match self {
            Self::Read(range) | Self::Write(range) => range.is_empty(),
            Self::Flush | Self::GetId => false,
            Self::Clear { ranges, fill, .. } => ranges.is_empty() && fill.is_empty(),
        }
    }

    /// Returns the ranges that the request changes.
    pub(super) fn changes(&self) -> Vec<Range<u64>> {
        match self {
            Self::Write(range) => vec![range.clone()],
            Self::Clear { ranges, .. } => ranges.iter().cloned().collect(),
            Self::Read(_) | Self::Flush | Self::GetId => Vec::new(),
        }
    }

    /// Returns the number of bytes that count towards the disk's limit.
    pub(super) fn cost(&self) -> u64 {
        match self {
            Self::Read(range) | Self::Write(range) => range.end - range.start,
            _ => 0,
        }
    }
}
