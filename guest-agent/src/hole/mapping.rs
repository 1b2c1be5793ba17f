//! The hole in this process's address space.

#![expect(unsafe_code, reason = "maps physical memory and looks at it as words")]

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io;
use std::ptr;
use std::sync::atomic::AtomicU32;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use samepage_hole::{Hole, HostHeader, PAGE_BYTES};

use super::Error;

/// A mapped range of physical memory.
#[derive(Debug)]
struct Physical {
    address: *mut c_void,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread. It is only accessed with atomic or volatile
// accesses.
unsafe impl Send for Physical {}

impl Physical {
    fn map(memory: &File, address: u64, bytes: u64) -> Result<Self, Error> {
        let failed = |source: io::Error| Error::Memory { address, bytes, source };
        let length = usize::try_from(bytes).ok().filter(|&length| length > 0);
        let length = length.ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces no other.
        let mapped = unsafe { mmap(ptr::null_mut(), length, protection, MapFlags::SHARED, memory, address) };
        Ok(Self { address: mapped.map_err(|error| failed(error.into()))?, bytes: length })
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and no borrow of it is left. If the call fails, nothing
        // can be done.
        let _ = unsafe { munmap(self.address, self.bytes) };
    }
}

/// The hole and its doorbell.
#[derive(Debug)]
pub struct Mapping {
    words: Physical,
    doorbell: Option<Physical>,
    address: u64,
}

impl Mapping {
    /// Maps the hole of this size at this guest physical address, and the doorbell in its header.
    ///
    /// # Errors
    /// Fails if `/dev/mem` cannot be mapped, or if there is no hole.
    pub fn open(bytes: u64, address: u64) -> Result<Self, Error> {
        let memory = OpenOptions::new().read(true).write(true).open("/dev/mem");
        let memory = memory.map_err(|source| Error::Memory { address, bytes, source })?;
        let words = Physical::map(&memory, address, bytes)?;
        let mut mapping = Self { words, doorbell: None, address };
        let doorbell = mapping.header()?.doorbell;
        if doorbell != 0 {
            mapping.doorbell = Some(Physical::map(&memory, doorbell, PAGE_BYTES)?);
        }
        Ok(mapping)
    }

    /// Returns the hole according to the host's present header.
    ///
    /// # Errors
    /// Fails if the header is invalid.
    pub fn hole(&self) -> Result<Hole<'_>, Error> {
        // SAFETY: the mapping has this length and begins at a page. Atomics allow that others write the words
        // too.
        let words = unsafe {
            std::slice::from_raw_parts(self.words.address.cast::<AtomicU32>(), self.words.bytes / 4)
        };
        Hole::described(words).ok_or(Error::Undescribed { address: self.address })
    }

    /// Returns the host's header.
    ///
    /// # Errors
    /// Fails if the header is invalid.
    pub fn header(&self) -> Result<HostHeader, Error> {
        self.hole()?.host_header().ok_or(Error::Undescribed { address: self.address })
    }

    /// Rings the doorbell at the end of a pass.
    pub fn ring(&self) {
        if let Some(doorbell) = &self.doorbell {
            // SAFETY: the page is mapped, and a write to it changes no memory.
            unsafe { doorbell.address.cast::<u32>().write_volatile(1) };
        }
    }
}
