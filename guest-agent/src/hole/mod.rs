//! Publishes page types to the host through the memory hole.
//!
//! The kernel's flags of page frames are in `/proc/kpageflags`. The hole is memory that the host provides for
//! them. A kernel parameter gives its address, and the agent maps it from `/dev/mem`. If the kernel forbids
//! that, the agent uses a [`port`]. [`publish`] copies the changed flags, [`serve`] repeats that, and
//! [`check`] compares published flags with the kernel's. [`samepage_hole`] defines the layout.

pub mod check;
pub mod mapping;
pub mod pages;
pub mod port;
pub mod publish;
pub mod serve;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

use samepage_hole::port::{NAME, PARAMETER_VALUE};
use samepage_hole::{FREED_PAGES_ARE_ZERO, FREED_PAGES_MATTER, PARAMETER, parse_parameter};

/// The reason why flags cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host provides no hole for this guest.
    #[error(
        "the host offers no memory hole: there is no {PARAMETER}=BYTES@ADDRESS in /proc/cmdline; \
         start the VM with samepage and --memory-hole on"
    )]
    NoHole,
    /// There is no hole at the address in the command line.
    #[error(
        "there is no memory hole at {address:#x}, which {PARAMETER} names: \
         the host does not describe it there, or in another version"
    )]
    Undescribed {
        /// The guest physical address.
        address: u64,
    },
    /// `/dev/mem` cannot be mapped.
    #[error("map {bytes} bytes at {address:#x} of /dev/mem: {source}{}", memory_hint(source))]
    Memory {
        /// The guest physical address.
        address: u64,
        /// The size in bytes.
        bytes: u64,
        /// The error of the system call.
        source: io::Error,
    },
    /// The host says that it provides a port, but there is none.
    #[error(
        "the host offers the memory hole as a port, and the kernel has found none named {NAME}; it needs \
         CONFIG_VIRTIO_CONSOLE (module virtio_console) and CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES"
    )]
    NoPort,
    /// An operation on the port failed.
    #[error("{what} {}: {source}{}", path.display(), port_hint(source))]
    Port {
        /// The operation.
        what: &'static str,
        /// The device file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The host has closed its end of the port.
    #[error("the host has closed {}", path.display())]
    PortClosed {
        /// The device file.
        path: PathBuf,
    },
    /// The host does not respond at its end of the port.
    #[error("the host does not answer on {}, which may be the port of another program", path.display())]
    Silent {
        /// The device file.
        path: PathBuf,
    },
    /// `/proc/kpageflags` cannot be read.
    #[error("read /proc/kpageflags: {source}{}", flags_hint(source))]
    Flags {
        /// The error of the system call.
        source: io::Error,
    },
    /// `/proc/cmdline` cannot be read.
    #[error("read /proc/cmdline: {0}; mount proc at /proc")]
    CommandLine(#[source] io::Error),
}

impl Error {
    /// Returns whether the error may end by itself: a migrated guest finds its hole again, and a host can
    /// reopen a closed port.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Undescribed { .. } | Self::PortClosed { .. } | Self::Silent { .. })
    }
}

fn memory_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "; the kernel needs CONFIG_DEVMEM, and /dev/mem must exist (mknod /dev/mem c 1 1)"
        }
        io::ErrorKind::PermissionDenied => {
            "; run as root; a locked-down kernel (secure boot, lockdown=) never permits it: start the VM with \
             --memory-hole port then"
        }
        _ => "",
    }
}

fn port_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; run as root",
        io::ErrorKind::ResourceBusy => "; another agent has it open: stop that first",
        _ => "",
    }
}

fn flags_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; the kernel needs CONFIG_PROC_PAGE_MONITOR, and proc must be mounted",
        io::ErrorKind::PermissionDenied => "; run as root, with CAP_SYS_ADMIN",
        _ => "",
    }
}

/// The kernel parameters about the hole and freed pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Size and guest physical address of the hole.
    pub hole: Option<(u64, u64)>,
    /// Whether the host provides a port instead.
    pub port: bool,
    /// The kernel's use of freed pages, as in [`samepage_hole::GuestHeader::features`].
    pub features: u32,
}

impl Parameters {
    /// Returns the parameters of the running kernel.
    ///
    /// # Errors
    /// Fails if they cannot be read.
    pub fn of_kernel() -> Result<Self, Error> {
        std::fs::read_to_string("/proc/cmdline").map(|line| Self::parse(&line)).map_err(Error::CommandLine)
    }

    /// Returns the parameters of a command line. As for the kernel, the part after `--` is for init, and the
    /// last of several equal parameters counts.
    #[must_use]
    pub fn parse(line: &str) -> Self {
        let mut parameters = Self::default();
        for word in line.split_whitespace().take_while(|&word| word != "--") {
            let (name, value) = word.split_once('=').unwrap_or((word, "on"));
            let on = matches!(value, "on" | "1" | "y" | "Y" | "yes");
            match name {
                PARAMETER => {
                    parameters.hole = parse_parameter(value);
                    parameters.port = value == PARAMETER_VALUE;
                }
                // Both check freed pages for the content that they left there.
                "page_poison" | "debug_pagealloc" if on => parameters.features |= FREED_PAGES_MATTER,
                "init_on_free" if on => parameters.features |= FREED_PAGES_ARE_ZERO,
                _ => {}
            }
        }
        parameters
    }
}
