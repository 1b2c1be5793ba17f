//! What the one VM is asked for, wherever it runs.

use std::path::PathBuf;

use samepage_api_types::disk_spec::LimitsSpec;
use samepage_api_types::spec::VmSpec;

use super::fault::Fault;

/// What the VM does, as Firecracker's clients know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activity {
    Running,
    Paused,
}

/// What a drive did since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DriveCounts {
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) flushes: u64,
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
    pub(super) errors: u64,
    pub(super) throttled: u64,
}

/// A VM that is made once. Where something cannot be done, the message is for the client.
pub(super) trait Machine: Send + Sync {
    /// Makes the VM and lets it run. Its console goes to a file where there is one, otherwise it is that of
    /// this process.
    fn start(&self, spec: VmSpec, console: Option<PathBuf>) -> Result<(), Fault>;

    /// What it does; `None` before it is started.
    fn activity(&self) -> Option<Activity>;

    /// Holds the guest.
    fn pause(&self) -> Result<(), Fault>;

    /// Lets the guest go on.
    fn resume(&self) -> Result<(), Fault>;

    /// Presses Ctrl-Alt-Del.
    fn ctrl_alt_del(&self) -> Result<(), Fault>;

    /// Changes what a disk, by its name, may do a second.
    fn set_limits(&self, disk: &str, limits: LimitsSpec) -> Result<(), Fault>;

    /// Has a disk, by its name, take over the size that its image has now.
    fn resize(&self, disk: &str) -> Result<(), Fault>;

    /// What each disk did, by name. None of them before the start, and after the end.
    fn drives(&self) -> Vec<(String, DriveCounts)>;
}
