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

/// A memory balloon, by which a guest gives memory back to the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BalloonView {
    /// The memory that the guest is asked to give up.
    pub size_bytes: u64,
    /// The memory that it has given up, as it says; absent after the VM's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual_bytes: Option<u64>,
    /// Whether the guest has a driver for the balloon; absent after the VM's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active: Option<bool>,
    /// Whether the guest may take memory back before it kills a program for want of memory.
    pub deflate_on_oom: bool,
    /// Whether the guest reports memory as it becomes free.
    pub reporting: bool,
    /// Whether the guest can be asked for hints at free memory.
    pub hinting: bool,
    /// The time between two questions for statistics of the guest's memory, in seconds; 0 if there are none.
    pub stats_interval: u32,
    /// The state of hints, if the guest can be asked for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hints: Option<HintsView>,
    /// Counters since the last boot; absent after the VM's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics: Option<BalloonStatistics>,
    /// What the guest has told last of its memory, if it ever has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestMemoryView>,
}

/// The state of free page hints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HintsView {
    /// The number of the host's last request: 0 before the first, and 1 once the guest was told to use its memory again.
    pub host: u32,
    /// The number of the request that the guest answers or has answered; 0 once it has no more memory to hint at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<u32>,
}

/// Counters of a memory balloon, in pages of 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BalloonStatistics {
    /// Pages that the guest has put into the balloon.
    pub inflated_pages: u64,
    /// Pages that the guest has taken out, as it says.
    pub deflated_pages: u64,
    /// Pages that the guest has reported as free.
    pub reported_pages: u64,
    /// Pages that the guest has hinted at.
    pub hinted_pages: u64,
    /// Pages whose memory the host has got back, in any of these ways.
    pub freed_pages: u64,
    /// Pages that the guest does not have.
    pub invalid_pages: u64,
    /// How often the device broke, and needed a reset.
    pub errors: u64,
}

/// What a guest tells of its memory. It need not be true. A guest leaves out what it does not count.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestMemoryView {
    /// How often the guest has told.
    pub updates: u64,
    /// All of its memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// Unused memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_bytes: Option<u64>,
    /// Memory that programs could have without swapping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
    /// Caches of disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_bytes: Option<u64>,
    /// Memory read from swap space so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swapped_in_bytes: Option<u64>,
    /// Memory written to swap space so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swapped_out_bytes: Option<u64>,
    /// Page faults that needed a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults that needed none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Huge pages that programs got (hugetlbfs).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_allocations: Option<u64>,
    /// Huge pages that programs did not get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_failures: Option<u64>,
    /// Programs that were killed for want of memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oom_kills: Option<u64>,
    /// Allocations that waited until memory was reclaimed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stalls: Option<u64>,
    /// Pages that the reclaiming thread looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub async_scanned_pages: Option<u64>,
    /// Pages that allocations looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_scanned_pages: Option<u64>,
    /// Pages that the reclaiming thread reclaimed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub async_reclaimed_pages: Option<u64>,
    /// Pages that allocations reclaimed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_reclaimed_pages: Option<u64>,
}
