use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use samepage_spec::Size;
use virtio_bindings::bindings::virtio_mmio::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::BusDevice;
use crate::net::{HEADER_BYTES, Sent};
use crate::virtio::RING_FEATURES;
use crate::virtio::testing::{QUEUE_SIZE, *};

mod detour;

const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];
const RECEIVE: usize = 0;
const SEND: usize = 1;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
/// Without EVENT_IDX the device notifies for each buffer.
const PLAIN: u64 = RING_FEATURES & !(1 << 29);

/// A link over a socket of datagrams: a frame and its header are one.
struct TestLink {
    socket: UnixDatagram,
    is_enabled: AtomicBool,
    is_gone: AtomicBool,
    work: AtomicU64,
}

impl TestLink {
    fn new() -> (Arc<Self>, UnixDatagram) {
        let (socket, other) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        other.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let link = Self {
            socket,
            is_enabled: AtomicBool::new(true),
            is_gone: AtomicBool::new(false),
            work: AtomicU64::new(0),
        };
        (Arc::new(link), other)
    }
}

impl Link for TestLink {
    fn file(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        if self.is_gone.load(SeqCst) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        match self.socket.recv(buffer) {
            Ok(length) => Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn send(&self, frame: &[u8]) -> io::Result<Sent> {
        match self.socket.send(frame) {
            Ok(_) => Ok(Sent::Done),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Sent::Full),
            Err(_) => Ok(Sent::Dropped),
        }
    }

    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true, ufo: false }
    }

    fn set_guest_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.work.store(u64::from(offloads.checksum) + 2 * u64::from(offloads.tso4), SeqCst);
        Ok(())
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        self.is_enabled.store(enabled, SeqCst);
        Ok(())
    }
}

/// A guest with a driver for the device, and the other ends of its links.
struct Guest {
    driver: Driver,
    rings: Vec<Ring>,
    links: Vec<Arc<TestLink>>,
    others: Vec<UnixDatagram>,
    stats: Arc<NetStats>,
    state: Arc<LinkState>,
}

fn config() -> NetConfig {
    NetConfig {
        vm: "vm".into(),
        id: "net0".into(),
        mac: MAC,
        mtu: Some(1400),
        receive: RateLimits::default(),
        send: RateLimits::default(),
    }
}

impl Guest {
    fn started(features: u64) -> Self {
        Self::with(&config(), 1, features)
    }

    fn with(config: &NetConfig, pairs: usize, features: u64) -> Self {
        let (links, others): (Vec<_>, _) = (0..pairs).map(|_| TestLink::new()).unzip();
        let net = Net::new(config, links.iter().map(|link| link.clone() as Arc<dyn Link>).collect());
        let (stats, state) = (net.stats(), net.link_state());
        let mut guest = Self { driver: Driver::new(net), rings: Vec::new(), links, others, stats, state };
        guest.start(features);
        guest
    }

    /// Resets the device and starts it with clean rings.
    fn start(&mut self, features: u64) {
        assert_eq!(self.driver.negotiate(PLAIN | features), FEATURES_OK);
        let queues = if features & (1 << VIRTIO_NET_F_MQ) != 0 { 2 * self.links.len() + 1 } else { 2 };
        self.rings = (0..queues).map(|queue| Ring::new(queue, QUEUE_SIZE)).collect();
        self.rings.iter_mut().for_each(|ring| ring.set_up(&mut self.driver));
        self.driver.set(VIRTIO_MMIO_STATUS, DRIVER_OK);
    }

    fn buffer(queue: usize, index: u16) -> u64 {
        Ring::new(queue, QUEUE_SIZE).buffer(index)
    }

    /// Makes a chain available, whose first descriptor has this number.
    fn give(&mut self, queue: usize, first: u16, buffers: &[Buffer]) {
        let base = self.rings[queue].base();
        for (index, &(address, length, is_written)) in (first..).zip(buffers) {
            let more = usize::from(index - first) + 1 < buffers.len();
            let flags = u16::from(more) | if is_written { 2 } else { 0 };
            let descriptor = Descriptor::new(address, length, flags, index + 1);
            self.driver.put_descriptor(base, index, descriptor);
        }
        self.rings[queue].make_available(&mut self.driver, first);
    }

