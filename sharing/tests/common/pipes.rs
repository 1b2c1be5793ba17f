//! Pages that the kernel reads for a device, as it does for direct writes to a disk.
#![allow(dead_code, reason = "each test binary uses its part")]
#![expect(unsafe_code, reason = "has the kernel hold on to a guest's page")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use samepage_sharing::PAGE_SIZE;

use super::{Guest, word};

/// A page of a guest's that the kernel holds on to, until the device has read it.
pub(crate) struct Spliced {
    device: File,
    _kernel: OwnedFd,
}

impl Spliced {
    pub(crate) fn new(guest: &Guest, page: u32) -> Self {
        let mut ends = [0; 2];
        // SAFETY: writes two descriptors to memory of ours.
        let made = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) };
        assert_eq!(made, 0, "{}", io::Error::last_os_error());
        // SAFETY: both are new and nobody else's.
        let [device, kernel] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
        let base = guest.ram.range(page, 1).page(0).cast_mut().cast();
        let vector = libc::iovec { iov_base: base, iov_len: PAGE_SIZE };
        // SAFETY: the page is mapped readable; the kernel takes a reference to it.
        let spliced = unsafe { libc::vmsplice(kernel.as_raw_fd(), &raw const vector, 1, 0) };
        assert_eq!(spliced, PAGE_SIZE as isize, "{}", io::Error::last_os_error());
        Self { device: device.into(), _kernel: kernel }
    }

    /// The device reads the page: asserts that it has the content named `seed`.
    pub(crate) fn check(mut self, seed: u64) {
        let mut page = [0; PAGE_SIZE];
        self.device.read_exact(&mut page).unwrap();
        for (index, bytes) in page.as_chunks::<8>().0.iter().enumerate() {
            let found = u64::from_ne_bytes(*bytes);
            assert_eq!(found, word(seed, index), "written to a disk, word {index}, content {seed:#x}");
        }
    }
}

/// A page that the kernel reads for a device.
pub(crate) struct Pinned {
    pub(crate) vm: u64,
    pub(crate) page: u32,
    pub(crate) seed: u64,
    pub(crate) spliced: Spliced,
}
