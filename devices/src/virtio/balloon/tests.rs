use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;
use virtio_bindings::bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_STATUS};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::BusDevice;
use crate::virtio::RING_FEATURES;
use crate::virtio::testing::*;

const STATS: u64 = 1 << STATS_VQ;
const OOM: u64 = 1 << DEFLATE_ON_OOM;
const HINTS: u64 = 1 << FREE_PAGE_HINT;
const POISON: u64 = 1 << PAGE_POISON;
const REPORTS: u64 = 1 << REPORTING;

/// Places in the configuration space.
const TARGET: u64 = 0;
const ACTUAL: u64 = 4;
const HINT: u64 = 8;
const VALUE: u64 = 12;

const EVERYTHING: BalloonConfig =
    BalloonConfig { target: 0, deflate_on_oom: true, reporting: true, hinting: true, stats_interval: 0 };

/// Notes what was to be freed, in pieces of bounded length.
#[derive(Default)]
struct Pages(Mutex<Vec<Range<u64>>>);

impl FreePages for Pages {
    fn free(&self, frames: Range<u64>) -> Freed {
        let piece = frames.start..frames.end.min(frames.start + (1 << 20));
        let next = piece.end;
        let freed = next - piece.start;
        self.0.lock().unwrap().push(piece);
        Freed { next, freed, invalid: 0 }
    }
}

