//! The frame store as a process has it mapped: where the contents of frames can be read.

#![expect(unsafe_code, reason = "maps the memory file of the store")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;

use crate::memory::loss::{self, Watch};
use crate::memory::ram::PAGE_SIZE;
use crate::numbers::Frame;

/// What a process may do with the frames that it has mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read them.
    Read,
    /// Fill them as well: the engine alone does.
    Write,
}

/// A mapping of all frames of a store. The mapping occupies nothing, and ends with this value.
#[derive(Debug)]
pub(crate) struct FrameView {
    base: NonNull<u8>,
    bytes: usize,
    /// Notes what of it the host cannot supply.
    watch: Watch,
}

// SAFETY: the mapping is memory of the store's own; nothing in it is tied to a thread.
unsafe impl Send for FrameView {}
// SAFETY: as above; who reads or writes the memory behind it answers for that access.
unsafe impl Sync for FrameView {}

impl FrameView {
    /// Maps the memory file of a store with room for so many frames.
    ///
    /// # Errors
    /// Fails if the kernel refuses the mapping, or the handler for lost memory cannot be had.
    pub(crate) fn map(file: &OwnedFd, frames: u32, access: Access) -> io::Result<Self> {
        let bytes = frames as usize * PAGE_SIZE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let access = match access {
            Access::Read => libc::PROT_READ,
            Access::Write => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: a new mapping, which replaces nothing.
        let mapped = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, file.as_raw_fd(), 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base: NonNull<u8> =
            NonNull::new(mapped.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: the mapping belongs to this value, which ends the watch before it unmaps. Frames are reached by
        // address, and whoever has read one asks whether they are lost.
        let watch = unsafe { loss::watch(base.as_ptr().addr(), bytes) }.inspect_err(|_| {
            // SAFETY: the range was just mapped, and nobody knows its address.
            unsafe { libc::munmap(mapped, bytes) };
        })?;
        Ok(Self { base, bytes, watch })
    }

    /// Returns where a frame is. A frame that is free must not be read: a read of a hole takes memory.
    pub(crate) fn frame(&self, frame: Frame) -> *mut u8 {
        self.base.as_ptr().wrapping_add(frame.number() as usize * PAGE_SIZE)
    }

    /// Returns how many frames there is room for.
    pub(crate) fn count(&self) -> u32 {
        (self.bytes / PAGE_SIZE) as u32
    }

    /// Whether the host could not supply a frame. What was read from frames may be zeros then, which are nobody's
    /// content: see [`loss`] for when to ask.
    pub(crate) fn lost(&self) -> bool {
        self.watch.lost()
    }
}

impl Drop for FrameView {
    fn drop(&mut self) {
        self.watch.end();
        // SAFETY: the range was mapped by `map`, and nobody keeps addresses into it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
