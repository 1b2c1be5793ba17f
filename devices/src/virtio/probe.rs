//! A device for tests of transports, which records what the transport asks of it.

use std::sync::{Arc, Mutex};

use super::{ActivateError, Activation, VirtioDevice, read_config};

pub(super) const OWN_FEATURE: u64 = 1 << 5;
pub(super) const QUEUES: [u16; 2] = [256, 64];

/// The transport's calls to the device.
#[derive(Default)]
pub(super) struct Record {
    pub(super) active: Option<Activation>,
    pub(super) resets: usize,
    pub(super) refuse: bool,
    pub(super) config: [u8; 6],
}

#[derive(Clone, Default)]
pub(super) struct Probe(pub(super) Arc<Mutex<Record>>);

impl Probe {
    pub(super) fn is_active(&self) -> bool {
        self.0.lock().unwrap().active.is_some()
    }
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        OWN_FEATURE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.0.lock().unwrap().config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (0, &[first, ..]) = (offset, data) {
            self.0.lock().unwrap().config[0] = first;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut record = self.0.lock().unwrap();
        assert!(record.active.is_none(), "activated twice without a reset");
        if record.refuse {
            return Err(ActivateError::QueueNotReady(0));
        }
        record.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        let mut record = self.0.lock().unwrap();
        record.active = None;
        record.resets += 1;
    }
}
