//! Virtio entropy device (virtio 1.2, section 5.4): the guest gets random bytes of the host's kernel.
//!
//! Each request is a buffer to fill. The device fills at most [`MAX_REQUEST_BYTES`] of it, and says how many:
//! drivers ask again for more. The bytes come from `getrandom`, whose source no reader can exhaust. So limits
//! only bound the CPU time that a guest takes of the host.
//!
//! # Errors
//! A buffer outside guest memory, or an invalid ring or chain, breaks the device until it is reset. If the
//! host has no random bytes, the device breaks too: a buffer that only seems to be random must not complete.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use samepage_spec::RateLimits;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice};
use crate::disk::limit::RateLimiter;
use crate::disk::wakers::Wakers;

mod service;
#[cfg(test)]
mod tests;

use service::Service;

/// Upper limit for the bytes of one request.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;
/// Drivers have few requests in progress.
const QUEUE_SIZE: u16 = 16;

/// Counters of an entropy device since the last boot.
#[derive(Debug, Default)]
pub struct RngStats {
    /// Requests that were answered.
    pub requests: AtomicU64,
    /// Random bytes that the guest got.
    pub bytes: AtomicU64,
    /// Requests that were delayed by the device's limits.
    pub throttled: AtomicU64,
    /// How often the device broke.
    pub errors: AtomicU64,
}

/// What the worker needs, and the VMM sees.
struct Common {
    limiter: RateLimiter,
    wakers: Arc<Wakers>,
    stats: Arc<RngStats>,
}

/// An entropy device.
pub struct Rng {
    thread_name: String,
    common: Arc<Common>,
    worker: Option<Worker>,
}

impl Rng {
    /// Returns the device of the VM `vm`, with limits for the bytes and requests of a second.
    pub fn new(vm: &str, limits: RateLimits) -> Self {
        let wakers = Arc::<Wakers>::default();
        let limiter = RateLimiter::new(limits, wakers.clone());
        let common = Common { limiter, wakers, stats: Arc::default() };
        // A zero byte would end the thread's name early.
        let thread_name = format!("rng-{vm}").replace('\0', "?");
        Self { thread_name, common: Arc::new(common), worker: None }
    }

    /// Returns the counters. They outlive the device.
    pub fn stats(&self) -> Arc<RngStats> {
        self.common.stats.clone()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let (served, event) = activation.take(0)?;
        let common = self.common.clone();
        let make = move || Service::new(common, served, event);
        let worker = Worker::spawn(self.thread_name.clone(), activation.interrupt, make)
            .map_err(ActivateError::Worker)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}
