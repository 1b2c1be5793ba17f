//! The reasons why a VM cannot be created, or cannot carry out a client's request.

use std::io;
use std::path::PathBuf;

use samepage_api_types::lifecycle::{Action, State};
use samepage_machine::config::ConfigError;
use samepage_machine::vm::{VmEnd, VmError};
use samepage_worker::pool::BuildError;
use thiserror::Error;

use crate::host_limits::Overcommitted;

/// An error of the registry. Each message names the VM or the file that it concerns.
#[derive(Debug, Error)]
pub enum HostError {
    /// The registry has no VM of this name.
    #[error("there is no VM named {0}")]
    NoSuchVm(String),
    /// The VM's state does not allow the action.
    #[error("VM {vm} is {}, and `{}` is not possible in this state", .state.name(), .action.name())]
    Illegal {
        /// The VM's name.
        vm: String,
        /// The VM's state.
        state: State,
        /// The action that was asked for.
        action: Action,
    },
    /// The VM ended during the action.
    #[error("VM {vm} ended before `{}` was done: {end}", .action.name())]
    EndedMeanwhile {
        /// The VM's name.
        vm: String,
        /// The action that was asked for.
        action: Action,
        /// How the VM ended.
        end: VmEnd,
    },
    /// A value in the description of a VM, which its machine would not accept.
    #[error("VM {vm}: {source}")]
    Config {
        /// The VM's name.
        vm: String,
        /// The value and its fault.
        source: ConfigError,
    },
    /// The machine cannot be built.
    #[error("VM {vm}: {source}")]
    Build {
        /// The VM's name.
        vm: String,
        /// The step that failed.
        source: VmError,
    },
    /// The machine cannot be built in a worker process.
    #[error("VM {vm}: {source}")]
    Worker {
        /// The VM's name.
        vm: String,
        /// The step that failed.
        source: BuildError,
    },
    /// The file of a disk is missing or cannot be inspected.
    #[error("VM {vm}: disk {path}: {source}")]
    Disk {
        /// The VM's name.
        vm: String,
        /// The disk's file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// Two disks have one file, and at least one of them writes to it.
    #[error(
        "disk {path} is used {}, and not by both as readonly: they would damage it; give each VM an image of its \
         own, or add readonly to both", by_both(.first, .second)
    )]
    SharedDisk {
        /// The disks' file.
        path: PathBuf,
        /// The VM of the first disk.
        first: String,
        /// The VM of the second disk; may be the same VM.
        second: String,
    },
    /// Two network devices have one tap.
    #[error("tap {tap} is used {}; give each network device a tap of its own", by_both(.first, .second))]
    SharedTap {
        /// The tap's name, or its file.
        tap: String,
        /// The VM of the first device.
        first: String,
        /// The VM of the second device; may be the same VM.
        second: String,
    },
    /// Two network devices publish one port of the host.
    #[error("the host's port {port} is published {}; give each a port of its own", by_both(.first, .second))]
    SharedPort {
        /// The port, as in the description of the second.
        port: String,
        /// The VM of the first device.
        first: String,
        /// The VM of the second device; may be the same VM.
        second: String,
    },
    /// Two socket devices have one socket.
    #[error("socket {path} is used {}; give each VM a path of its own", by_both(.first, .second))]
    SharedSocket {
        /// The socket.
        path: PathBuf,
        /// The VM of the first device.
        first: String,
        /// The VM of the second device.
        second: String,
    },
    /// Two consoles have one file.
    #[error("console file {path} is used {}; give each VM a file of its own", by_both(.first, .second))]
    SharedConsole {
        /// The consoles' file.
        path: PathBuf,
        /// The VM of the first console.
        first: String,
        /// The VM of the second console.
        second: String,
    },
    /// The folder of a console's file is missing.
    #[error("VM {vm}: console {path}: {source}; make the folder, or give another path")]
    ConsoleFolder {
        /// The VM's name.
        vm: String,
        /// The console's file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The folder of an image that will be created is missing.
    #[error("VM {vm}: create disk {path}: {source}; make the folder, or give another path")]
    ImageFolder {
        /// The VM's name.
        vm: String,
        /// The image.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The process cannot watch one more VM.
    #[error("watch the VMs: {0}; raise the limit of open files (ulimit -n)")]
    Watch(#[from] io::Error),
    /// The host has too little memory.
    #[error(transparent)]
    Overcommitted(#[from] Overcommitted),
    /// The VM shares no memory; the second field says why.
    #[error("the memory of VM {0} is not shared: {1}")]
    NotSharing(String, &'static str),
    /// The guest reads nothing from its keyboard, so it cannot be asked to end.
    #[error("the guest of VM {0} reads nothing from its keyboard")]
    NotListening(String),
    /// The process is ending and makes no more VMs.
    #[error("the process is ending")]
    Closing,
}

fn by_both(first: &str, second: &str) -> String {
    if first == second { format!("twice by VM {first}") } else { format!("by VM {first} and by VM {second}") }
}

impl HostError {
    /// Returns a hint about templates in paths, to be appended to the message, where templates would help.
    #[must_use]
    pub fn hint_of_templates(&self) -> Option<&'static str> {
        let shared = matches!(
            self,
            Self::SharedDisk { .. }
                | Self::SharedTap { .. }
                | Self::SharedPort { .. }
                | Self::SharedSocket { .. }
                | Self::SharedConsole { .. }
        );
        shared.then_some(
            " ({index} in a path, a tap or a published port stands for each VM's number, and {name} in a path or a tap \
             for its name)",
        )
    }
}
