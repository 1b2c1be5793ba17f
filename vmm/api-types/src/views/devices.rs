//! What a VM's devices other than disks have done.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Counters of an entropy device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RngStatistics {
    /// Requests that were answered.
    pub requests: u64,
    /// Random bytes that the guest got.
    pub bytes: u64,
    /// Requests that were delayed by the device's limits.
    pub throttled: u64,
    /// How often the device broke, and needed a reset.
    pub errors: u64,
}
