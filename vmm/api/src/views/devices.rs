//! The views of a VM's devices other than disks.

use samepage_api_types::views::devices::{BalloonView, NetworkView};
use samepage_host::record::Record;
use samepage_worker::report::DeviceReport;

/// Returns the network devices of a VM.
pub(crate) fn networks(record: &Record) -> Vec<NetworkView> {
    networks_of(record, record.vm().map(|vm| vm.look().devices).as_ref())
}

/// The same, where its devices are known.
pub(crate) fn networks_of(record: &Record, devices: Option<&DeviceReport>) -> Vec<NetworkView> {
    let spec = record.spec();
    let networks = spec.networks.iter().enumerate().map(|(number, network)| {
        let id = network.id(number).into_owned();
        let present = devices.and_then(|devices| devices.network(&id));
        let [receive, send] = present.map_or([network.receive, network.send], |present| present.limits);
        NetworkView {
            tap: present
                .map(|present| present.tap.clone())
                .filter(|tap| !tap.is_empty())
                .or_else(|| network.tap.clone()),
            mac: network.mac(&spec.name, number),
            link_up: present.map(|present| present.link_up),
            receive,
            send,
            notices: present.map_or_else(Vec::new, |present| present.notices.clone()),
            statistics: present.map(|present| present.statistics.clone()),
            id,
        }
    });
    networks.collect()
}

/// Returns the memory balloon of a VM that has one.
pub(crate) fn balloon(record: &Record) -> Option<BalloonView> {
    balloon_of(record, record.vm().map(|vm| vm.look().devices).as_ref())
}

/// The same, where its devices are known.
pub(crate) fn balloon_of(record: &Record, devices: Option<&DeviceReport>) -> Option<BalloonView> {
    let described = record.spec().balloon()?;
    let present = devices.and_then(|devices| devices.balloon.clone());
    Some(present.unwrap_or(BalloonView {
        size_bytes: described.size.0,
        actual_bytes: None,
        active: None,
        deflate_on_oom: described.deflate_on_oom,
        reporting: described.reporting,
        hinting: described.hinting,
        stats_interval: described.stats_interval,
        hints: None,
        statistics: None,
        guest: None,
    }))
}
