//! What the policy sees of a host, and does there.

use std::time::Duration;

use samepage_sharing::blocks::available::Room;

use crate::ends::MachineNumber;

/// What the policy sees and does.
pub(crate) trait Host {
    /// The time since some moment.
    fn now(&self) -> Duration;
    /// Measures the memory that is to be had.
    fn room(&mut self) -> Room;
    /// Measures the private memory of a VM, in bytes; `None` if that cannot be done now.
    fn private(&mut self, vm: MachineNumber) -> Option<u64>;
    /// Returns how many faults the vCPUs have had; `None` if that cannot be told.
    fn faults(&mut self, vm: MachineNumber) -> Option<u64>;
    /// Holds the vCPUs, without waiting.
    fn withhold(&mut self, vm: MachineNumber);
    /// Lets the vCPUs run again.
    fn release(&mut self, vm: MachineNumber);
}

/// A VM, as it is described to the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Guest {
    pub(crate) number: MachineNumber,
    /// The size of its memory, in bytes.
    pub(crate) memory: u64,
    /// The weight of its grants against those of others.
    pub(crate) weight: u32,
    pub(crate) vcpus: u32,
    /// What one fault makes private at most, in bytes.
    pub(crate) page: u64,
    /// The user has it run.
    pub(crate) runs: bool,
}
