//! Network devices of a VM.

use std::sync::Arc;

use samepage_devices::disk::limit::RateLimiter;
use samepage_devices::net::{Link, OpenTap, Tap, TapOptions};
use samepage_devices::virtio::net::{LinkState, Net, NetConfig, NetStats};
use samepage_spec::{Mac, NetworkSpec};

use super::VmError;

/// Upper limit for the network devices of a VM.
pub const MAX_NETWORKS: usize = 4;

/// A network device of a running VM.
#[derive(Debug)]
pub struct Network {
    /// The name of the device within the VM.
    pub id: String,
    /// The address of the guest's interface.
    pub mac: Mac,
    /// The host's interface.
    pub tap: String,
    /// The counters.
    pub stats: Arc<NetStats>,
    /// Whether the link is up, which can be changed at any time.
    pub link: Arc<LinkState>,
    /// The limits for frames to the guest and of the guest, which can be changed at any time.
    pub limiters: [Arc<RateLimiter>; 2],
    /// Remarks for the user, in sentences.
    pub notices: Vec<String>,
}

/// Opens the tap of a VM's device, and makes the device.
pub(super) fn open(vm: &str, number: usize, spec: &NetworkSpec) -> Result<(Net, Network), VmError> {
    let id = spec.id(number).into_owned();
    let source = match (&spec.tap, spec.fd) {
        (Some(name), _) => Ok(name.clone()),
        // The description has one of both.
        (None, fd) => Err(fd.unwrap_or(-1)),
    };
    let options = TapOptions { source, queues: spec.queues(), mtu: spec.mtu };
    let failed = |source| VmError::Network { id: id.clone(), source };
    let OpenTap { queues, mtu, notices } = Tap::open(&options).map_err(failed)?;
    let mac = spec.mac(vm, number);
    let config = NetConfig {
        vm: vm.to_owned(),
        id: id.clone(),
        mac: mac.0,
        mtu,
        receive: spec.receive,
        send: spec.send,
    };
    let tap = queues.first().map(|tap| tap.name().to_owned()).unwrap_or_default();
    let net = Net::new(&config, queues.into_iter().map(|tap| Arc::new(tap) as Arc<dyn Link>).collect());
    let (stats, link, limiters) = (net.stats(), net.link_state(), net.limiters());
    Ok((net, Network { id, mac, tap, stats, link, limiters, notices }))
}
