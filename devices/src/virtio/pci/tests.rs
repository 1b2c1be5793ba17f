use proptest::prelude::*;

use super::*;
use crate::virtio::RING_FEATURES;
use crate::virtio::messages;
use crate::virtio::messages::tests::Told;
use crate::virtio::probe::{OWN_FEATURE, Probe, QUEUES};
use crate::virtio::testing::{
    ACKNOWLEDGED, AVAILABLE, DESCRIPTORS, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, USED, memory,
};

const NO_VECTOR: u32 = messages::NO_VECTOR as u32;
const BASE: u32 = 0xd100_0000;

/// A driver that finds the device's registers by its capabilities.
struct Driver {
    transport: PciTransport,
    messages: Arc<Messages>,
    told: Told,
    common: u64,
    notify: u64,
    isr: u64,
    device: u64,
    msix: usize,
    window: usize,
}

fn probe() -> (Probe, Driver) {
    let probe = Probe::default();
    let (messages, told) = messages::tests::messages(QUEUES.len());
    let transport = PciTransport::new(memory(), Box::new(probe.clone()), messages.clone(), BASE).unwrap();
    let mut driver =
        Driver { transport, messages, told, common: 0, notify: 0, isr: 0, device: 0, msix: 0, window: 0 };
    driver.find();
    driver.transport.write_config(4, &[6, 0]);
    (probe, driver)
}

impl Driver {
    fn config<const N: usize>(&mut self, register: usize) -> [u8; N] {
        let mut bytes = [0; N];
        self.transport.read_config(register, &mut bytes);
        bytes
    }

    fn find(&mut self) {
        let mut at = usize::from(self.config::<1>(0x34)[0]);
        while at != 0 {
            let [id, next, _, kind, bar] = self.config(at);
            let offset = u64::from(u32::from_le_bytes(self.config(at + 8)));
            if id == 0x11 {
                self.msix = at;
            } else {
                assert_eq!((id, bar), (9, 0));
                match kind {
                    1 => self.common = offset,
                    2 => self.notify = offset,
                    3 => self.isr = offset,
                    4 => self.device = offset,
                    5 => self.window = at,
                    other => panic!("a capability of type {other}"),
                }
            }
            at = next.into();
        }
    }

    fn get<const N: usize>(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(offset, &mut bytes[..N]);
        u32::from_le_bytes(bytes)
    }

    fn set<const N: usize>(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes()[..N]);
    }

    fn status(&mut self) -> u32 {
        self.get::<1>(self.common + 0x14)
    }

    fn negotiate(&mut self, features: u64) {
        for status in [0, ACKNOWLEDGED, DRIVER] {
            self.set::<1>(self.common + 0x14, status);
        }
        for word in 0..2 {
            self.set::<4>(self.common + 8, word);
            self.set::<4>(self.common + 12, (features >> (32 * word)) as u32);
        }
        self.set::<1>(self.common + 0x14, FEATURES_OK);
    }

    fn set_up_queue(&mut self, queue: u32, vector: u32) {
        self.set::<2>(self.common + 0x16, queue);
        self.set::<2>(self.common + 0x18, 16);
        for (field, address) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, USED)] {
            self.set::<4>(self.common + field, address as u32);
            self.set::<4>(self.common + field + 4, (address >> 32) as u32);
        }
        self.set::<2>(self.common + 0x1a, vector);
        self.set::<2>(self.common + 0x1c, 1);
    }

    fn start(&mut self) {
        self.negotiate(RING_FEATURES);
        self.set_up_queue(0, 1);
        self.set::<1>(self.common + 0x14, DRIVER_OK);
    }

    fn turn_messages_on(&mut self) {
        for vector in 0..self.messages.count() as u64 {
            let at = TABLE + vector * 16;
            self.transport.write(at, &(0xfee0_0000_u64 + (vector << 12)).to_le_bytes());
            self.set::<4>(at + 8, 0x40 + vector as u32);
            self.set::<4>(at + 12, 0);
        }
        self.transport.write_config(self.msix + 2, &0x8000_u16.to_le_bytes());
    }
}

