//! Telling the host what the guest's pages are for, through the memory hole.
//!
//! The kernel counts page frames and flags them in `/proc/kpageflags`; the hole is memory that the host
//! gave the guest for this, found by a parameter on the kernel's command line and mapped from `/dev/mem`, or
//! where that is forbidden reached over a [`port`]. [`publish`] copies the flags that changed, [`serve`] does
//! so again and again, [`check`] sees whether the flags that are published are those of the kernel. The layout
//! of the hole is that of [`samepage_hole`].

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

/// Why flags cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host gives this guest no hole.
    #[error(
        "the host offers no memory hole: there is no {PARAMETER}=BYTES@ADDRESS in /proc/cmdline; \
         start the VM with samepage and --memory-hole on"
    )]
    NoHole,
    /// What the command line names is no hole.
    #[error(
        "there is no memory hole at {address:#x}, which {PARAMETER} names: \
         the host does not describe it there, or in another version"
    )]
    Undescribed {
        /// Its guest physical address.
        address: u64,
    },
    /// `/dev/mem` was refused.
    #[error("map {bytes} bytes at {address:#x} of /dev/mem: {source}{}", memory_hint(source))]
    Memory {
        /// Guest physical address.
        address: u64,
        /// How many bytes.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host says that it offers a port, and there is none.
    #[error(
        "the host offers the memory hole as a port, and the kernel has found none named {NAME}; it needs \
         CONFIG_VIRTIO_CONSOLE (module virtio_console) and CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES"
    )]
    NoPort,
    /// The port was refused.
    #[error("{what} {}: {source}{}", path.display(), port_hint(source))]
    Port {
        /// What was to be done.
        what: &'static str,
        /// The device file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host has closed its end of the port.
    #[error("the host has closed {}", path.display())]
    PortClosed {
        /// The device file.
        path: PathBuf,
    },
    /// The host does nothing at its end of the port.
    #[error("the host does not answer on {}, which may be the port of another program", path.display())]
    Silent {
        /// The device file.
        path: PathBuf,
    },
    /// `/proc/kpageflags` was refused.
    #[error("read /proc/kpageflags: {source}{}", flags_hint(source))]
    Flags {
        /// What the kernel said.
        source: io::Error,
    },
    /// `/proc/cmdline` was refused.
    #[error("read /proc/cmdline: {0}; mount proc at /proc")]
    CommandLine(#[source] io::Error),
}

impl Error {
    /// Whether it may be over by itself: a guest that was moved finds a hole again, a host that has closed a
    /// port opens it again.
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

/// What the kernel's command line says of the hole and of freed pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Size and guest physical address of the hole.
    pub hole: Option<(u64, u64)>,
    /// The host offers a port instead.
    pub port: bool,
    /// What freed pages mean to the kernel, as in [`samepage_hole::GuestHeader::features`].
    pub features: u32,
}

impl Parameters {
    /// Those of the running kernel.
    ///
    /// # Errors
    /// That of reading them.
    pub fn of_kernel() -> Result<Self, Error> {
        std::fs::read_to_string("/proc/cmdline").map(|line| Self::parse(&line)).map_err(Error::CommandLine)
    }

    /// Those of a command line. As for the kernel, what follows `--` is for init, and the last of several
    /// counts.
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
                // Both check freed pages for what they left there.
                "page_poison" | "debug_pagealloc" if on => parameters.features |= FREED_PAGES_MATTER,
                "init_on_free" if on => parameters.features |= FREED_PAGES_ARE_ZERO,
                _ => {}
            }
        }
        parameters
    }
}
