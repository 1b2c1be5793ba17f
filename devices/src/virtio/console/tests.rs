use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use samepage_hole::port::{Decoder, HOST_BYTES, Item, MAX_FLAGS, NAME};
use samepage_hole::{FrameRange, GuestHeader, HostHeader, MAX_RANGES, bytes_for, port};
use virtio_bindings::bindings::virtio_mmio::VIRTIO_MMIO_STATUS;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::RING_FEATURES;
use crate::virtio::testing::*;

/// Page frames of the hole.
const FRAMES: u32 = 5000;
const TIME_LIMIT: Duration = Duration::from_secs(60);

const DEVICE_READY: (u32, u16, u16) = (u32::MAX, 0, 1);
const ADD: (u32, u16, u16) = (PORT, 1, 1);
const READY: (u32, u16, u16) = (PORT, 3, 1);
const OPEN: (u32, u16, u16) = (PORT, 6, 1);
const CLOSE: (u32, u16, u16) = (PORT, 6, 0);
const IS_NAMED: (u32, u16, u16) = (PORT, 7, 1);

/// A hole that notifies a test at each ring.
struct TestHole {
    words: Vec<AtomicU32>,
    rung: Mutex<Sender<()>>,
}

impl TestHole {
    fn new() -> (Arc<Self>, Receiver<()>) {
        let (sender, rung) = mpsc::channel();
        let words = (0..bytes_for(FRAMES) / 4).map(|_| AtomicU32::new(0)).collect();
        let hole = Self { words, rung: Mutex::new(sender) };
        hole.hole().set_host_header(&header());
        (Arc::new(hole), rung)
    }

    fn word(&self, frame: u32) -> u32 {
        self.hole().flags()[frame as usize].load(Ordering::Relaxed)
    }
}

impl PortHole for TestHole {
    fn hole(&self) -> Hole<'_> {
        Hole::new(&self.words, FRAMES).unwrap()
    }

    fn ring(&self) {
        // Not every test listens.
        let _ = self.rung.lock().unwrap().send(());
    }
}

fn header() -> HostHeader {
    let mut ranges = [FrameRange::default(); MAX_RANGES];
    ranges[0] = FrameRange { first: 0, count: FRAMES };
    HostHeader { frames: FRAMES, doorbell: 0, ranges, requested: 3, interval_ms: 0 }
}

/// A guest with a driver for the device.
struct Guest {
    driver: Driver,
    rings: [Ring; 6],
    hole: Arc<TestHole>,
    rung: Receiver<()>,
    news: EventFd,
}

impl Guest {
    /// A guest whose driver is ready.
    fn started() -> Self {
        let (hole, rung) = TestHole::new();
        let news = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let console = Console::new("vm", hole.clone(), news.try_clone().unwrap());
        let rings = [0, 1, 2, 3, 4, 5].map(|queue| Ring::new(queue, QUEUE_SIZES[queue]));
        let mut guest = Self { driver: Driver::new(console), rings, hole, rung, news };
        guest.start();
        guest
    }

    /// Resets the device and starts it with clean rings.
    fn start(&mut self) {
        // Without EVENT_IDX the device notifies for each buffer.
        let features = RING_FEATURES & !(1 << 29) | 1 << VIRTIO_CONSOLE_F_MULTIPORT;
        assert_eq!(self.driver.negotiate(features), FEATURES_OK);
        self.rings.iter_mut().for_each(|ring| ring.set_up(&mut self.driver));
        self.driver.set(VIRTIO_MMIO_STATUS, DRIVER_OK);
    }

    /// Returns a guest that has done the steps of Linux up to the opening of the port.
    fn opened() -> Self {
        let mut guest = Self::started();
        guest.fill(CONTROL_IN, 4096);
        guest.fill(PORT_IN, 4096);
        guest.say(DEVICE_READY);
        assert_eq!(guest.hear(), (ADD, String::new()));
        guest.say(READY);
        assert_eq!(guest.hear(), (IS_NAMED, NAME.to_owned()));
        assert_eq!(guest.hear(), (OPEN, String::new()));
        guest.say(OPEN);
        assert_eq!(guest.read_header(), (header(), true));
        guest
    }