    /// Offers a buffer for frames.
    fn offer(&mut self, index: u16, length: u32) {
        self.give(RECEIVE, index, &[(Self::buffer(RECEIVE, index), length, true)]);
    }

    /// Sends a frame with this header, in two descriptors.
    fn transmit(&mut self, header: [u8; HEADER_BYTES], frame: &[u8]) {
        let address = Self::buffer(SEND, 0);
        self.driver.memory.write_slice(&[&header, frame].concat(), GuestAddress(address)).unwrap();
        let all = (HEADER_BYTES + frame.len()) as u32;
        self.give(SEND, 0, &[(address, 5, false), (address + 5, all - 5, false)]);
    }

    fn poll(&mut self, queue: usize) -> Option<(u16, u32)> {
        self.rings[queue].poll(&self.driver)
    }

    fn wait(&mut self, queue: usize) -> (u16, u32) {
        self.rings[queue].wait(&mut self.driver)
    }

    fn bytes(&self, address: u64, length: u32) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.driver.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Returns what the other end of the first link gets next.
    fn heard(&self) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let length = self.others[0].recv(&mut bytes).unwrap();
        bytes.truncate(length);
        bytes
    }
}

fn frame(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7) as u8).collect()
}

#[test]
fn frames_pass_in_both_directions() {
    let mut guest = Guest::started(MERGEABLE);
    guest.transmit([0; HEADER_BYTES], &frame(1000));
    assert_eq!(guest.heard(), [vec![0; HEADER_BYTES], frame(1000)].concat());
    assert_eq!(guest.wait(SEND), (0, 0));
    guest.offer(3, 2000);
    guest.others[0].send(&[vec![0; HEADER_BYTES], frame(700)].concat()).unwrap();
    assert_eq!(guest.wait(RECEIVE), (3, 712));
    let got = guest.bytes(Guest::buffer(RECEIVE, 3), 712);
    assert_eq!(got, [&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], &frame(700)[..]].concat());
    let stats = &guest.stats;
    let counted = [&stats.sent_frames, &stats.sent_bytes, &stats.received_frames, &stats.received_bytes];
    assert_eq!(counted.map(|counter| counter.load(Relaxed)), [1, 1000, 1, 700]);
}

#[test]
fn a_frame_waits_until_there_are_buffers_for_all_of_it() {
    let mut guest = Guest::started(MERGEABLE);
    guest.others[0].send(&[vec![0; HEADER_BYTES], frame(250)].concat()).unwrap();
    guest.offer(0, 100);
    guest.offer(1, 100);
    // The device has both buffers, and completes none before it has the third.
    guest.transmit([0; HEADER_BYTES], &frame(60));
    guest.wait(SEND);
    assert_eq!(guest.poll(RECEIVE), None);
    guest.offer(2, 100);
    assert_eq!(
        [guest.wait(RECEIVE), guest.wait(RECEIVE), guest.wait(RECEIVE)],
        [(0, 100), (1, 100), (2, 62)]
    );
    let parts =
        (0..3).map(|index| guest.bytes(Guest::buffer(RECEIVE, index), [100, 100, 62][usize::from(index)]));
    let whole = parts.collect::<Vec<_>>().concat();
    assert_eq!((&whole[10..HEADER_BYTES], &whole[HEADER_BYTES..]), (&[3, 0][..], &frame(250)[..]));
}

#[test]
fn many_frames_wrap_around_the_rings() {
    let mut guest = Guest::started(MERGEABLE);
    for index in 0..QUEUE_SIZE {
        guest.offer(index, 300);
    }
    for round in 0..200_u32 {
        let length = 100 + (round as usize * 37) % 700;
        guest.others[0].send(&[vec![0; HEADER_BYTES], frame(length)].concat()).unwrap();
        let mut left = length + HEADER_BYTES;
        while left > 0 {
            let (index, written) = guest.wait(RECEIVE);
            left -= written as usize;
            guest.offer(index, 300);
        }
        guest.transmit([0; HEADER_BYTES], &frame(length));
        assert_eq!(guest.heard().len(), HEADER_BYTES + length);
        guest.wait(SEND);
    }
    assert_eq!(guest.stats.received_frames.load(Relaxed), 200);
}

