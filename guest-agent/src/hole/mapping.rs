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

/// A range of physical memory, mapped.
#[derive(Debug)]
struct Physical {
    address: *mut c_void,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only reached by atomic or volatile
// accesses.
unsafe impl Send for Physical {}

impl Physical {
    fn map(memory: &File, address: u64, bytes: u64) -> Result<Self, Error> {
        let failed = |source: io::Error| Error::Memory { address, bytes, source };
        let length = usize::try_from(bytes).ok().filter(|&length| length > 0);
        let length = length.ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice takes nothing's place.
        let mapped = unsafe { mmap(ptr::null_mut(), length, protection, MapFlags::SHARED, memory, address) };
        Ok(Self { address: mapped.map_err(|error| failed(error.into()))?, bytes: length })
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and what borrowed it is gone. Nothing is left to be done
        // where it fails.
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
    /// Maps the hole of this size at this guest physical address, and the doorbell that it names.
    ///
    /// # Errors
    /// `/dev/mem` is refused, or there is no hole.
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

    /// The hole as the host describes it now.
    ///
    /// # Errors
    /// It does not.
    pub fn hole(&self) -> Result<Hole<'_>, Error> {
        // SAFETY: the mapping is of so many bytes and begins at a page; words that others write as well are
        // what atomics are for.
        let words = unsafe {
            std::slice::from_raw_parts(self.words.address.cast::<AtomicU32>(), self.words.bytes / 4)
        };
        Hole::described(words).ok_or(Error::Undescribed { address: self.address })
    }

    /// What the host says in the hole.
    ///
    /// # Errors
    /// Nothing.
    pub fn header(&self) -> Result<HostHeader, Error> {
        self.hole()?.host_header().ok_or(Error::Undescribed { address: self.address })
    }

    /// Tells the host that a pass is over.
    pub fn ring(&self) {
        if let Some(doorbell) = &self.doorbell {
            // SAFETY: the page is mapped, and a write to it changes no memory.
            unsafe { doorbell.address.cast::<u32>().write_volatile(1) };
        }
    }
}
