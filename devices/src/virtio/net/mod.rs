//! Virtio network device (virtio 1.2, section 5.1): Ethernet over a [`Link`].
//!
//! | queue | purpose |
//! | --- | --- |
//! | 0, 2, … | frames for the guest, one queue for each pair |
//! | 1, 3, … | frames of the guest |
//! | behind the last pair | commands: how many pairs the driver uses |
//!
//! One worker thread serves all queues. Each pair has a link of its own, one queue of a tap. Frames are copied
//! between guest memory and buffers of the worker. An idle device has no buffers.
//!
//! # Errors
//! A frame that is too short, too long or whose header is wrong is dropped and counted. So is a frame for the
//! guest whose buffer is too small. A command that the device does not know is answered with an error. An invalid
//! ring or chain, or a buffer outside guest memory, breaks the device until it is reset. If the link's other end
//! is gone, the guest sees its link go down.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use samepage_spec::RateLimits;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;

use super::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice, read_config};
use crate::disk::limit::RateLimiter;
use crate::disk::wakers::Wakers;
use crate::net::{Detour, HEADER_BYTES, Link, Offloads};

mod header;
mod pair;
mod service;
mod stats;
#[cfg(test)]
mod tests;

use pair::Pair;
use service::Service;
pub use stats::{LinkState, NetStats};

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;
/// Upper limit for the pairs of queues.
pub const MAX_PAIRS: usize = samepage_spec::MAX_QUEUES;

/// A network device of one VM.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// The VM's name, for the worker's thread name.
    pub vm: String,
    /// The device's name within the VM, for the same.
    pub id: String,
    /// The address of the guest's interface.
    pub mac: [u8; 6],
    /// The longest packet, in bytes, if the guest is to be told.
    pub mtu: Option<u16>,
    /// Limits for frames to the guest.
    pub receive: RateLimits,
    /// Limits for frames of the guest.
    pub send: RateLimits,
}

/// What the worker needs, and the VMM sees.
struct Common {
    receive: Arc<RateLimiter>,
    send: Arc<RateLimiter>,
    wakers: Arc<Wakers>,
    stats: Arc<NetStats>,
    state: Arc<LinkState>,
    detour: OnceLock<Mutex<Box<dyn Detour>>>,
}

