//! The views of a VM's devices other than disks.

use std::sync::atomic::Ordering::Relaxed;

use samepage_api_types::views::devices::{NetworkStatistics, NetworkView, RngStatistics, VsockStatistics};
use samepage_devices::virtio::net::NetStats;
use samepage_devices::virtio::rng::RngStats;
use samepage_devices::virtio::vsock::VsockStats;
use samepage_host::record::Record;
use samepage_machine::Vm;

use super::Shown;

/// Returns the network devices of a VM.
pub(crate) fn networks(record: &Record) -> Vec<NetworkView> {
    let (spec, vm) = (record.spec(), record.vm());
    let networks = spec.networks.iter().enumerate().map(|(number, network)| {
        let id = network.id(number).into_owned();
        let present = vm.as_ref().and_then(|vm| vm.networks().iter().find(|present| present.id == id));
        let limits = |direction: usize, described| {
            present.map_or(described, |present| present.limiters[direction].limits())
        };
        NetworkView {
            tap: present
                .map(|present| present.tap.clone())
                .filter(|tap| !tap.is_empty())
                .or_else(|| network.tap.clone()),
            mac: network.mac(&spec.name, number),
            link_up: present.map(|present| present.link.is_up()),
            receive: limits(0, network.receive),
            send: limits(1, network.send),
            notices: present.map_or_else(Vec::new, |present| present.notices.clone()),
            statistics: present.map(|present| (&*present.stats).shown()),
            id,
        }
    });
    networks.collect()
}

/// Returns the counters of the VM's socket device, if it has one.
pub(crate) fn vsock(vm: &Vm) -> Option<VsockStatistics> {
    vm.vsock_stats().map(|stats| (&**stats).shown())
}

/// Returns the counters of the VM's entropy device, if it has one.
pub(crate) fn rng(vm: &Vm) -> Option<RngStatistics> {
    vm.rng_stats().map(|stats| (&**stats).shown())
}

impl Shown<NetworkStatistics> for &NetStats {
    fn shown(self) -> NetworkStatistics {
        NetworkStatistics {
            received_frames: self.received_frames.load(Relaxed),
            received_bytes: self.received_bytes.load(Relaxed),
            received_dropped: self.received_dropped.load(Relaxed),
            sent_frames: self.sent_frames.load(Relaxed),
            sent_bytes: self.sent_bytes.load(Relaxed),
            sent_dropped: self.sent_dropped.load(Relaxed),
            throttled: self.throttled.load(Relaxed),
            errors: self.errors.load(Relaxed),
            last_error: self.last_error(),
        }
    }
}

impl Shown<VsockStatistics> for &VsockStats {
    fn shown(self) -> VsockStatistics {
        VsockStatistics {
            connections: self.connections.load(Relaxed),
            ended: self.ended.load(Relaxed),
            resets: self.resets.load(Relaxed),
            timeouts: self.timeouts.load(Relaxed),
            received_packets: self.received_packets.load(Relaxed),
            received_bytes: self.received_bytes.load(Relaxed),
            sent_packets: self.sent_packets.load(Relaxed),
            sent_bytes: self.sent_bytes.load(Relaxed),
            errors: self.errors.load(Relaxed),
        }
    }
}

impl Shown<RngStatistics> for &RngStats {
    fn shown(self) -> RngStatistics {
        RngStatistics {
            requests: self.requests.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            throttled: self.throttled.load(Relaxed),
            errors: self.errors.load(Relaxed),
        }
    }
}
