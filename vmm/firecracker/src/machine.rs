//! The interface to the one VM, in this process or in another one.

use std::path::PathBuf;

use samepage_metadata::Detour;
use samepage_spec::{RateLimits, VmSpec};

use super::fault::Fault;

/// The state of the VM, for Firecracker's clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activity {
    Running,
    Paused,
}

/// Counters of a drive since the start.
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

/// Services of this process, each with the name of a network device.
pub(super) type Services = Vec<(String, Box<dyn Detour>)>;

/// A VM that is started once. Faults are messages for the client.
pub(super) trait Machine: Send + Sync {
    /// Whether the guest can reach services of this process.
    fn has_services(&self) -> bool;

    /// Creates the VM and starts it. The console goes to the file, or to this process's standard output. The services
    /// answer at network devices with these names.
    fn start(&self, spec: VmSpec, console: Option<PathBuf>, services: Services) -> Result<(), Fault>;

    /// Returns the state; `None` before the start.
    fn activity(&self) -> Option<Activity>;

    /// Pauses the guest.
    fn pause(&self) -> Result<(), Fault>;

    /// Resumes the guest.
    fn resume(&self) -> Result<(), Fault>;

    /// Presses Ctrl-Alt-Del.
    fn ctrl_alt_del(&self) -> Result<(), Fault>;

    /// Changes the limits of a disk, by its name.
    fn set_limits(&self, disk: &str, limits: RateLimits) -> Result<(), Fault>;

    /// Changes the limits of a network device, by its name: for what the guest receives, and for what it sends.
    fn set_network_limits(
        &self,
        network: &str,
        receive: Option<RateLimits>,
        send: Option<RateLimits>,
    ) -> Result<(), Fault>;

    /// Sets the size of a disk, by its name, to the present size of its image.
    fn resize(&self, disk: &str) -> Result<(), Fault>;

    /// Returns the counters of each disk, by name; none before the start and after the end.
    fn drives(&self) -> Vec<(String, DriveCounts)>;
}
