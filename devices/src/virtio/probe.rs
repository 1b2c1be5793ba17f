//! A device for tests of transports, which records what the transport asks of it.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_queue::QueueT as _;

use super::{ActivateError, Activation, RING_FEATURES, VirtioDevice, read_config};

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

    /// Shows what the transport has handed to the device, which runs.
    pub(super) fn with_activation<T>(&self, show: impl FnOnce(&Activation) -> T) -> T {
        show(self.0.lock().unwrap().active.as_ref().expect("the device runs"))
    }
}

impl Probe {
    /// Checks that the device runs exactly if the status says so, with checked features and queues.
    pub(super) fn check(&self, status: u32) -> Result<(), TestCaseError> {
        let record = self.0.lock().unwrap();
        if status & VIRTIO_CONFIG_S_DRIVER_OK == 0 {
            prop_assert!(record.active.is_none());
        }
        if status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            prop_assert!(status & VIRTIO_CONFIG_S_DRIVER_OK == 0);
        }
        if let Some(activation) = &record.active {
            prop_assert_eq!(activation.features & !(RING_FEATURES | OWN_FEATURE), 0);
            prop_assert!(activation.features & (1 << VIRTIO_F_VERSION_1) != 0);
            for active in &activation.queues {
                prop_assert!(active.queue.is_valid(&activation.memory));
                prop_assert!(active.queue.size() <= QUEUES[active.index]);
            }
        }
        Ok(())
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
