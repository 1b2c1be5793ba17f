//! userfaultfd in write-protect mode: a guest's write to a protected page blocks until the page
//! is woken. Nobody reads the fault queue; every window ends with a wake instead, and who was missed is woken
//! by [`wakes`](crate::memory::wakes).
//!
//! See `userfaultfd(2)`, `ioctl_userfaultfd(2)` and the kernel's
//! `Documentation/admin-guide/mm/userfaultfd.rst`.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::memory::ram::RamRange;

const API: u64 = 0xaa;
const IOCTL_NEW: libc::c_ulong = 0xaa00;
const IOCTL_API: libc::c_ulong = 0xc018_aa3f;
const IOCTL_REGISTER: libc::c_ulong = 0xc020_aa00;
const IOCTL_WAKE: libc::c_ulong = 0x8010_aa02;
const IOCTL_WRITE_PROTECT: libc::c_ulong = 0xc018_aa06;

const FEATURE_WRITE_PROTECT: u64 = 1 << 0;
const FEATURE_WRITE_PROTECT_FILES: u64 = 1 << 12;
const FEATURE_WRITE_PROTECT_UNPOPULATED: u64 = 1 << 13;

const REGISTER_MODE_WRITE_PROTECT: u64 = 1 << 1;
const MODE_PROTECT: u64 = 1 << 0;
#[cfg(test)]
const MODE_DO_NOT_WAKE: u64 = 1 << 1;

/// Addresses that [`Userfaultfd::wake_all`] names: all that a process can have, in page tables of four levels,
/// above what `vm.mmap_min_addr` may be.
const ALL: Range = Range { start: 1 << 20, bytes: (1 << 47) - 4096 - (1 << 20) };

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    bytes: u64,
}

#[repr(C)]
struct RegisterArgument {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtectArgument {
    range: Range,
    mode: u64,
}

impl From<RamRange<'_>> for Range {
    fn from(range: RamRange<'_>) -> Self {
        Self { start: range.address() as u64, bytes: range.bytes() as u64 }
    }
}

/// Why pages cannot be write-protected in this process.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// Neither the system call nor the device is permitted.
    #[error(
        "userfaultfd is not permitted: {0}; run as root, give the program CAP_SYS_PTRACE \
         (setcap cap_sys_ptrace+ep), or give its user access to /dev/userfaultfd"
    )]
    NotPermitted(io::Error),
    /// The kernel was built without it.
    #[error("this kernel has no userfaultfd (CONFIG_USERFAULTFD): {0}")]
    Missing(io::Error),
    /// The kernel lacks a feature.
    #[error(
        "userfaultfd of this kernel cannot write-protect {what}: Linux 5.19 or newer with \
         CONFIG_PTE_MARKER_UFFD_WP is needed"
    )]
    Feature {
        /// What cannot be protected.
        what: &'static str,
    },
    /// A call that should have worked did not.
    #[error("setting up userfaultfd: {0}")]
    Setup(#[source] io::Error),
}

/// An open userfaultfd with exactly the features that write protection needs.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
    unpopulated: bool,
}

impl Userfaultfd {
    /// Opens a userfaultfd that also stops writes made by the kernel for this process, as KVM
    /// does on behalf of guests.
    ///
    /// # Errors
    /// See [`UffdError`]; each says how to enable it.
    pub fn open() -> Result<Self, UffdError> {
        let mut api = ApiArgument { api: API, features: 0, ioctls: 0 };
        let probe = open_fd()?;
        // SAFETY: the argument is a live struct of the layout that this ioctl reads and writes.
        unsafe { call(probe.as_raw_fd(), IOCTL_API, &raw mut api) }.map_err(UffdError::Setup)?;
        let offered = api.features;
        if offered & FEATURE_WRITE_PROTECT == 0 {
            return Err(UffdError::Feature { what: "anonymous memory" });
        }
        if offered & FEATURE_WRITE_PROTECT_FILES == 0 {
            return Err(UffdError::Feature { what: "private mappings of files" });
        }
        // Asking for more would bring the event features, which block our own mmap and madvise.
        let unpopulated = offered & FEATURE_WRITE_PROTECT_UNPOPULATED;
        let features = FEATURE_WRITE_PROTECT | FEATURE_WRITE_PROTECT_FILES | unpopulated;
        let fd = open_fd()?;
        let mut api = ApiArgument { api: API, features, ioctls: 0 };
        // SAFETY: as above.
        unsafe { call(fd.as_raw_fd(), IOCTL_API, &raw mut api) }.map_err(UffdError::Setup)?;
        Ok(Self { fd, unpopulated: unpopulated != 0 })
    }

