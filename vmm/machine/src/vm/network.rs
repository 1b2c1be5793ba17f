//! Network devices of a VM.

use std::error::Error;
use std::sync::Arc;

use samepage_devices::disk::limit::RateLimiter;
use samepage_devices::net::passt::{self, PASST_MTU, PasstOptions};
use samepage_devices::net::{Link, OpenTap, Tap, TapOptions};
use samepage_devices::virtio::net::{LinkState, Net, NetConfig, NetStats};
use samepage_process::tell::tell;
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
    /// The host's interface; empty if there is none.
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

/// What carries a device's frames.
struct Opened {
    links: Vec<Arc<dyn Link>>,
    /// The host's interface, if there is one.
    tap: String,
    mtu: Option<u16>,
    notices: Vec<String>,
}

/// Opens the tap of a VM's device or starts its process, and makes the device.
pub(super) fn open(vm: &str, number: usize, spec: &NetworkSpec) -> Result<(Net, Network), VmError> {
    let id = spec.id(number).into_owned();
    let mac = spec.mac(vm, number);
    let failed = |source| VmError::Network { id: id.clone(), source };
    let opened = if spec.user { open_user(spec, mac) } else { open_tap(spec) };
    let Opened { links, tap, mtu, notices } = opened.map_err(failed)?;
    let config = NetConfig {
        vm: vm.to_owned(),
        id: id.clone(),
        mac: mac.0,
        mtu,
        receive: spec.receive,
        send: spec.send,
    };
    let net = Net::new(&config, links);
    let (stats, link, limiters) = (net.stats(), net.link_state(), net.limiters());
    let name = format!("VM {vm}: network device {id}");
    link.on_gone(move |reason| tell(format_args!("{name}: {reason}; the VM runs on without this network")));
    Ok((net, Network { id, mac, tap, stats, link, limiters, notices }))
}

fn open_tap(spec: &NetworkSpec) -> Result<Opened, Box<dyn Error + Send + Sync>> {
    let source = match (&spec.tap, spec.fd) {
        (Some(name), _) => Ok(name.clone()),
        // The description has one of both.
        (None, fd) => Err(fd.unwrap_or(-1)),
    };
    let options = TapOptions { source, queues: spec.queues(), mtu: spec.mtu };
    let OpenTap { queues, mtu, notices } = Tap::open(&options)?;
    let tap = queues.first().map(|tap| tap.name().to_owned()).unwrap_or_default();
    let links = queues.into_iter().map(|tap| Arc::new(tap) as Arc<dyn Link>).collect();
    Ok(Opened { links, tap, mtu, notices })
}

fn open_user(spec: &NetworkSpec, mac: Mac) -> Result<Opened, Box<dyn Error + Send + Sync>> {
    let mtu = spec.mtu.unwrap_or(PASST_MTU);
    let (publish, host_loopback) = (spec.publish.clone(), spec.host_loopback);
    let link = passt::start(&PasstOptions { mac: mac.0, mtu, publish, host_loopback })?;
    Ok(Opened { links: vec![Arc::new(link)], tap: String::new(), mtu: Some(mtu), notices: Vec::new() })
}