    /// Makes a buffer available to the device.
    fn give(&mut self, queue: usize, index: u16, address: u64, length: u32, is_written: bool) {
        self.rings[queue].give(&mut self.driver, index, (address, length, is_written));
    }

    /// Provides buffers of this length for all descriptors of a queue.
    fn fill(&mut self, queue: usize, length: u32) {
        for index in 0..self.rings[queue].size {
            let address = self.rings[queue].buffer(index);
            self.give(queue, index, address, length, true);
        }
    }

    /// Returns the next used buffer, if there is one: its index and the bytes written.
    fn poll(&mut self, queue: usize) -> Option<(u16, u32)> {
        self.rings[queue].poll(&self.driver)
    }

    fn wait(&mut self, queue: usize) -> (u16, u32) {
        self.rings[queue].wait(&mut self.driver)
    }

    /// Returns the content of the next used buffer of a queue, and makes the buffer available again.
    fn take(&mut self, queue: usize) -> Vec<u8> {
        let (index, length) = self.wait(queue);
        let address = self.rings[queue].buffer(index);
        let mut bytes = vec![0; length as usize];
        self.driver.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        self.give(queue, index, address, 4096, true);
        bytes
    }

    /// Sends bytes in one buffer and waits until the device has taken them.
    fn send(&mut self, queue: usize, bytes: &[u8]) {
        let address = self.rings[queue].buffer(0);
        self.driver.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        self.give(queue, 0, address, bytes.len() as u32, false);
        assert_eq!(self.wait(queue), (0, 0));
    }

    /// Sends a control message: port, event, value.
    fn say(&mut self, (id, event, value): (u32, u16, u16)) {
        let message = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.send(CONTROL_OUT, &message);
    }

    /// Returns the next control message, and the text after it.
    fn hear(&mut self) -> ((u32, u16, u16), String) {
        let bytes = self.take(CONTROL_IN);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let id = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        ((id, half(4), half(6)), String::from_utf8(bytes[8..].to_vec()).unwrap())
    }

