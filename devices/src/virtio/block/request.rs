//! Requests as the driver words them (virtio 1.2, section 5.2.6), checked and put into the device's terms.

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

/// Type, reserved, sector.
const HEADER_LEN: usize = 16;
/// Sector, number of sectors, flags.
const RANGE_LEN: usize = 16;

/// Why a request failed; the guest sees a status byte.
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
    /// The host is at fault, and whoever runs it should know.
    pub(super) fn is_trouble(&self) -> bool {
        matches!(self, Self::Host { .. } | Self::Flush(_))
    }

    pub(super) fn is_unsupported(&self) -> bool {
        matches!(self, Self::UnknownType(_) | Self::Unsupported(_))
    }
}

/// How the content of a range is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clearing {
    Discard,
    Zero { unmap: bool },
}

/// What is left to be begun of a request. Positions are bytes on the disk.
#[derive(Debug)]
pub(super) enum Job {
    Read(Range<u64>),
    Write(Range<u64>),
    Flush,
    GetId,
    Clear {
        how: Clearing,
        ranges: VecDeque<Range<u64>>,
        /// Ranges that zeroes are to be written to.
        fill: VecDeque<Range<u64>>,
    },
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) read_only: bool,
    /// Negotiated feature bits.
    pub(super) features: u64,
}

impl Rules {
    /// Reads the header, and the ranges if there are any, and checks the request as a whole, on a disk of
    /// `capacity` bytes. What is left in `buffers` is the data.
    pub(super) fn parse(
        &self,
        buffers: &mut Buffers,
        memory: &GuestMemory,
        capacity: u64,
    ) -> Result<Job, Failure> {
        if !buffers.in_memory {
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
            // All ranges have to allow it.
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

/// Where `len` bytes at `sector` are, if all of them are on a disk of `capacity` bytes.
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
    /// Nothing is left to be begun.
    pub(super) fn is_begun(&self) -> bool {
        match self {
            Self::Read(range) | Self::Write(range) => range.is_empty(),
            Self::Flush | Self::GetId => false,
            Self::Clear { ranges, fill, .. } => ranges.is_empty() && fill.is_empty(),
        }
    }

    /// The ranges that the request changes.
    pub(super) fn changes(&self) -> Vec<Range<u64>> {
        match self {
            Self::Write(range) => vec![range.clone()],
            Self::Clear { ranges, .. } => ranges.iter().cloned().collect(),
            Self::Read(_) | Self::Flush | Self::GetId => Vec::new(),
        }
    }

    /// Bytes that count against the disk's limit.
    pub(super) fn cost(&self) -> u64 {
        match self {
            Self::Read(range) | Self::Write(range) => range.end - range.start,
            _ => 0,
        }
    }
}