impl Common {
    /// Calls the service that some frames are for, if there is one.
    fn detour<T>(&self, call: impl FnOnce(&mut dyn Detour) -> Option<T>) -> Option<T> {
        call(&mut **self.detour.get()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Passes a frame of the guest, behind its header, to the service. Returns whether it was for the service.
    fn is_taken(&self, frame: &[u8]) -> bool {
        self.detour(|detour| detour.take(&frame[HEADER_BYTES..]).then_some(())).is_some()
    }

    /// Writes the service's next frame for the guest into `buffer`, behind a header. Returns the length of both.
    fn answer(&self, buffer: &mut [u8]) -> Option<usize> {
        self.detour(|detour| {
            let (header, frame) = buffer.split_at_mut(HEADER_BYTES);
            header.fill(0);
            detour.next(frame).map(|length| HEADER_BYTES + length)
        })
    }
}

/// A network device.
pub struct Net {
    thread_name: String,
    mac: [u8; 6],
    mtu: u16,
    features: u64,
    queue_sizes: Vec<u16>,
    links: Vec<Arc<dyn Link>>,
    common: Arc<Common>,
    worker: Option<Worker>,
}

impl Net {
    /// Returns a device with a pair of queues for each link, of which there is one at least.
    pub fn new(config: &NetConfig, links: Vec<Arc<dyn Link>>) -> Self {
        let work = links.first().map_or_else(Offloads::default, |link| link.offloads());
        let mut features = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MRG_RXBUF;
        for (is_offered, guest, host) in [
            (work.checksum, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_CSUM),
            (work.tso4, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4),
            (work.tso6, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO6),
            (work.ufo, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_UFO),
        ] {
            // Segments need checksums.
            if is_offered && work.checksum {
                features |= 1 << guest | 1 << host;
            }
        }
        if config.mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * links.len()];
        if links.len() > 1 {
            features |= 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        let wakers = Arc::<Wakers>::default();
        let common = Common {
            receive: Arc::new(RateLimiter::new(config.receive, wakers.clone())),
            send: Arc::new(RateLimiter::new(config.send, wakers.clone())),
            wakers,
            stats: Arc::default(),
            state: Arc::default(),
            detour: OnceLock::new(),
        };
        Self {
            thread_name: format!("net-{}-{}", config.vm, config.id).replace('\0', "?"),
            mac: config.mac,
            mtu: config.mtu.unwrap_or_default(),
            features,
            queue_sizes,
            links,
            common: Arc::new(common),
            worker: None,
        }
    }

    /// Returns the counters. They outlive the device.
    pub fn stats(&self) -> Arc<NetStats> {
        self.common.stats.clone()
    }

    /// Returns the state of the link, which may be changed at any time.
    pub fn link_state(&self) -> Arc<LinkState> {
        self.common.state.clone()
    }

    /// Returns the limits for frames to the guest and of the guest, which may be changed at any time.
    pub fn limiters(&self) -> [Arc<RateLimiter>; 2] {
        [self.common.receive.clone(), self.common.send.clone()]
    }

    /// Has a service take the guest's frames that are for it. A device has one at most; further ones are ignored.
    pub fn set_detour(&self, detour: Box<dyn Detour>) {
        let _ = self.common.detour.set(Mutex::new(detour));
    }

    /// Gives the guest back the work that a driver had taken, and leaves one queue of several.
    fn reset_links(&self) {
        for (number, link) in self.links.iter().enumerate() {
            // A link that fails here fails at the next frame too, and is then found to be gone.
            let _ = link.set_guest_offloads(Offloads::default());
            let _ = link.set_enabled(number == 0);
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `struct virtio_net_config`: address, status, pairs of queues, MTU.
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        let up = if self.common.state.is_up() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        config[6..8].copy_from_slice(&up.to_le_bytes());
        config[8..10].copy_from_slice(&(self.links.len() as u16).to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        read_config(&config, offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.common.state.generation()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        let has = |feature: u32| features & (1 << feature) != 0;
        let count = if has(VIRTIO_NET_F_MQ) { self.links.len() } else { 1 };
        // Without several pairs, the queue for commands comes behind the first.
        let control = has(VIRTIO_NET_F_CTRL_VQ).then(|| activation.take(2 * count)).transpose()?;
        let mut pairs = Vec::with_capacity(count);
        for (number, link) in self.links.iter().take(count).enumerate() {
            let (receive, send) = (2 * number, 2 * number + 1);
            // Linux sets up as many pairs as it has processors.
            let (Ok(receiving), Ok(sending)) = (activation.take(receive), activation.take(send)) else {
                if number == 0 {
                    return Err(ActivateError::QueueNotReady(receive));
                }
                break;
            };
            pairs.push(Pair::new(self.common.clone(), link.clone(), features, receiving, sending));
        }
        let work = Offloads {
            checksum: has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: has(VIRTIO_NET_F_GUEST_TSO6),
            ufo: has(VIRTIO_NET_F_GUEST_UFO),
        };
        // A driver must not take segments without checksums. The link would refuse that.
        let work = if work.checksum { work } else { Offloads::default() };
        for pair in &pairs {
            if let Err(error) = pair.link().set_guest_offloads(work) {
                self.common.stats.record_error(format!("set the offloads of the link: {error}"));
                return Err(ActivateError::Worker(error));
            }
        }
        let common = self.common.clone();
        let make = move || Service::new(common, pairs, control);
        self.common.state.set_driver(Some(activation.interrupt.clone()));
        let worker = Worker::spawn(self.thread_name.clone(), activation.interrupt, make)
            .map_err(ActivateError::Worker)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.common.state.set_driver(None);
        if self.worker.take().is_some() {
            self.reset_links();
        }
    }
}
