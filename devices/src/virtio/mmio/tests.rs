use proptest::prelude::*;
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_F_VERSION_1,
};
use virtio_queue::QueueT as _;

use super::*;
use crate::virtio::probe::{OWN_FEATURE, Probe};
use crate::virtio::testing::*;
use crate::virtio::{ActiveQueue, RING_FEATURES, testing};

fn probe() -> (Probe, Driver) {
    let probe = Probe::default();
    (probe.clone(), Driver::new(probe))
}

#[test]
fn a_driver_finds_the_device() {
    let (_, mut driver) = probe();
    assert_eq!(driver.get(VIRTIO_MMIO_MAGIC_VALUE), u32::from_le_bytes(*b"virt"));
    assert_eq!(driver.get(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_ID), 42);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), (RING_FEATURES | OWN_FEATURE) as u32);
    driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 1, "VERSION_1");
    driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    for (queue, size) in [(0, 256), (1, 64), (2, 0), (u32::MAX, 0)] {
        driver.set(VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), size);
    }
    for register in [VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_BASE_LOW] {
        assert_eq!(driver.get(register), u32::MAX);
    }
}

#[test]
fn initialisation_hands_the_queues_to_the_device() {
    let (probe, mut driver) = probe();
    assert_eq!(driver.negotiate(RING_FEATURES), FEATURES_OK);
    assert!(driver.set_up_queue(16, DESCRIPTORS, AVAILABLE, USED));
    assert!(!probe.is_active());
    driver.set(VIRTIO_MMIO_STATUS, DRIVER_OK);
    assert_eq!(driver.status(), DRIVER_OK);

    probe.with_activation(|activation| {
        assert_eq!(activation.features, RING_FEATURES);
        let [ActiveQueue { index: 0, queue, .. }] = &activation.queues[..] else {
            panic!("one queue was set up");
        };
        assert_eq!((queue.size(), queue.desc_table(), queue.avail_ring()), (16, DESCRIPTORS, AVAILABLE));
        assert_eq!((queue.used_ring(), queue.event_idx_enabled()), (USED, true));
    });
}

#[test]
fn features_are_checked_and_then_fixed() {
    let (_, mut driver) = probe();
    assert_eq!(driver.negotiate(0), DRIVER, "VERSION_1 is not optional");
    assert_eq!(driver.negotiate(RING_FEATURES | 1 << 50), DRIVER, "not offered");
    assert_eq!(driver.negotiate(1 << VIRTIO_F_VERSION_1), FEATURES_OK);

    // Writes after FEATURES_OK have no effect.
    driver.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    driver.set(VIRTIO_MMIO_DRIVER_FEATURES, 0xffff_ffff);
    assert_eq!(driver.transport.core.driver_features, 1 << VIRTIO_F_VERSION_1);
}

#[test]
fn the_status_moves_forward_only() {
    let (probe, mut driver) = probe();
    driver.set(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_DRIVER_OK);
    assert_eq!(driver.status(), 0, "out of order");
    driver.set(VIRTIO_MMIO_STATUS, DRIVER);
    driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGED);
    assert_eq!(driver.status(), DRIVER, "bits are not taken back");
    driver.set(VIRTIO_MMIO_STATUS, u32::MAX);
    assert_eq!(driver.status(), DRIVER | VIRTIO_CONFIG_S_FAILED, "no features, no start");
    assert!(!probe.is_active());
}

#[test]
fn rings_must_be_aligned_and_in_memory() {
    let (_, mut driver) = probe();
    driver.negotiate(RING_FEATURES);
    for (size, descriptors, available, used) in [
        (0, DESCRIPTORS, AVAILABLE, USED),
        (3, DESCRIPTORS, AVAILABLE, USED),
        (512, DESCRIPTORS, AVAILABLE, USED),
        (0x1_0010, DESCRIPTORS, AVAILABLE, USED),
        (16, DESCRIPTORS + 8, AVAILABLE, USED),
        (16, DESCRIPTORS, AVAILABLE + 1, USED),
        (16, DESCRIPTORS, AVAILABLE, USED + 2),
        (16, MEMORY_SIZE - 0x80, AVAILABLE, USED),
        (16, DESCRIPTORS, MEMORY_SIZE - 8, USED),
        (16, DESCRIPTORS, AVAILABLE, FAR_REGION - 4),
        (16, DESCRIPTORS, AVAILABLE, !3),
        (16, !15, AVAILABLE, USED),
    ] {
        assert!(!driver.set_up_queue(size, descriptors, available, used), "{size} {descriptors:#x}");
    }
    assert!(driver.set_up_queue(16, FAR_REGION, AVAILABLE, USED));
}