    /// Returns the next message of the host.
    fn read_header(&mut self) -> (HostHeader, bool) {
        let mut decoder = Decoder::new();
        loop {
            let bytes = self.take(PORT_IN);
            if let Some(Item::Host { header, begins }) = decoder.next(&mut &bytes[..]).unwrap() {
                return (header, begins);
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        // A buffer here holds at most that many bytes.
        for bytes in bytes.chunks(4096) {
            self.send(PORT_OUT, bytes);
        }
    }

    fn wait_rung(&self) {
        self.rung.recv_timeout(TIME_LIMIT).expect("the hole is rung");
    }

    fn request(&self, number: u32) {
        self.hole.hole().set_requested(number);
        self.news.write(1).unwrap();
    }
}

fn flags(first: u32, words: &[u32]) -> Vec<u8> {
    let mut message = port::flags(first, words.len() as u32).to_vec();
    message.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    message
}

fn pass(generation: u32) -> GuestHeader {
    GuestHeader { generation, answered: 3, next_ms: 2000, time_ms: 1 << 33, ..GuestHeader::default() }
}

#[test]
fn the_configuration_describes_two_ports() {
    let (hole, _rung) = TestHole::new();
    let console = Console::new("vm", hole, EventFd::new(libc::EFD_NONBLOCK).unwrap());
    assert_eq!((console.device_type(), console.features()), (3, 2));
    assert_eq!(console.queue_sizes().len(), 2 * (PORTS as usize + 1));
    let mut config = [0xaa; 12];
    console.read_config(0, &mut config);
    assert_eq!(config, [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn words_that_a_guest_sends_lie_in_the_hole() {
    let mut guest = Guest::opened();
    let words: Vec<u32> = (1..=1500).collect();
    guest.write(&flags(600, &words));
    guest.write(&flags(FRAMES - 1, &[77]));
    assert!(guest.hole.hole().guest_header().is_err() && guest.rung.try_recv().is_err());
    guest.write(&port::pass(&pass(9)));
    guest.wait_rung();
    let hole = guest.hole.hole();
    assert_eq!(hole.guest_header(), Ok(pass(9)));
    for (frame, word) in (0..).zip(hole.flags()) {
        let expected = match frame {
            600..2100 => frame - 599,
            4999 => 77,
            _ => 0,
        };
        assert_eq!(word.load(Ordering::Relaxed), expected, "{frame}");
    }
    let counters: Vec<_> = (0..hole.blocks()).map(|block| hole.counter(block)).collect();
    assert_eq!(counters, [1, 1, 1, 0, 1]);
    // The longest possible message.
    let words = vec![5; MAX_FLAGS];
    guest.write(&flags(0, &words));
    assert_eq!((guest.hole.word(0), guest.hole.word(MAX_FLAGS as u32 - 1)), (5, 5));
}

#[test]
fn a_guest_hears_of_requests() {
    let mut guest = Guest::opened();
    for number in [4, u32::MAX, 0] {
        guest.request(number);
        assert_eq!(guest.read_header(), (HostHeader { requested: number, ..header() }, false));
    }
    guest.hole.hole().set_interval_ms(500);
    guest.request(0);
    let news = HostHeader { requested: 0, interval_ms: 500, ..header() };
    assert_eq!(guest.read_header(), (news, false));
    // Nothing is sent twice, and nothing to a guest that does not listen.
    guest.request(0);
    guest.say(CLOSE);
    guest.request(8);
    guest.say(READY);
    assert_eq!((guest.hear().0, guest.hear().0), (IS_NAMED, OPEN));
    assert!(guest.poll(PORT_IN).is_none());
    guest.say(OPEN);
    assert_eq!(guest.read_header(), (HostHeader { requested: 8, ..news }, true));
}

#[test]
fn a_message_that_has_begun_ends_with_the_opening() {
    let mut guest = Guest::opened();
    let message = flags(10, &[1, 2, 3]);
    guest.write(&message[..14]);
    guest.say(CLOSE);
    // A closed port drops data.
    guest.write(&flags(20, &[9]));
    guest.say(OPEN);
    assert!(guest.read_header().1);
    guest.write(&message);
    guest.write(&port::pass(&pass(1)));
    guest.wait_rung();
    assert_eq!([10, 11, 12, 20].map(|frame| guest.hole.word(frame)), [1, 2, 3, 0]);
}

#[test]
fn what_was_sent_before_the_port_closes_counts() {
    let mut guest = Guest::opened();
    // Linux sends and closes without waiting. The worker may see the closing first.
    for round in 1..200 {
        let message = [flags(5, &[round]), port::pass(&pass(round)).to_vec()].concat();
        let address = guest.rings[PORT_OUT].buffer(0);
        guest.driver.memory.write_slice(&message, GuestAddress(address)).unwrap();
        guest.give(PORT_OUT, 0, address, message.len() as u32, false);
        guest.say(CLOSE);
        assert_eq!(guest.hole.hole().guest_header(), Ok(pass(round)));
        assert_eq!(guest.hole.word(5), round);
        assert_eq!(guest.wait(PORT_OUT), (0, 0));
        guest.say(OPEN);
        assert!(guest.read_header().1);
    }
}

#[test]
fn a_stream_that_makes_no_sense_closes_the_port_alone() {
    let mut guest = Guest::opened();
    let garbage = [
        b"hello, world".to_vec(),
        flags(FRAMES, &[1]),
        flags(FRAMES - 1, &[1, 1]),
        flags(u32::MAX, &[1]),
        port::host(&header(), true).to_vec(),
        vec![0xff; 4096],
    ];
    for (round, garbage) in (1..).zip(garbage) {
        guest.write(&garbage);
        assert_eq!(guest.hear(), (CLOSE, String::new()), "{garbage:x?}");
        // No data is accepted until the port is opened again. Then all data is.
        guest.write(&flags(1, &[u32::MAX]));
        guest.write(&garbage);
        guest.say(CLOSE);
        guest.say(OPEN);
        assert_eq!(guest.hear(), (OPEN, String::new()));
        assert!(guest.read_header().1);
        guest.write(&flags(1, &[round]));
        assert_eq!(guest.hole.word(1), round);
    }
    assert_eq!(guest.driver.status(), DRIVER_OK);
}

#[test]
fn control_messages_that_make_no_sense_are_ignored() {
    let mut guest = Guest::started();
    guest.fill(CONTROL_IN, 4096);
    for message in [
        (0, 0, 0),
        (0, 3, 1),
        (2, 3, 1),
        (PORT, 3, 0),
        (0, 6, 1),
        (u32::MAX, 6, 1),
        (PORT, 1, 1),
        (PORT, 2, 1),
        (PORT, u16::MAX, u16::MAX),
    ] {
        guest.say(message);
    }
    guest.send(CONTROL_OUT, &[1, 0, 0]);
    guest.send(CONTROL_OUT, &[]);
    assert!(guest.poll(CONTROL_IN).is_none());
    // Longer messages are read up to their known length.
    let long = [&PORT.to_le_bytes()[..], &[3, 0, 1, 0], &[9; 4000]].concat();
    guest.send(CONTROL_OUT, &long);
    assert_eq!((guest.hear().0, guest.hear().0), (IS_NAMED, OPEN));
}

#[test]
fn a_driver_without_buffers_is_owed_each_message_once() {
    let mut guest = Guest::started();
    for _ in 0..1000 {
        guest.say(DEVICE_READY);
        guest.say(READY);
        guest.say(CLOSE);
        guest.say(OPEN);
        guest.request(7);
    }
    guest.write(b"garbage");
    guest.write(b"garbage");
    guest.say(CLOSE);
    guest.say(OPEN);
    guest.fill(CONTROL_IN, 4096);
    assert_eq!([guest.hear().0, guest.hear().0, guest.hear().0], [ADD, IS_NAMED, OPEN]);
    // Buffers for a header may have any length.
    let address = guest.rings[PORT_IN].buffer(0);
    let mut bytes = Vec::new();
    while bytes.len() < HOST_BYTES {
        guest.give(PORT_IN, 0, address, 7, true);
        let (_, length) = guest.wait(PORT_IN);
        let mut piece = vec![0; length as usize];
        guest.driver.memory.read_slice(&mut piece, GuestAddress(address)).unwrap();
        bytes.extend(piece);
    }
    let item = Decoder::new().next(&mut &bytes[..]).unwrap();
    assert_eq!(item, Some(Item::Host { header: HostHeader { requested: 7, ..header() }, begins: true }));
    assert!(guest.poll(CONTROL_IN).is_none());
    guest.give(PORT_IN, 0, address, 7, true);
    guest.say(READY);
    assert_eq!(guest.hear().0, IS_NAMED);
    assert!(guest.poll(PORT_IN).is_none(), "there is nothing more to say");
}

/// Starts a device, lets `misbehave` spoil a queue, and expects that the device needs a reset and works after
/// one.
fn breaks(misbehave: impl FnOnce(&mut Guest)) {
    let mut guest = Guest::opened();
    misbehave(&mut guest);
    guest.driver.wait_needs_reset();
    guest.start();
    guest.fill(PORT_IN, 4096);
    guest.say(OPEN);
    assert!(guest.read_header().1);
    guest.write(&flags(3, &[4]));
    assert_eq!(guest.hole.word(3), 4);
}

#[test]
fn senseless_chains_break_the_device() {
    let outside = [(MEMORY_SIZE - 4, 8), (MEMORY_SIZE, 8), (u64::MAX - 7, 8)];
    for (address, length) in outside {
        breaks(|guest| guest.give(PORT_OUT, 0, address, length, false));
    }
    breaks(|guest| guest.give(CONTROL_OUT, 0, MEMORY_SIZE, 8, false));
    // Chains without room for a message, and a chain that refers to nothing.
    for length in [0, 7] {
        breaks(|guest| {
            guest.start();
            guest.give(CONTROL_IN, 0, BUFFERS, length, true);
            guest.say_and_break(READY);
        });
    }
    breaks(|guest| {
        guest.start();
        guest.give(PORT_IN, 0, BUFFERS, 0, true);
        guest.say_and_break(OPEN);
    });
    breaks(|guest| {
        let descriptor = Descriptor::new(BUFFERS, 8, 1, 200);
        let table = guest.rings[PORT_OUT].base();
        guest.driver.memory.write_obj(descriptor, GuestAddress(table)).unwrap();
        let available = GuestAddress(table + AVAILABLE_OFFSET + 2);
        guest.driver.memory.store(guest.rings[PORT_OUT].available + 1, available, Ordering::Release).unwrap();
        guest.driver.notify_queue(PORT_OUT as u32);
    });
}

impl Guest {
    /// Sends a control message that breaks the device.
    fn say_and_break(&mut self, (id, event, value): (u32, u16, u16)) {
        let message = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        let address = self.rings[CONTROL_OUT].buffer(0);
        self.driver.memory.write_slice(&message, GuestAddress(address)).unwrap();
        self.give(CONTROL_OUT, 0, address, 8, false);
    }
}

#[test]
fn a_reset_takes_back_what_was_said() {
    let mut guest = Guest::opened();
    guest.write(&port::pass(&pass(1)));
    guest.wait_rung();
    assert!(guest.hole.hole().guest_header().is_ok());
    guest.start();
    guest.wait_rung();
    assert!(guest.hole.hole().guest_header().is_err());
}

#[test]
fn a_driver_without_control_messages_has_no_port() {
    let (hole, _rung) = TestHole::new();
    let news = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let mut driver = Driver::new(Console::new("vm", hole, news));
    assert_eq!(driver.negotiate(RING_FEATURES), FEATURES_OK);
    driver.set(VIRTIO_MMIO_STATUS, DRIVER_OK);
    driver.wait_needs_reset();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The same words arrive for any division of a stream into buffers. An invalid stream counts up to its
    /// first fault.
    #[test]
    fn streams_are_cut_anywhere(
        words in prop::collection::vec((0..FRAMES + 50, 1..u32::MAX), 1..40),
        spoilt in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
        pieces in prop::collection::vec(1..100_usize, 1..20),
    ) {
        let mut stream: Vec<u8> = words.iter().flat_map(|&(frame, word)| flags(frame, &[word])).collect();
        if let Some((place, byte)) = spoilt {
            let place = place.index(stream.len());
            stream[place] = byte;
        }
        let mut expected = vec![0; FRAMES as usize];
        let (mut decoder, mut rest) = (Decoder::new(), &stream[..]);
        while let Ok(Some(Item::Flags { frame, word })) = decoder.next(&mut rest) {
            match expected.get_mut(frame as usize) {
                Some(place) => *place = word,
                None => break,
            }
        }

        let mut guest = Guest::opened();
        let (mut rest, mut pieces) = (&stream[..], pieces.iter().cycle());
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(rest.len().min(*pieces.next().unwrap()));
            guest.write(piece);
            rest = behind;
        }
        let words: Vec<_> = (0..FRAMES).map(|frame| guest.hole.word(frame)).collect();
        prop_assert_eq!(words, expected);
        prop_assert_eq!(guest.driver.status(), DRIVER_OK);
    }

    /// Rings and tables of arbitrary bytes.
    #[test]
    fn any_rings_are_survived(
        bytes in prop::collection::vec(any::<u8>(), 0x100),
        tables in prop::collection::vec((0..0x12_0000_u64, 0..0x3000_u32, 0..8_u16, 0..10_u16), 48),
        available in prop::collection::vec(0..12_u16, 6),
    ) {
        let mut guest = Guest::started();
        let memory = &guest.driver.memory;
        for ring in &guest.rings {
            for (index, &(address, length, flags, next)) in (0..8).zip(&tables[8 * ring.queue..]) {
                let descriptor = Descriptor::new(address, length, flags, next);
                memory.write_obj(descriptor, GuestAddress(ring.base() + 16 * index)).unwrap();
            }
            for (index, &byte) in (0..8).zip(&bytes[8 * ring.queue..]) {
                let slot = ring.base() + AVAILABLE_OFFSET + 4 + 2 * index;
                memory.write_obj(u16::from(byte % 9), GuestAddress(slot)).unwrap();
            }
        }
        for page in 0..0x40 {
            memory.write_slice(&bytes, GuestAddress(BUFFERS + page * 0x1000)).unwrap();
        }
        for (ring, available) in guest.rings.iter().zip(available) {
            let index = GuestAddress(ring.base() + AVAILABLE_OFFSET + 2);
            memory.store(available, index, Ordering::Release).unwrap();
        }
        for queue in 0..6 {
            guest.driver.notify_queue(queue);
        }
        // The device may have broken or not. It must work after a reset.
        guest.start();
        guest.fill(PORT_IN, 4096);
        guest.say(OPEN);
        prop_assert!(guest.read_header().1);
    }
}