#[test]
fn wrong_frames_are_dropped_and_others_pass() {
    let mut guest = Guest::started(MERGEABLE);
    let mut checksum = [0; HEADER_BYTES];
    checksum[0] = 1;
    let mut segments = [0; HEADER_BYTES];
    segments[1] = 1;
    // No driver has negotiated checksums and segments. The others are too short.
    for (header, length) in
        [(checksum, 100), (segments, 100), ([0; HEADER_BYTES], 13), ([0; HEADER_BYTES], 0)]
    {
        guest.transmit(header, &frame(length));
        assert_eq!(guest.wait(SEND), (0, 0));
    }
    // Longer than any frame, in a chain that goes over the same memory again and again.
    guest.give(SEND, 0, &[(BUFFERS, 0xf000, false); 5]);
    assert_eq!(guest.wait(SEND), (0, 0));
    assert_eq!(guest.stats.sent_dropped.load(Relaxed), 5);
    guest.transmit([0; HEADER_BYTES], &frame(99));
    assert_eq!(guest.heard().len(), HEADER_BYTES + 99);
}

#[test]
fn without_mergeable_buffers_a_small_buffer_loses_its_frame_alone() {
    let mut guest = Guest::started(0);
    guest.offer(0, 50);
    guest.offer(1, 200);
    for _ in 0..2 {
        guest.others[0].send(&[vec![0; HEADER_BYTES], frame(100)].concat()).unwrap();
    }
    assert_eq!([guest.wait(RECEIVE), guest.wait(RECEIVE)], [(0, 0), (1, 112)]);
    assert_eq!(guest.stats.received_dropped.load(Relaxed), 1);
}

#[test]
fn chains_that_cannot_be_served_break_the_device_until_its_reset() {
    let outside = MEMORY_SIZE - 8;
    for (queue, buffers) in [
        (SEND, &[(outside, 100, false)][..]),
        (SEND, &[(BUFFERS, 20, true), (BUFFERS, 20, false)]),
        (RECEIVE, &[(outside, 4000, true)]),
        (RECEIVE, &[(u64::MAX - 3, 4000, true)]),
    ] {
        let mut guest = Guest::started(MERGEABLE);
        guest.others[0].send(&[vec![0; HEADER_BYTES], frame(100)].concat()).unwrap();
        guest.give(queue, 0, buffers);
        guest.driver.wait_needs_reset();
        assert!(guest.stats.last_error().is_some());
        guest.start(MERGEABLE);
        guest.transmit([0; HEADER_BYTES], &frame(99));
        assert_eq!(guest.heard().len(), HEADER_BYTES + 99);
    }
}

#[test]
fn buffers_without_room_do_not_keep_the_device_busy() {
    let mut guest = Guest::started(MERGEABLE);
    guest.others[0].send(&[vec![0; HEADER_BYTES], frame(100)].concat()).unwrap();
    for round in 0..=QUEUE_SIZE {
        guest.offer(round % QUEUE_SIZE, 0);
    }
    guest.driver.wait_needs_reset();
}