#[test]
fn a_ready_queue_does_not_change() {
    let (probe, mut driver) = probe();
    driver.negotiate(RING_FEATURES);
    assert!(driver.set_up_queue(16, DESCRIPTORS, AVAILABLE, USED));
    driver.set_up_queue(32, BUFFERS, BUFFERS, BUFFERS);
    driver.set(VIRTIO_MMIO_STATUS, DRIVER_OK);
    probe.with_activation(|activation| {
        let queue = &activation.queues[0].queue;
        assert_eq!((queue.size(), queue.desc_table()), (16, DESCRIPTORS));
    });

    // A queue that was not set up in time stays unused.
    driver.set(VIRTIO_MMIO_QUEUE_SEL, 1);
    driver.set(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn taking_back_a_queue_stops_the_device() {
    let (probe, mut driver) = probe();
    driver.start(RING_FEATURES);
    assert!(probe.is_active());
    driver.set(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
    assert!(!probe.is_active());
    assert_eq!(driver.status(), DRIVER_OK);
}

#[test]
fn reset_forgets_everything_at_any_time() {
    let (probe, mut driver) = probe();
    driver.start(RING_FEATURES);
    driver.transport.core.interrupt.signal_used();
    driver.transport.core.interrupt.set_needs_reset();
    assert_eq!(driver.status(), DRIVER_OK | NEEDS_RESET);

    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert!(!probe.is_active());
    for register in [VIRTIO_MMIO_STATUS, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_QUEUE_READY] {
        assert_eq!(driver.get(register), 0);
    }
    driver.start(RING_FEATURES);
    assert!(probe.is_active());

    let resets = probe.0.lock().unwrap().resets;
    drop(driver);
    assert!(!probe.is_active());
    assert!(probe.0.lock().unwrap().resets > resets);
}

#[test]
fn interrupts_have_a_cause_until_acknowledged() {
    let (_, mut driver) = probe();
    driver.start(RING_FEATURES);
    driver.transport.core.interrupt.signal_used();
    driver.transport.core.interrupt.signal_config();
    assert_eq!(driver.interrupt().read().unwrap(), 2);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    driver.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    driver.set(VIRTIO_MMIO_INTERRUPT_ACK, u32::MAX);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let (probe, mut driver) = probe();
    probe.0.lock().unwrap().refuse = true;
    driver.start(RING_FEATURES);
    assert_eq!(driver.status(), DRIVER_OK | NEEDS_RESET);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(driver.interrupt().read().unwrap(), 1);

    probe.0.lock().unwrap().refuse = false;
    driver.start(RING_FEATURES);
    assert_eq!(driver.status(), DRIVER_OK);
}

#[test]
fn notifications_reach_the_event_of_their_queue() {
    let (_, mut driver) = probe();
    for queue in [1, 2, u32::MAX] {
        driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }
    let [first, second] = driver.transport.queue_events() else { panic!("two queues") };
    assert!(first.read().is_err());
    assert_eq!(second.read().unwrap(), 1);
}

#[test]
fn configuration_space_takes_any_access() {
    let (probe, mut driver) = probe();
    probe.0.lock().unwrap().config = *b"config";
    let mut data = [0xaa; 4];
    driver.transport.read(0x104, &mut data);
    assert_eq!(&data, b"ig\0\0");
    driver.transport.read(0x101, &mut data[..1]);
    assert_eq!(data[0], b'o');
    driver.transport.write(0x100, b"C");
    driver.transport.read(0x100, &mut data);
    assert_eq!(&data, b"Conf");
    let mut wide = [0xaa; 16];
    driver.transport.read(u64::MAX, &mut wide);
    assert_eq!(wide, [0; 16]);
}

#[test]
fn registers_are_32_bits_wide() {
    let (_, mut driver) = probe();
    for (offset, width) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xfe, 4), (0, 0)] {
        let mut data = vec![0xaa; width];
        driver.transport.read(offset, &mut data);
        assert_eq!(data, vec![0; width], "{offset:#x}");
        driver.transport.write(u64::from(VIRTIO_MMIO_STATUS) + offset, &vec![1; width]);
    }
    assert_eq!(driver.status(), 0);
}

#[derive(Clone, Debug)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Register(u32, u32),
    Initialise(u64, bool),
    BreakQueue,
}

fn access() -> impl Strategy<Value = Access> {
    let offset = || prop_oneof![8 => 0u64..0x120, 1 => any::<u64>()];
    let value = prop_oneof![
        4 => 0u32..16,
        2 => Just(DESCRIPTORS as u32),
        1 => Just(256u32),
        1 => any::<u32>(),
    ];
    prop_oneof![
        1 => (offset(), 0usize..20).prop_map(|(offset, len)| Access::Read(offset, len)),
        1 => (offset(), prop::collection::vec(any::<u8>(), 0..20))
            .prop_map(|(offset, data)| Access::Write(offset, data)),
        8 => ((0u32..64).prop_map(|register| register * 4), value)
            .prop_map(|(register, value)| Access::Register(register, value)),
        1 => (any::<u64>(), any::<bool>())
            .prop_map(|(features, all)| Access::Initialise(features, all)),
        1 => Just(Access::BreakQueue),
    ]
}

proptest! {
    /// Whatever a driver does to the registers, the device runs exactly if the status says so, with checked
    /// features and queues.
    #[test]
    fn any_sequence_of_accesses_leaves_a_consistent_device(
        accesses in prop::collection::vec(access(), 0..200),
    ) {
        let (probe, mut driver) = probe();
        for access in accesses {
            match access {
                Access::Read(offset, len) => driver.transport.read(offset, &mut vec![0; len]),
                Access::Write(offset, data) => driver.transport.write(offset, &data),
                Access::Register(register, value) => driver.set(register, value),
                Access::Initialise(features, all) => {
                    driver.negotiate(if all { RING_FEATURES } else { features });
                    driver.set_up_queue(16, testing::DESCRIPTORS, AVAILABLE, USED);
                    driver.set(VIRTIO_MMIO_STATUS, DRIVER_OK);
                }
                Access::BreakQueue => driver.transport.core.interrupt.set_needs_reset(),
            }

            probe.check(driver.status())?;
        }
    }
}
