//! The doorbell of a memory hole: a page without memory. A write to it notifies the host of new page flags.
//!
//! A write causes a VM exit, and the vCPU's own thread handles it. So the guest that rings pays for the work,
//! and no VM needs a file or a thread for its doorbell. The written value has no meaning.

use std::fmt;

use crate::BusDevice;

/// Length of the doorbell's address range, in bytes.
pub const DOORBELL_BYTES: u64 = 4096;

/// A doorbell that calls a function at each write.
pub struct Doorbell {
    ring: Box<dyn Fn() + Send>,
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Doorbell")
    }
}

impl Doorbell {
    /// Returns a doorbell that calls `ring` at each write. A guest can ring at any rate, so `ring` must not
    /// wait, and frequent calls must not cost more in total.
    #[must_use]
    pub fn new(ring: impl Fn() + Send + 'static) -> Self {
        Self { ring: Box::new(ring) }
    }
}

impl BusDevice for Doorbell {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {
        (self.ring)();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn every_write_rings_and_no_read_does() {
        let rung = Arc::<AtomicU32>::default();
        let counter = Arc::clone(&rung);
        let mut doorbell = Doorbell::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let mut data = [7; 8];
        doorbell.read(0, &mut data);
        assert_eq!((data, rung.load(Ordering::Relaxed)), ([0; 8], 0));
        for (offset, bytes) in [(0, &[1, 0, 0, 0][..]), (DOORBELL_BYTES - 1, &[0]), (u64::MAX, &[1; 8])] {
            doorbell.write(offset, bytes);
        }
        assert_eq!(rung.load(Ordering::Relaxed), 3);
    }
}
