//! What a VM's devices have counted, and how they are set: plain data that can come from another process.

use std::sync::atomic::Ordering::Relaxed;

use samepage_api_types::views::devices::{
    BalloonStatistics, BalloonView, GuestMemoryView, HintsView, NetworkStatistics, RngStatistics,
    VsockStatistics,
};
use samepage_api_types::views::{ConsoleView, DiskStatistics};
use samepage_devices::serial::SerialStats;
use samepage_devices::virtio::balloon::{BalloonControl, FRAME_BYTES, GuestStat, GuestStats};
use samepage_devices::virtio::block::BlockStats;
use samepage_devices::virtio::net::NetStats;
use samepage_devices::virtio::rng::RngStats;
use samepage_devices::virtio::vsock::VsockStats;
use samepage_machine::vm::{Disk, Network, Vm};
use samepage_spec::{CachePolicy, RateLimits};
use serde::{Deserialize, Serialize};

/// The devices of one VM at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// The serial console.
    pub console: ConsoleView,
    /// The disks, in the order of the configuration.
    pub disks: Vec<DiskReport>,
    /// The network devices, in the order of the configuration.
    pub networks: Vec<NetworkReport>,
    /// The socket device.
    pub vsock: Option<VsockStatistics>,
    /// The entropy device.
    pub rng: Option<RngStatistics>,
    /// The memory balloon.
    pub balloon: Option<BalloonView>,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskReport {
    /// The name of the disk within the VM.
    pub id: String,
    /// The size that the guest sees, in bytes.
    pub size_bytes: u64,
    /// The present cache policy.
    pub cache: CachePolicy,
    /// The limits per second.
    pub limits: RateLimits,
    /// Remarks for the user on how the image is accessed, in sentences.
    pub notices: Vec<String>,
    /// The counters since the last boot.
    pub statistics: DiskStatistics,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkReport {
    /// The name of the device within the VM.
    pub id: String,
    /// The host's interface; empty if there is none.
    pub tap: String,
    /// Whether frames pass.
    pub link_up: bool,
    /// The limits for what the guest receives and sends.
    pub limits: [RateLimits; 2],
    /// Remarks for the user, in sentences.
    pub notices: Vec<String>,
    /// The counters since the last boot.
    pub statistics: NetworkStatistics,
}

impl DeviceReport {
    /// Reads the devices of a machine of this process.
    #[must_use]
    pub fn of(vm: &Vm) -> Self {
        Self {
            console: console(vm.serial_stats()),
            disks: vm.disks().iter().map(disk).collect(),
            networks: vm.networks().iter().map(network).collect(),
            vsock: vm.vsock_stats().map(|stats| vsock(stats)),
            rng: vm.rng_stats().map(|stats| rng(stats)),
            balloon: vm.balloon().map(|control| balloon(control)),
        }
    }

    /// Returns the disk of this name.
    #[must_use]
    pub fn disk(&self, id: &str) -> Option<&DiskReport> {
        self.disks.iter().find(|disk| disk.id == id)
    }

    /// Returns the network device of this name.
    #[must_use]
    pub fn network(&self, id: &str) -> Option<&NetworkReport> {
        self.networks.iter().find(|network| network.id == id)
    }
}

impl Default for DeviceReport {
    /// A machine without devices whose console was silent.
    fn default() -> Self {
        let console = ConsoleView { sent_bytes: 0, lost_bytes: 0, received_bytes: 0 };
        Self { console, disks: Vec::new(), networks: Vec::new(), vsock: None, rng: None, balloon: None }
    }
}

fn console(stats: &SerialStats) -> ConsoleView {
    ConsoleView {
        sent_bytes: stats.sent.load(Relaxed),
        lost_bytes: stats.lost.load(Relaxed),
        received_bytes: stats.received.load(Relaxed),
    }
}

fn disk(disk: &Disk) -> DiskReport {
    DiskReport {
        id: disk.id.clone(),
        size_bytes: disk.size.bytes(),
        cache: disk.cache(),
        limits: disk.limiter.limits(),
        notices: disk.notices.clone(),
        statistics: block(&disk.stats),
    }
}

fn network(network: &Network) -> NetworkReport {
    NetworkReport {
        id: network.id.clone(),
        tap: network.tap.clone(),
        link_up: network.link.is_up(),
        limits: [0, 1].map(|direction| network.limiters[direction].limits()),
        notices: network.notices.clone(),
        statistics: net(&network.stats),
    }
}

fn block(stats: &BlockStats) -> DiskStatistics {
    DiskStatistics {
        reads: stats.reads.load(Relaxed),
        writes: stats.writes.load(Relaxed),
        flushes: stats.flushes.load(Relaxed),
        // A block is delivered before the request it belongs to counts as read.
        read_bytes: stats.read_bytes.load(Relaxed),
        written_bytes: stats.written_bytes.load(Relaxed),
        blocks_from_guests: stats.blocks_from_guests.load(Relaxed),
        blocks_from_host: stats.blocks_from_host.load(Relaxed),
        blocks_fetched: stats.blocks_fetched.load(Relaxed),
        throttled: stats.throttled.load(Relaxed),
        errors: stats.errors.load(Relaxed),
        last_error: stats.last_error(),
    }
}

fn net(stats: &NetStats) -> NetworkStatistics {
    NetworkStatistics {
        received_frames: stats.received_frames.load(Relaxed),
        received_bytes: stats.received_bytes.load(Relaxed),
        received_dropped: stats.received_dropped.load(Relaxed),
        sent_frames: stats.sent_frames.load(Relaxed),
        sent_bytes: stats.sent_bytes.load(Relaxed),
        sent_dropped: stats.sent_dropped.load(Relaxed),
        throttled: stats.throttled.load(Relaxed),
        errors: stats.errors.load(Relaxed),
        last_error: stats.last_error(),
    }
}

fn vsock(stats: &VsockStats) -> VsockStatistics {
    VsockStatistics {
        connections: stats.connections.load(Relaxed),
        ended: stats.ended.load(Relaxed),
        resets: stats.resets.load(Relaxed),
        timeouts: stats.timeouts.load(Relaxed),
        received_packets: stats.received_packets.load(Relaxed),
        received_bytes: stats.received_bytes.load(Relaxed),
        sent_packets: stats.sent_packets.load(Relaxed),
        sent_bytes: stats.sent_bytes.load(Relaxed),
        errors: stats.errors.load(Relaxed),
    }
}

fn rng(stats: &RngStats) -> RngStatistics {
    RngStatistics {
        requests: stats.requests.load(Relaxed),
        bytes: stats.bytes.load(Relaxed),
        throttled: stats.throttled.load(Relaxed),
        errors: stats.errors.load(Relaxed),
    }
}

fn balloon(control: &BalloonControl) -> BalloonView {
    let (config, stats, guest, hints) =
        (control.config(), control.stats(), control.guest_stats(), control.hints());
    let bytes = |frames: u32| u64::from(frames) * FRAME_BYTES;
    BalloonView {
        size_bytes: bytes(control.target()),
        actual_bytes: Some(bytes(control.actual())),
        active: Some(control.is_active()),
        deflate_on_oom: config.deflate_on_oom,
        reporting: config.reporting,
        hinting: config.hinting,
        stats_interval: control.stats_interval(),
        hints: config.hinting.then_some(HintsView { host: hints.host, guest: hints.guest }),
        statistics: Some(BalloonStatistics {
            inflated_pages: stats.inflated.load(Relaxed),
            deflated_pages: stats.deflated.load(Relaxed),
            reported_pages: stats.reported.load(Relaxed),
            hinted_pages: stats.hinted.load(Relaxed),
            freed_pages: stats.freed.load(Relaxed),
            invalid_pages: stats.invalid.load(Relaxed),
            errors: stats.errors.load(Relaxed),
        }),
        guest: (guest.updates > 0).then(|| guest_memory(&guest)),
    }
}

fn guest_memory(guest: &GuestStats) -> GuestMemoryView {
    let get = |stat| guest.get(stat);
    GuestMemoryView {
        updates: guest.updates,
        total_bytes: get(GuestStat::Total),
        free_bytes: get(GuestStat::Free),
        available_bytes: get(GuestStat::Available),
        cache_bytes: get(GuestStat::Caches),
        swapped_in_bytes: get(GuestStat::SwapIn),
        swapped_out_bytes: get(GuestStat::SwapOut),
        major_faults: get(GuestStat::MajorFaults),
        minor_faults: get(GuestStat::MinorFaults),
        huge_allocations: get(GuestStat::HugeAllocations),
        huge_failures: get(GuestStat::HugeFailures),
        oom_kills: get(GuestStat::OomKills),
        stalls: get(GuestStat::Stalls),
        async_scanned_pages: get(GuestStat::AsyncScans),
        direct_scanned_pages: get(GuestStat::DirectScans),
        async_reclaimed_pages: get(GuestStat::AsyncReclaims),
        direct_reclaimed_pages: get(GuestStat::DirectReclaims),
    }
}