#[test]
fn a_driver_finds_the_device() {
    let (_, mut driver) = probe();
    assert_eq!(driver.config(0), [0xf4, 0x1a, 42 + 0x40, 0x10]);
    assert_eq!((driver.common, driver.isr, driver.device, driver.notify), (0, 0x1000, 0x2000, 0x3000));
    assert_eq!(u16::from_le_bytes(driver.config(driver.msix + 2)), QUEUES.len() as u16);
    assert_eq!(driver.get::<2>(0x12), 2);
    assert_eq!(driver.get::<4>(4), (RING_FEATURES | OWN_FEATURE) as u32);
    for (queue, size, offset) in [(0, 256, 0), (1, 64, 1), (2, 0, 0), (0xffff, 0, 0)] {
        driver.set::<2>(0x16, queue);
        assert_eq!((driver.get::<2>(0x18), driver.get::<2>(0x1e)), (size, offset));
        assert_eq!(driver.get::<2>(0x1a), NO_VECTOR);
    }
}

#[test]
fn initialisation_hands_the_queues_and_their_messages_to_the_device() {
    let (probe, mut driver) = probe();
    driver.turn_messages_on();
    driver.start();
    driver.set::<2>(0x10, 0);
    assert_eq!((driver.status(), driver.get::<2>(0x10)), (DRIVER_OK, 0));
    probe.with_activation(|activation| {
        assert_eq!((activation.queues.len(), activation.queues[0].index), (1, 0));
        activation.interrupt.signal_queue(0);
        activation.interrupt.signal_config();
    });
    let sent = |driver: &Driver, vector: usize| driver.messages.events()[vector].read().unwrap_or(0);
    assert_eq!((sent(&driver, 0), sent(&driver, 1), sent(&driver, 2)), (1, 1, 0));
    let told = driver.told.lock().unwrap().clone();
    assert!(told.contains(&(1, 0xfee0_1000, 0x41)), "{told:x?}");
    // The status is cleared by reading.
    assert_eq!((driver.get::<1>(driver.isr), driver.get::<1>(driver.isr)), (3, 0));
    driver.set::<1>(0x14, 0);
    assert!(!probe.is_active());
    assert_eq!((driver.status(), driver.get::<2>(0x10)), (0, NO_VECTOR));
}

#[test]
fn notifications_wake_the_queue_of_their_place() {
    let (_, mut driver) = probe();
    for (offset, woken) in [(0, Some(0)), (4, Some(1)), (8, None), (2, None)] {
        driver.set::<2>(driver.notify + offset, 0);
        let events = driver.transport.queue_events();
        let all: Vec<_> = events.iter().map(|event| event.read().is_ok()).collect();
        assert_eq!(all.iter().position(|woken| *woken), woken, "{offset}");
    }
}

#[test]
fn registers_are_silent_while_memory_is_off() {
    let (_, mut driver) = probe();
    driver.transport.write_config(4, &[4, 0]);
    driver.set::<1>(0x14, ACKNOWLEDGED);
    assert_eq!(driver.get::<4>(0), u32::MAX);
    driver.transport.write_config(4, &[6, 0]);
    assert_eq!(driver.status(), 0);
}

#[test]
fn the_configuration_space_is_a_window_to_the_registers() {
    let (probe, mut driver) = probe();
    let window = driver.window;
    let open = |driver: &mut Driver, bar: u8, offset: u32, bytes: u32| {
        driver.transport.write_config(window + 4, &[bar]);
        driver.transport.write_config(window + 8, &offset.to_le_bytes());
        driver.transport.write_config(window + 12, &bytes.to_le_bytes());
    };
    open(&mut driver, 0, 0x14, 1);
    driver.transport.write_config(window + 16, &[ACKNOWLEDGED as u8]);
    assert_eq!((driver.status(), driver.config(window + 16)), (ACKNOWLEDGED, [ACKNOWLEDGED as u8]));
    open(&mut driver, 0, 0x12, 2);
    assert_eq!(driver.config(window + 16), [2, 0]);
    open(&mut driver, 0, 0x2000, 1);
    driver.transport.write_config(window + 16, &[7]);
    assert_eq!(probe.0.lock().unwrap().config[0], 7);
    for (bar, offset, bytes) in
        [(1, 0x14, 1), (0, 0x15, 2), (0, u32::MAX, 4), (0, 0x8000, 4), (0, 0, 3), (0, 0, u32::MAX)]
    {
        open(&mut driver, bar, offset, bytes);
        driver.transport.write_config(window + 16, &[0; 4]);
        assert_eq!(driver.config(window + 16), [0; 4]);
    }
    assert_eq!(driver.status(), ACKNOWLEDGED);
}