#[test]
fn the_driver_chooses_how_many_pairs_it_uses() {
    let several = MERGEABLE | 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
    let mut guest = Guest::with(&config(), 2, several);
    let enabled =
        |guest: &Guest| guest.links.iter().map(|link| link.is_enabled.load(SeqCst)).collect::<Vec<_>>();
    let ask = |guest: &mut Guest, command: &[u8]| {
        let address = Guest::buffer(4, 0);
        guest.driver.memory.write_slice(command, GuestAddress(address)).unwrap();
        guest.driver.memory.write_slice(&[9], GuestAddress(address + 0x800)).unwrap();
        guest.give(4, 0, &[(address, command.len() as u32, false), (address + 0x800, 1, true)]);
        assert_eq!(guest.wait(4), (0, 1));
        guest.bytes(address + 0x800, 1)[0]
    };
    assert_eq!((ask(&mut guest, &[4, 0, 2, 0]), enabled(&guest)), (0, vec![true, true]));
    // The second pair passes frames.
    let address = Guest::buffer(3, 0);
    guest.give(3, 0, &[(address, 100, false)]);
    assert_eq!(guest.wait(3), (0, 0));
    assert_eq!(guest.others[1].recv(&mut [0; 200]).unwrap(), 100);
    for wrong in
        [&[4, 0, 0, 0][..], &[4, 0, 3, 0], &[4, 0, 0, 2], &[4, 1, 1, 0], &[0, 0, 1, 0], &[4, 0, 1], &[]]
    {
        assert_eq!(ask(&mut guest, wrong), 1, "{wrong:?}");
    }
    assert_eq!((ask(&mut guest, &[4, 0, 1, 0]), enabled(&guest)), (0, vec![true, false]));
    guest.give(4, 0, &[(Guest::buffer(4, 0), 4, false)]);
    guest.driver.wait_needs_reset();
}

#[test]
fn the_guest_sees_its_address_its_mtu_and_the_state_of_the_link() {
    let mut guest = Guest::started(MERGEABLE | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4);
    assert_eq!(guest.links[0].work.load(SeqCst), 3);
    let read = |guest: &mut Guest| {
        let mut bytes = [0; 12];
        guest.driver.transport.read(0x100, &mut bytes);
        bytes
    };
    assert_eq!(read(&mut guest), [2, 0, 0, 1, 2, 3, 1, 0, 1, 0, 0x78, 5]);
    guest.state.set(false);
    guest.driver.wait_interrupt();
    assert_eq!(guest.driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(read(&mut guest)[6..8], [0, 0]);
    guest.transmit([0; HEADER_BYTES], &frame(100));
    guest.wait(SEND);
    assert_eq!(guest.stats.sent_dropped.load(Relaxed), 1);
    guest.state.set(true);
    guest.transmit([0; HEADER_BYTES], &frame(100));
    assert_eq!(guest.heard().len(), HEADER_BYTES + 100);
    // The other end goes away.
    guest.links[0].is_gone.store(true, SeqCst);
    guest.transmit([0; HEADER_BYTES], &frame(100));
    while guest.state.is_up() {
        std::thread::yield_now();
    }
    assert_eq!((guest.driver.status(), read(&mut guest)[6]), (DRIVER_OK, 0));
    guest.driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(guest.links[0].work.load(SeqCst), 0);
}

#[test]
fn frames_wait_for_the_limits_and_for_a_full_link() {
    let limits = RateLimits { rate: Some(Size(10_000)), iops: None };
    let mut guest = Guest::with(&NetConfig { send: limits, ..config() }, 1, MERGEABLE);
    let start = Instant::now();
    // The burst of a tenth of a second, and a debt of another tenth.
    for _ in 0..2 {
        guest.transmit([0; HEADER_BYTES], &frame(2000));
        guest.wait(SEND);
    }
    assert!(start.elapsed() >= Duration::from_millis(90));
    assert!(guest.stats.throttled.load(Relaxed) >= 1);

    let mut guest = Guest::started(MERGEABLE);
    // No socket holds so many frames.
    let mut sent = 0;
    loop {
        guest.transmit([0; HEADER_BYTES], &frame(3000));
        sent += 1;
        let deadline = Instant::now() + Duration::from_millis(200);
        let mut done = None;
        while done.is_none() && Instant::now() < deadline {
            done = guest.poll(SEND);
            std::thread::yield_now();
        }
        if done.is_none() {
            break;
        }
    }
    for _ in 0..sent {
        assert_eq!(guest.heard().len(), HEADER_BYTES + 3000);
    }
    guest.wait(SEND);
    assert_eq!(guest.stats.sent_frames.load(Relaxed), sent);
}