impl Pages {
    fn taken(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// A balloon, its driver, and one ring for each queue that the driver uses.
struct Guest {
    driver: Driver,
    pages: Arc<Pages>,
    control: Arc<BalloonControl>,
    rings: Vec<Ring>,
}

impl Guest {
    fn new(config: BalloonConfig, features: u64, queues: &[usize]) -> Self {
        let pages = Arc::<Pages>::default();
        let balloon = Balloon::new("vm", config, pages.clone());
        let control = balloon.control();
        let driver = Driver::new(balloon);
        let rings = queues.iter().map(|&queue| Ring::new(queue, 16)).collect();
        let mut guest = Self { driver, pages, control, rings };
        guest.start(features);
        guest
    }

    fn start(&mut self, features: u64) {
        assert_eq!(self.driver.negotiate(RING_FEATURES & !(1 << 29) | features), FEATURES_OK);
        self.rings.iter_mut().for_each(|ring| ring.set_up(&mut self.driver));
        self.driver.set(VIRTIO_MMIO_STATUS, DRIVER_OK);
    }

    /// Sends bytes by a queue, and waits for the answer.
    fn send(&mut self, ring: usize, bytes: &[u8]) {
        let address = self.give(ring, bytes);
        assert!(address > 0);
        self.rings[ring].wait(&mut self.driver);
    }

    fn give(&mut self, ring: usize, bytes: &[u8]) -> u64 {
        let address = self.rings[ring].buffer(0);
        self.driver.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        self.rings[ring].give(&mut self.driver, 0, (address, bytes.len() as u32, false));
        address
    }

    fn numbers(&mut self, ring: usize, numbers: &[u32]) {
        let bytes: Vec<_> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.send(ring, &bytes);
    }

    /// Reports ranges as free, and waits for the answer.
    fn report(&mut self, ring: usize, buffers: &[Buffer]) {
        self.driver.put_chain(self.rings[ring].base(), buffers);
        self.rings[ring].make_available(&mut self.driver, 0);
        self.rings[ring].wait(&mut self.driver);
    }

    fn field(&mut self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.driver.transport.read(u64::from(VIRTIO_MMIO_CONFIG) + at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set_field(&mut self, at: u64, bytes: &[u8]) {
        self.driver.transport.write(u64::from(VIRTIO_MMIO_CONFIG) + at, bytes);
    }
}

#[test]
fn page_frames_are_freed_in_runs_before_the_guest_hears_of_it() {
    let mut guest = Guest::new(EVERYTHING, STATS, &[0, 1, 2]);
    guest.numbers(0, &[9, 8, 7, 3, 8, 0x20, 0x21]);
    assert_eq!(guest.pages.taken(), [3..4, 7..10, 0x20..0x22]);
    guest.numbers(1, &[9, 8, 7]);
    assert!(guest.pages.taken().is_empty());
    let stats = guest.control.stats();
    assert_eq!((stats.inflated.load(Relaxed), stats.deflated.load(Relaxed)), (7, 3));
    assert_eq!((stats.freed.load(Relaxed), stats.errors.load(Relaxed)), (6, 0));
}

#[test]
fn the_queue_of_reports_is_found_by_either_numbering() {
    for (features, queue) in [
        (REPORTS, 2),
        (REPORTS, 4),
        (STATS | REPORTS, 3),
        (STATS | REPORTS, 4),
        (STATS | HINTS | REPORTS, 4),
        (HINTS | REPORTS, 3),
        (HINTS | REPORTS, 4),
    ] {
        let others = [(STATS, 2), (HINTS, if features & STATS == 0 && queue == 3 { 2 } else { 3 })];
        let others =
            others.into_iter().filter(|(feature, _)| features & feature != 0).map(|(_, queue)| queue);
        let queues: Vec<_> = [0, 1].into_iter().chain(others).chain([queue]).collect();
        let mut guest = Guest::new(EVERYTHING, features, &queues);
        guest.report(queues.len() - 1, &[(0x3000, 0x2000, true)]);
        assert_eq!(guest.pages.taken(), vec![3..5], "{features:#x}, queue {queue}");
    }
}

#[test]
fn whole_page_frames_of_reports_are_freed() {
    let mut guest = Guest::new(EVERYTHING, REPORTS, &[0, 1, 2]);
    let buffers = [(0x10_0000, 0x20_0000, true), (0x30_0001, 0x2fff, true), (0x40_0010, 0x100, true)];
    guest.report(2, &buffers);
    assert_eq!(guest.pages.taken(), [0x100..0x300, 0x301..0x303]);
    // What the guest has for the device to read is no report.
    guest.report(2, &[(0x10_0000, 0x20_0000, false)]);
    assert!(guest.pages.taken().is_empty());
    assert_eq!(guest.control.stats().reported.load(Relaxed), 0x202);
}

#[test]
fn pages_that_are_to_hold_a_value_are_not_freed() {
    let mut guest = Guest::new(EVERYTHING, REPORTS | POISON, &[0, 1, 2]);
    guest.report(2, &[(0x10_0000, 0x1000, true)]);
    assert_eq!(guest.pages.taken(), vec![0x100..0x101], "zeros are what it finds");
    guest.set_field(VALUE, &0xaaaa_aaaa_u32.to_le_bytes());
    guest.report(2, &[(0x10_0000, 0x1000, true)]);
    assert!(guest.pages.taken().is_empty());
    // What is in a balloon is of no value.
    guest.numbers(0, &[5]);
    assert_eq!(guest.pages.taken(), vec![5..6]);
    // Without the feature the field means nothing.
    guest.start(REPORTS);
    guest.set_field(VALUE, &[1]);
    guest.report(2, &[(0x10_0000, 0x1000, true)]);
    assert_eq!(guest.pages.taken(), vec![0x100..0x101]);
}

#[test]
fn a_new_target_is_told_and_the_arrival_is_told_once() {
    let mut guest = Guest::new(BalloonConfig { target: 7, ..EVERYTHING }, STATS | OOM, &[0, 1, 2]);
    let arrivals = Arc::<Mutex<Vec<u32>>>::default();
    let noted = arrivals.clone();
    guest.control.on_arrival(move |actual| noted.lock().unwrap().push(actual));
    assert_eq!((guest.field(TARGET), guest.field(ACTUAL)), (7, 0));
    for actual in [3_u32, 7, 7, 6, 7] {
        guest.set_field(ACTUAL, &actual.to_le_bytes());
    }
    assert_eq!(*arrivals.lock().unwrap(), [7]);
    guest.control.set_target(0x1234);
    guest.driver.wait_interrupt();
    assert_eq!(guest.field(TARGET), 0x1234);
    // A byte at a time as well.
    guest.set_field(ACTUAL + 1, &[0x12]);
    guest.set_field(ACTUAL, &[0x34]);
    assert_eq!((guest.control.actual(), arrivals.lock().unwrap().len()), (0x1234, 2));
    // These are the device's.
    guest.set_field(TARGET, &[0xff; 4]);
    guest.set_field(HINT, &[0xff; 4]);
    assert_eq!((guest.field(TARGET), guest.field(HINT)), (0x1234, 0));
    for (at, bytes) in [(14, &[1; 8][..]), (u64::MAX - 0x100, &[1]), (1 << 40, &[1; 4])] {
        guest.set_field(at, bytes);
    }
    // A driver that comes anew has an empty balloon.
    guest.start(STATS);
    assert_eq!((guest.field(TARGET), guest.field(ACTUAL)), (0x1234, 0));
}

fn entry(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn statistics_are_asked_for_in_time() {
    let mut guest = Guest::new(EVERYTHING, STATS, &[0, 1, 2]);
    let entries = [entry(4, 1000), entry(5, 4000), entry(6, u64::MAX), entry(77, 1), vec![4, 0, 1]].concat();
    guest.give(2, &entries);
    while guest.control.guest_stats().updates < 1 {
        std::thread::yield_now();
    }
    let stats = guest.control.guest_stats();
    assert_eq!(stats.get(GuestStat::Free), Some(1000));
    assert_eq!((stats.get(GuestStat::Total), stats.get(GuestStat::Available)), (Some(4000), None));
    // The device keeps the buffer until it wants others.
    assert_eq!(guest.rings[2].poll(&guest.driver), None);
    guest.control.set_stats_interval(1);
    guest.rings[2].wait(&mut guest.driver);
    guest.give(2, &entry(4, 2000));
    guest.rings[2].wait(&mut guest.driver);
    let stats = guest.control.guest_stats();
    assert_eq!((stats.get(GuestStat::Free), stats.get(GuestStat::Total)), (Some(2000), Some(4000)));
    assert_eq!(stats.updates, 2);
    // A second buffer has the first one returned.
    guest.control.set_stats_interval(0);
    guest.give(2, &entry(4, 3000));
    guest.give(2, &entry(4, 4000));
    guest.rings[2].wait(&mut guest.driver);
    // A reset takes the last one back.
    guest.start(STATS);
    assert_eq!(guest.control.stats().errors.load(Relaxed), 0);
}

#[test]
fn hints_count_from_the_command_to_the_end() {
    let mut guest = Guest::new(EVERYTHING, STATS | HINTS, &[0, 1, 2, 3]);
    let page = [(0x10_0000, 0x1000, true)];
    guest.report(3, &page);
    assert!(guest.pages.taken().is_empty(), "nobody has asked");
    guest.control.start_hints(true);
    let command = guest.field(HINT);
    assert_eq!(guest.control.hints(), HintState { host: command, guest: None });
    guest.report(3, &page);
    guest.send(3, &(command + 1).to_le_bytes());
    guest.report(3, &page);
    assert!(guest.pages.taken().is_empty(), "the guest answers something else");
    guest.send(3, &command.to_le_bytes());
    guest.report(3, &page);
    assert_eq!(guest.pages.taken(), vec![0x100..0x101]);
    guest.send(3, &0_u32.to_le_bytes());
    assert_eq!(guest.control.hints(), HintState { host: 1, guest: Some(0) });
    guest.report(3, &page);
    assert!(guest.pages.taken().is_empty(), "it was over");
    // The next request has another number, and ends when the host says so.
    guest.control.start_hints(false);
    let next = guest.field(HINT);
    assert_ne!(next, command);
    guest.send(3, &next.to_le_bytes());
    guest.send(3, &0_u32.to_le_bytes());
    assert_eq!(guest.field(HINT), next);
    guest.control.stop_hints();
    assert_eq!(guest.field(HINT), 1);
}

#[test]
fn what_is_not_wanted_is_not_offered() {
    let balloon = Balloon::new("vm", BalloonConfig::default(), Arc::<Pages>::default());
    assert_eq!(balloon.features(), STATS | POISON);
    let balloon = Balloon::new("vm", EVERYTHING, Arc::<Pages>::default());
    assert_eq!(balloon.features(), STATS | OOM | HINTS | POISON | REPORTS);
}

#[test]
fn invalid_requests_break_the_device_until_its_reset() {
    type Attack = fn(&mut Guest);
    let attacks: [Attack; 4] = [
        // Numbers outside memory.
        |guest| guest.rings[0].give(&mut guest.driver, 0, (u64::MAX - 4096, 4096, false)),
        |guest| guest.rings[0].give(&mut guest.driver, 0, (MEMORY_SIZE - 8, 16, false)),
        // Statistics outside memory.
        |guest| guest.rings[2].give(&mut guest.driver, 0, (1 << 40, 20, false)),
        // A chain that never ends.
        |guest| {
            let chain: Vec<_> = (0..16).map(|_| (BUFFERS, 8, true)).collect();
            let ring = &guest.rings[3];
            guest.driver.put_chain(ring.base(), &chain);
            let last = virtio_queue::desc::split::Descriptor::new(BUFFERS, 8, 3, 0);
            guest.driver.put_descriptor(ring.base(), 15, last);
            guest.rings[3].make_available(&mut guest.driver, 0);
        },
    ];
    for attack in attacks {
        let mut guest = Guest::new(EVERYTHING, STATS | REPORTS, &[0, 1, 2, 3]);
        attack(&mut guest);
        guest.driver.wait_needs_reset();
        assert_eq!(guest.control.stats().errors.load(Relaxed), 1);
        guest.pages.taken();
        guest.start(STATS | REPORTS);
        guest.numbers(0, &[1, 2]);
        assert_eq!(guest.pages.taken(), vec![1..3]);
    }
}

#[test]
fn endless_lists_and_ranges_are_bounded() {
    let mut guest = Guest::new(EVERYTHING, STATS | REPORTS, &[0, 1, 2, 3]);
    // The same memory, many times over, as numbers: only so many count.
    let chain: Vec<_> = (0..15).map(|_| (0, MEMORY_SIZE as u32, false)).collect();
    guest.report(0, &chain);
    assert_eq!(guest.control.stats().inflated.load(Relaxed), 1 << 16);
    guest.pages.taken();
    // Ranges far behind memory are the back end's to refuse.
    guest.report(3, &[(1 << 60, 1 << 31, true), (0, (1 << 31) - 1, true)]);
    assert_eq!(guest.pages.taken().last(), Some(&(0..(1 << 19) - 1)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever a driver puts into the rings and the configuration space, the device answers, breaks or waits, and a
    /// reset brings it back.
    #[test]
    fn no_driver_brings_the_device_down(
        acts in prop::collection::vec(
            (0..6_usize, 0..5_usize, any::<u64>(), any::<u32>(), any::<bool>(), any::<u16>()),
            1..40,
        ),
    ) {
        let mut guest = Guest::new(EVERYTHING, STATS | HINTS | REPORTS | POISON, &[0, 1, 2, 3, 4]);
        for (act, ring, address, length, is_written, index) in acts {
            let address = if length % 4 == 0 { address } else { address % (2 * MEMORY_SIZE) };
            match act {
                0 | 1 => {
                    let buffer = (address, length % 0x10000, is_written);
                    guest.rings[ring].give(&mut guest.driver, index % 16, buffer);
                }
                2 => guest.rings[ring].make_available(&mut guest.driver, index),
                3 => guest.set_field(u64::from(index % 20), &address.to_le_bytes()[..1 + ring]),
                4 => guest.control.start_hints(is_written),
                _ => guest.control.set_target(length),
            }
        }
        guest.start(REPORTS);
        guest.control.set_target(3);
        guest.rings.truncate(2);
        guest.rings.push(Ring::new(4, 16));
        guest.start(REPORTS);
        guest.pages.taken();
        guest.report(2, &[(0x3000, 0x1000, true)]);
        prop_assert_eq!(guest.pages.taken(), vec![3..4]);
    }
}