#[test]
fn a_broken_device_says_so_until_it_is_reset() {
    let (_, mut driver) = probe();
    driver.start();
    driver.transport.core.interrupt.set_needs_reset();
    assert_eq!(driver.status(), DRIVER_OK | NEEDS_RESET);
    driver.start();
    assert_eq!(driver.status(), DRIVER_OK);
}

#[derive(Clone, Debug)]
enum Access {
    ReadConfig(usize, usize),
    WriteConfig(usize, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Start,
    TurnMessagesOn,
    Signal(usize),
}

fn access() -> impl Strategy<Value = Access> {
    let offset = || {
        prop_oneof![
            6 => 0u64..0x40,
            4 => prop::sample::select(vec![ISR, DEVICE, NOTIFY, TABLE, PENDING, MEMORY_BYTES, u64::MAX - 8])
                .prop_flat_map(|start| (0u64..0x44).prop_map(move |more| start.saturating_add(more).wrapping_sub(4))),
            1 => any::<u64>(),
        ]
    };
    let data = |most| {
        let byte = prop_oneof![4 => 0u8..16, 1 => any::<u8>()];
        prop::collection::vec(byte, 0..most)
    };
    prop_oneof![
        4 => (0usize..0x100, 1usize..5).prop_map(|(at, bytes)| Access::ReadConfig(at, bytes)),
        6 => (0usize..0x100, data(5)).prop_map(|(at, data)| Access::WriteConfig(at, data)),
        4 => (offset(), 0usize..17).prop_map(|(offset, bytes)| Access::Read(offset, bytes)),
        12 => (offset(), data(17)).prop_map(|(offset, data)| Access::Write(offset, data)),
        2 => Just(Access::Start),
        2 => Just(Access::TurnMessagesOn),
        2 => (0usize..4).prop_map(Access::Signal),
    ]
}

proptest! {
    /// Whatever a guest does to the configuration space and the registers, the function stays what it is, the device
    /// runs exactly if the status says so, and no masked message is sent.
    #[test]
    fn any_sequence_of_accesses_leaves_a_consistent_device(
        accesses in prop::collection::vec(access(), 0..150),
    ) {
        let (probe, mut driver) = probe();
        let fixed = |driver: &mut Driver| {
            (driver.config::<4>(0), driver.config::<4>(8), driver.config::<1>(0x34), driver.config::<1>(0x3d))
        };
        let before = fixed(&mut driver);
        for access in accesses {
            match access {
                Access::ReadConfig(at, bytes) => driver.transport.read_config(at, &mut vec![0; bytes]),
                Access::WriteConfig(at, data) => driver.transport.write_config(at, &data),
                Access::Read(offset, bytes) => driver.transport.read(offset, &mut vec![0; bytes]),
                Access::Write(offset, data) => driver.transport.write(offset, &data),
                Access::Start => driver.start(),
                Access::TurnMessagesOn => driver.turn_messages_on(),
                Access::Signal(queue) => driver.transport.core.interrupt.signal_queue(queue),
            }
            prop_assert_eq!(fixed(&mut driver), before);
            let control = u16::from_le_bytes(driver.config(driver.msix + 2));
            prop_assert_eq!(control & !(ENABLE | MASK_ALL), QUEUES.len() as u16);
            prop_assert_eq!(control & (ENABLE | MASK_ALL), driver.messages.control());
            for (vector, event) in driver.messages.events().iter().enumerate() {
                let sent = event.read().is_ok();
                let mut entry = [0; 16];
                driver.messages.read_table(vector as u64 * 16, &mut entry);
                prop_assert!(!sent || control & (ENABLE | MASK_ALL) == ENABLE && entry[12] & 1 == 0);
            }

            probe.check(driver.transport.core.status())?;
        }
    }
}