    /// Whether pages that are not populated can be protected (Linux 6.4 and newer). Where not,
    /// protection must be confirmed in the page map.
    #[must_use]
    pub fn protects_unpopulated(&self) -> bool {
        self.unpopulated
    }

    /// Registers pages, so that they can be protected.
    ///
    /// # Errors
    /// What the kernel said, `ENOMEM` among it.
    pub fn register(&self, pages: RamRange<'_>) -> io::Result<()> {
        let mut argument =
            RegisterArgument { range: pages.into(), mode: REGISTER_MODE_WRITE_PROTECT, ioctls: 0 };
        // SAFETY: the argument is a live struct of the layout that this ioctl reads and writes;
        // registration changes no content.
        unsafe { call(self.fd.as_raw_fd(), IOCTL_REGISTER, &raw mut argument) }
    }

    /// From now on writes to these pages block.
    ///
    /// # Errors
    /// `ENOENT` where a part is not registered; a part before it may be protected all the same.
    pub fn protect(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.write_protect(pages, MODE_PROTECT)
    }

    /// Lifts the protection and wakes who waits.
    ///
    /// # Errors
    /// `ENOENT` where a part is not registered.
    pub fn unprotect(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.write_protect(pages, 0)
    }

    fn write_protect(&self, pages: RamRange<'_>, mode: u64) -> io::Result<()> {
        let mut argument = WriteProtectArgument { range: pages.into(), mode };
        // SAFETY: the argument is a live struct of the layout that this ioctl reads; protection
        // changes no content.
        unsafe { call(self.fd.as_raw_fd(), IOCTL_WRITE_PROTECT, &raw mut argument) }
    }

    /// Lets writers that wait for these pages try again.
    ///
    /// # Errors
    /// What the kernel said; it has no reason to refuse a range of pages.
    pub fn wake(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.wake_range(pages.into())
    }

    /// Lets all writers try again, whichever pages they wait for. Takes the same time as one page.
    ///
    /// # Errors
    /// As [`Userfaultfd::wake`].
    pub fn wake_all(&self) -> io::Result<()> {
        self.wake_range(ALL)
    }

    fn wake_range(&self, mut range: Range) -> io::Result<()> {
        // SAFETY: the argument is a live struct of the layout that this ioctl reads.
        unsafe { call(self.fd.as_raw_fd(), IOCTL_WAKE, &raw mut range) }
    }

    /// Lifts the protection and lets who waits sleep on.
    #[cfg(test)]
    pub(crate) fn unprotect_silently(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.write_protect(pages, MODE_DO_NOT_WAKE)
    }
}

impl AsRawFd for Userfaultfd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn open_fd() -> Result<OwnedFd, UffdError> {
    // SAFETY: the call takes flags alone and returns a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd >= 0 {
        // SAFETY: the descriptor is new and nobody else's; descriptors fit in an int.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
    }
    let refused = io::Error::last_os_error();
    if refused.raw_os_error() == Some(libc::ENOSYS) {
        return Err(UffdError::Missing(refused));
    }
    let Ok(device) = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") else {
        return Err(UffdError::NotPermitted(refused));
    };
    // SAFETY: the ioctl takes flags by value and returns a new descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), IOCTL_NEW as _, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(UffdError::NotPermitted(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Repeats an ioctl that was interrupted or met a changing address space.
///
/// # Safety
/// `argument` points to a live struct of the layout that `request` reads and writes.
unsafe fn call<T>(fd: RawFd, request: libc::c_ulong, argument: *mut T) -> io::Result<()> {
    loop {
        // SAFETY: promised by the caller.
        if unsafe { libc::ioctl(fd, request as _, argument) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) => {}
            _ => return Err(error),
        }
    }
}
