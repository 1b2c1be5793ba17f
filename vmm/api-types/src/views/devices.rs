//! What a VM's devices other than disks have done.

use samepage_spec::{Mac, RateLimits};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A network device of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NetworkView {
    /// The name of the device within the VM.
    pub id: String,
    /// The host's interface, if its name is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// The address of the guest's interface.
    pub mac: Mac,
    /// Whether frames pass. A link is down if a user took it down, or if the host's interface is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_up: Option<bool>,
    /// Limits per second for what the guest receives.
    pub receive: RateLimits,
    /// Limits per second for what the guest sends.
    pub send: RateLimits,
    /// Remarks on the host's interface, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<String>,
    /// Counters since the last boot; absent after the VM's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics: Option<NetworkStatistics>,
}

/// Counters of a network device. Directions are the guest's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NetworkStatistics {
    /// Frames that the guest received.
    pub received_frames: u64,
    /// Bytes of these frames.
    pub received_bytes: u64,
    /// Frames for the guest that were dropped.
    pub received_dropped: u64,
    /// Frames that the guest sent.
    pub sent_frames: u64,
    /// Bytes of these frames.
    pub sent_bytes: u64,
    /// Frames of the guest that were dropped: the link refused them, or they were malformed.
    pub sent_dropped: u64,
    /// Frames that were delayed by the limits.
    pub throttled: u64,
    /// How often the device broke, or its link.
    pub errors: u64,
    /// The last error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// Counters of a socket device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VsockStatistics {
    /// Connections that were opened, in both directions.
    pub connections: u64,
    /// Those of them that are over.
    pub ended: u64,
    /// Connections that were refused, ended or broken by the device.
    pub resets: u64,
    /// Programs of the host that were turned away because they said no port in time, or the guest did not answer.
    pub timeouts: u64,
    /// Packets for the guest.
    pub received_packets: u64,
    /// Bytes of data for the guest.
    pub received_bytes: u64,
    /// Packets of the guest.
    pub sent_packets: u64,
    /// Bytes of data of the guest.
    pub sent_bytes: u64,
    /// How often the device broke, and needed a reset.
    pub errors: u64,
}

/// Counters of an entropy device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
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
