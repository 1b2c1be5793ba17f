//! Descriptor chains, converted once into plain lists of memory ranges.
//!
//! Each descriptor is read from guest memory once, so later changes of the table have no effect. The lists
//! are reused for the next chain. Their length is at most that of the longest allowed chain.
//!
//! Devices must not rely on the boundaries between descriptors (virtio 1.2, section 2.7.4). So a chain is
//! offered as a stream of bytes to read followed by a stream of bytes to write.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, Permissions};

use crate::GuestMemory;

/// The reason why a chain cannot be used at all, not even to report an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChainError {
    /// The chain has a loop, leaves its table, or its table is not in guest memory.
    #[error("the chain does not end within its descriptor table")]
    Endless,
    /// The chain has more descriptors than the device allows.
    #[error("the chain is longer than the {0} descriptors that the device allows")]
    TooLong(usize),
    /// A device-readable descriptor after a device-writable one.
    #[error("the chain has a device-readable descriptor after a device-writable one")]
    Disordered,
}

/// Ranges of guest memory, read or written from front to back.
#[derive(Clone, Debug, Default)]
pub(crate) struct Segments {
    ranges: Vec<(GuestAddress, usize)>,
    /// The index of the next range, and the offset within it.
    next: usize,
    offset: usize,
    remaining: u64,
}

impl Segments {
    fn clear(&mut self) {
        self.ranges.clear();
        self.next = 0;
        self.offset = 0;
        self.remaining = 0;
    }

    fn push(&mut self, address: GuestAddress, len: u32) {
        if len > 0 {
            self.ranges.push((address, len as usize));
            self.remaining += u64::from(len);
        }
    }

    /// Returns the number of remaining bytes.
    pub(crate) fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Returns all ranges, in the driver's order, whatever was read or written of them.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        self.ranges.iter().copied()
    }

    /// Removes the last byte and returns its address. To be called before anything is read or written.
    pub(crate) fn split_last_byte(&mut self) -> Option<GuestAddress> {
        let (address, len) = self.ranges.last_mut()?;
        *len -= 1;
        self.remaining -= 1;
        let last = GuestAddress(address.0.checked_add(*len as u64)?);
        if *len == 0 {
            self.ranges.pop();
        }
        Some(last)
    }

    /// Copies the next `data.len()` bytes out of guest memory.
    pub(crate) fn read(&mut self, memory: &GuestMemory, data: &mut [u8]) -> Result<(), GuestMemoryError> {
        let mut done = 0;
        while let Some((address, len)) = self.advance(data.len() - done)? {
            memory.read_slice(&mut data[done..done + len], address)?;
            done += len;
        }
        Ok(())
    }

    /// Copies `data` to the next `data.len()` bytes of guest memory.
    pub(crate) fn write(&mut self, memory: &GuestMemory, data: &[u8]) -> Result<(), GuestMemoryError> {
        let mut done = 0;
        while let Some((address, len)) = self.advance(data.len() - done)? {
            memory.write_slice(&data[done..done + len], address)?;
            done += len;
        }
        Ok(())
    }

    /// Takes the next `len` bytes as ranges, and joins adjacent ranges.
    pub(crate) fn take(&mut self, len: usize) -> Result<Vec<(GuestAddress, usize)>, GuestMemoryError> {
        let mut ranges: Vec<(GuestAddress, usize)> = Vec::new();
        let mut left = len;
        while let Some((address, len)) = self.advance(left)? {
            left -= len;
            match ranges.last_mut() {
                Some((start, before)) if start.0.checked_add(*before as u64) == Some(address.0) => {
                    *before += len
                }
                _ => ranges.push((address, len)),
            }
        }
        Ok(ranges)
    }

    /// Returns the next contiguous range of at most `wanted` bytes. Returns `None` if `wanted` is 0.
    fn advance(&mut self, wanted: usize) -> Result<Option<(GuestAddress, usize)>, GuestMemoryError> {
        if wanted == 0 {
            return Ok(None);
        }
        let Some(&(start, len)) = self.ranges.get(self.next) else {
            return Err(GuestMemoryError::PartialBuffer { expected: wanted, completed: 0 });
        };
        let address = start
            .0
            .checked_add(self.offset as u64)
            .map(GuestAddress)
            .ok_or(GuestMemoryError::InvalidGuestAddress(start))?;
        let step = wanted.min(len - self.offset);
        self.offset += step;
        self.remaining -= step as u64;
        if self.offset == len {
            self.next += 1;
            self.offset = 0;
        }
        Ok(Some((address, step)))
    }
}

/// The buffers of one chain.
#[derive(Debug)]
pub(crate) struct Buffers {
    /// Data from the driver to the device.
    pub(crate) readable: Segments,
    /// Memory for the device's answer.
    pub(crate) writable: Segments,
    /// Whether every range lies in guest memory.
    pub(crate) is_in_memory: bool,
    limit: usize,
}

impl Buffers {
    /// Returns buffers for chains of up to `limit` descriptors.
    pub(crate) fn new(limit: usize) -> Self {
        Self { readable: Segments::default(), writable: Segments::default(), is_in_memory: true, limit }
    }

    /// Replaces the contents with the descriptors of `chain`, whose buffers lie in `memory`.
    pub(crate) fn load(
        &mut self,
        memory: &GuestMemory,
        chain: DescriptorChain<&GuestMemory>,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        self.is_in_memory = true;

        let mut count = 0;
        // The iterator of virtio-queue ends in the same way at a broken link and at the end of the chain. The
        // chain is complete if the last returned descriptor has no successor.
        let mut whole = false;
        for descriptor in chain {
            count += 1;
            if count > self.limit {
                return Err(ChainError::TooLong(self.limit));
            }
            whole = !descriptor.has_next();
            let (address, len) = (descriptor.addr(), descriptor.len());
            let access = if descriptor.is_write_only() {
                self.writable.push(address, len);
                Permissions::Write
            } else if self.writable.remaining() == 0 {
                self.readable.push(address, len);
                Permissions::Read
            } else {
                return Err(ChainError::Disordered);
            };
            self.is_in_memory &= memory.check_range(address, len as usize, access);
        }
        if whole { Ok(()) } else { Err(ChainError::Endless) }
    }
}
