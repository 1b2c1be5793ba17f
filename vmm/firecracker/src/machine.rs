//! The interface to the one VM, in this process or in another one.

use std::path::PathBuf;

use samepage_api_types::views::DiskStatistics;
use samepage_api_types::views::devices::{BalloonView, NetworkStatistics, RngStatistics, VsockStatistics};
use samepage_metadata::Detour;
use samepage_spec::{RateLimits, VmSpec};
use samepage_worker::machine::DeviceChange;

use super::fault::Fault;

/// The state of the VM, for Firecracker's clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activity {
    Running,
    Paused,
}

/// A kind of device, with the names of its counters in Firecracker's metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum DeviceKind {
    Drive,
    Network,
    Entropy,
    Vsock,
    Balloon,
}

impl DeviceKind {
    pub(super) const ALL: [Self; 5] = [Self::Drive, Self::Network, Self::Entropy, Self::Vsock, Self::Balloon];

    /// Returns the name of the kind's sums.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Drive => "block",
            Self::Network => "net",
            Self::Entropy => "entropy",
            Self::Vsock => "vsock",
            Self::Balloon => "balloon",
        }
    }

    /// Returns the names of its counters, in the order of [`DeviceCounts::counts`].
    pub(super) fn counters(self) -> &'static [&'static str] {
        match self {
            Self::Drive => &[
                "read_count",
                "write_count",
                "flush_count",
                "read_bytes",
                "write_bytes",
                "execute_fails",
                "rate_limiter_throttled_events",
            ],
            // Received is what the guest receives.
            Self::Network => &[
                "rx_packets_count",
                "rx_bytes_count",
                "rx_fails",
                "tx_packets_count",
                "tx_bytes_count",
                "tx_fails",
                "event_fails",
            ],
            Self::Entropy => &[
                "entropy_event_count",
                "entropy_bytes",
                "entropy_rate_limiter_throttled",
                "entropy_event_fails",
            ],
            Self::Balloon => &["stats_updates_count", "event_fails"],
            Self::Vsock => &[
                "conns_added",
                "conns_removed",
                "conns_killed",
                "rx_packets_count",
                "rx_bytes_count",
                "tx_packets_count",
                "tx_bytes_count",
                "muxer_event_fails",
            ],
        }
    }
}

/// Counters of a device since the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeviceCounts {
    pub(super) kind: DeviceKind,
    /// The name of the device within the VM; empty where there is one of its kind at most.
    pub(super) id: String,
    pub(super) counts: Vec<u64>,
}

impl DeviceCounts {
    pub(super) fn drive(id: &str, of: &DiskStatistics) -> Self {
        let counts =
            [of.reads, of.writes, of.flushes, of.read_bytes, of.written_bytes, of.errors, of.throttled];
        Self { kind: DeviceKind::Drive, id: id.to_owned(), counts: counts.to_vec() }
    }

    pub(super) fn network(id: &str, of: &NetworkStatistics) -> Self {
        let counts = [
            of.received_frames,
            of.received_bytes,
            of.received_dropped,
            of.sent_frames,
            of.sent_bytes,
            of.sent_dropped,
            of.errors,
        ];
        Self { kind: DeviceKind::Network, id: id.to_owned(), counts: counts.to_vec() }
    }

    pub(super) fn entropy(of: &RngStatistics) -> Self {
        let counts = [of.requests, of.bytes, of.throttled, of.errors];
        Self { kind: DeviceKind::Entropy, id: String::new(), counts: counts.to_vec() }
    }

    pub(super) fn balloon(of: &BalloonView) -> Self {
        let updates = of.guest.as_ref().map_or(0, |guest| guest.updates);
        let errors = of.statistics.as_ref().map_or(0, |counted| counted.errors);
        Self { kind: DeviceKind::Balloon, id: String::new(), counts: vec![updates, errors] }
    }

    pub(super) fn vsock(of: &VsockStatistics) -> Self {
        let counts = [
            of.connections,
            of.ended,
            of.resets,
            of.received_packets,
            of.received_bytes,
            of.sent_packets,
            of.sent_bytes,
            of.errors,
        ];
        Self { kind: DeviceKind::Vsock, id: String::new(), counts: counts.to_vec() }
    }
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

    /// Changes the balloon.
    fn change_balloon(&self, change: DeviceChange) -> Result<(), Fault>;

    /// Returns the balloon as it is now, and what the guest has told of its memory.
    fn balloon(&self) -> Result<BalloonView, Fault>;

    /// Returns the counters of all devices that have some; none before the start and after the end.
    fn counts(&self) -> Vec<DeviceCounts>;
}
