//! Drivers that break the rules, by mistake or on purpose.

use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT as _};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::virtio::worker::{Serve as _, StopFlag};
use crate::virtio::{Interrupt, RING_FEATURES};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const DEVICE_WRITES: u16 = VRING_DESC_F_WRITE as u16;
const IN_TABLE: u16 = VRING_DESC_F_INDIRECT as u16;

#[test]
fn senseless_requests_are_io_errors() {
    let disk = MemoryDisk::new();
    let before = disk.medium().data.clone();
    let mut driver = Driver::started(disk.block(), FLUSH_FEATURE);
    let end = SECTORS as u64;
    for (kind, sector, data) in [
        (READ, 0, &[][..]),
        (WRITE, 0, &[]),
        (READ, 0, &[(DATA, 511, true)]),
        (WRITE, 0, &[(DATA, 513, false)]),
        (READ, end, &[(DATA, 512, true)]),
        (WRITE, end - 1, &[(DATA, 1024, false)]),
        (READ, u64::MAX, &[(DATA, 512, true)]),
        (WRITE, 1 << 55, &[(DATA, 512, false)]),
        (WRITE, (1 << 55) - 1, &[(DATA, 512, false)]),
        // The wrong direction.
        (READ, 0, &[(DATA, 512, false)]),
        (WRITE, 0, &[(DATA, 512, true)]),
        (READ, 0, &[(DATA, 512, false), (DATA, 512, true)]),
        // Outside memory: in the gap, across its edge, and at the end of the address space.
        (READ, 0, &[(MEMORY_SIZE, 512, true)]),
        (WRITE, 0, &[(MEMORY_SIZE - 256, 512, false)]),
        (READ, 0, &[(DATA, 512, true), (u64::MAX - 511, 512, true)]),
        (WRITE, 0, &[(DATA, 512, false), (u64::MAX, 512, false)]),
        (GET_ID, 0, &[(MEMORY_SIZE, 20, true)]),
    ] {
        assert_eq!(driver.request(kind, sector, data), (IO_ERROR, 1), "{kind} {sector} {data:x?}");
    }
    assert_eq!(disk.medium().data, before);

    // A header that is too short.
    driver.submit(&[(HEADER, 15, false), (STATUS, 1, true)]);
    assert_eq!(driver.wait_used().1, 1);
    assert!(driver.read_sectors(0, 1).is_ok(), "the device goes on");
}

#[test]
fn senseless_ranges_are_refused() {
    let disk = MemoryDisk::new();
    let before = disk.medium().data.clone();
    let mut driver = Driver::started(disk.block(), ALL_FEATURES);
    let end = SECTORS as u64;
    for kind in [DISCARD, WRITE_ZEROES] {
        for (ranges, status) in [
            (&[(0, 0, 0)][..], IO_ERROR),
            (&[(0, end as u32 + 1, 0)], IO_ERROR),
            (&[(end, 1, 0)], IO_ERROR),
            (&[(u64::MAX, 1, 0)], IO_ERROR),
            (&[(1 << 55, 1, 0)], IO_ERROR),
            (&[((1 << 55) - 1, u32::MAX, 0)], IO_ERROR),
            (&[(0, u32::MAX, 0)], IO_ERROR),
            // One wrong range spoils the earlier ones.
            (&[(0, 8, 0), (8, 8, 0), (end - 1, 2, 0)], IO_ERROR),
            (&[(0, 1, 0); 17], IO_ERROR),
            (&[(0, 8, 2)], UNSUPPORTED),
            (&[(0, 8, 1 << 31)], UNSUPPORTED),
            (&[(0, 8, 0), (8, 8, 3)], UNSUPPORTED),
        ] {
            assert_eq!(driver.clear_sectors(kind, ranges), status, "{kind} {ranges:?}");
        }
        // Incomplete ranges, no range, ranges that the device should write, and more than memory holds.
        for data in [
            &[][..],
            &[(DATA, 15, false)],
            &[(DATA, 17, false)],
            &[(DATA, 16, true)],
            &[(DATA, 16, false), (DATA + 16, 16, true)],
            &[(DATA, 16, false), (MEMORY_SIZE - 8, 16, false)],
            &[(DATA, 0x10000, false)],
        ] {
            assert_eq!(driver.request(kind, 0, data).0, IO_ERROR, "{kind} {data:x?}");
        }
    }
    assert_eq!(driver.clear_sectors(DISCARD, &[(0, 8, 1)]), UNSUPPORTED, "a discard has no unmap flag");
    assert_eq!(disk.medium().data, before);
    assert_eq!(driver.clear_sectors(WRITE_ZEROES, &[(0, 1, 1); 16]), OK);
    assert_eq!(disk.medium().data[..SECTOR], [0; SECTOR]);

    // The requests fail if they were not negotiated, and always on a read-only disk.
    driver.start(RING_FEATURES | FLUSH_FEATURE);
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(driver.clear_sectors(kind, &[(0, 8, 0)]), UNSUPPORTED);
    }
    let read_only = MemoryDisk { read_only: true, ..MemoryDisk::new() }.block();
    assert_eq!(read_only.features() & (DISCARD_FEATURE | ZEROES_FEATURE), 0);
}

#[test]
fn a_chain_made_available_again_and_again_is_bounded() {
    let (entered, _has_entered) = mpsc::channel();
    let (pass, gate) = mpsc::channel();
    let gate = Gate { disk: MemoryDisk::new(), entered, pass: Mutex::new(gate) };
    let block = Block::new("vm", "disk", 1, Disk::new(Arc::new(gate), Engine::Auto)).unwrap();
    let mut driver = Driver::started(block, FLUSH_FEATURE);
    driver.put_header(READ, 0);
    let chain = [(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)];
    driver.put_chain(DESCRIPTORS, &chain);
    for _ in 0..1000 {
        driver.make_available(0);
        driver.notify();
        std::thread::yield_now();
    }
    drop(pass);
    driver.transport.reset();
    driver.start(RING_FEATURES | FLUSH_FEATURE);
    assert!(driver.read_sectors(0, 1).is_ok());
}

/// Starts a device, lets `misbehave` spoil the queue, and expects that the device needs a reset and works
/// after one.
fn breaks(misbehave: impl FnOnce(&mut Driver)) {
    let disk = MemoryDisk::new();
    let block = disk.block();
    let stats = block.stats();
    let mut driver = Driver::started(block, FLUSH_FEATURE);
    assert!(driver.read_sectors(0, 1).is_ok());

    driver.put_header(READ, 0);
    misbehave(&mut driver);
    driver.notify();
    driver.wait_needs_reset();
    assert!(stats.last_error().unwrap().contains("reset"));

    driver.start(RING_FEATURES | FLUSH_FEATURE);
    assert!(driver.read_sectors(0, 1).is_ok());
}

#[test]
fn a_request_without_a_status_byte_breaks_the_device() {
    breaks(|driver| driver.submit(&[(HEADER, 16, false)]));
    breaks(|driver| driver.submit(&[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, false)]));
    breaks(|driver| driver.submit(&[(HEADER, 16, false), (DATA, 512, true), (MEMORY_SIZE, 1, true)]));
    breaks(|driver| driver.submit(&[(HEADER, 16, false), (STATUS, 0, true)]));
}

#[test]
fn a_chain_that_does_not_end_breaks_the_device() {
    for next in [0, 1, QUEUE_SIZE, u16::MAX] {
        breaks(|driver| {
            driver.put_descriptor(DESCRIPTORS, 0, Descriptor::new(HEADER, 16, NEXT, 1));
            driver.put_descriptor(DESCRIPTORS, 1, Descriptor::new(DATA, 512, NEXT | DEVICE_WRITES, next));
            driver.make_available(0);
        });
    }
    // More than 2^32 bytes.
    breaks(|driver| {
        driver.put_descriptor(DESCRIPTORS, 0, Descriptor::new(HEADER, u32::MAX, NEXT, 1));
        driver.put_descriptor(DESCRIPTORS, 1, Descriptor::new(STATUS, 1, DEVICE_WRITES, 0));
        driver.make_available(0);
    });
}

#[test]
fn a_chain_out_of_order_breaks_the_device() {
    breaks(|driver| driver.submit(&[(HEADER, 16, false), (STATUS, 1, true), (DATA, 512, false)]));
}

#[test]
fn senseless_indirect_tables_break_the_device() {
    for (table, len, flags) in [
        (INDIRECT, 0, IN_TABLE),
        (INDIRECT, 17, IN_TABLE),
        (INDIRECT, !15, IN_TABLE),
        (MEMORY_SIZE, 32, IN_TABLE),
        (u64::MAX - 15, 32, IN_TABLE),
    ] {
        breaks(|driver| {
            driver.put_descriptor(DESCRIPTORS, 0, Descriptor::new(table, len, flags, 0));
            driver.make_available(0);
        });
    }
    // A table that refers to a table, and a table longer than any request.
    breaks(|driver| {
        driver.put_descriptor(DESCRIPTORS, 0, Descriptor::new(INDIRECT, 16, IN_TABLE, 0));
        driver.put_descriptor(INDIRECT, 0, Descriptor::new(INDIRECT, 16, IN_TABLE, 0));
        driver.make_available(0);
    });
    breaks(|driver| {
        for i in 0..300 {
            driver.put_descriptor(INDIRECT, i, Descriptor::new(HEADER, 1, NEXT, i + 1));
        }
        driver.put_descriptor(INDIRECT, 300, Descriptor::new(STATUS, 1, DEVICE_WRITES, 0));
        driver.put_descriptor(DESCRIPTORS, 0, Descriptor::new(INDIRECT, 301 * 16, IN_TABLE, 0));
        driver.make_available(0);
    });
}

#[test]
fn senseless_available_rings_break_the_device() {
    breaks(|driver| driver.make_available(QUEUE_SIZE));
    breaks(|driver| driver.make_available(u16::MAX));
    breaks(|driver| driver.publish_available(driver.available.wrapping_add(QUEUE_SIZE + 1)));
    breaks(|driver| driver.publish_available(driver.available.wrapping_sub(1)));
}

/// An image that reports each read and waits for permission to continue.
struct Gate {
    disk: MemoryDisk,
    entered: mpsc::Sender<()>,
    pass: Mutex<mpsc::Receiver<()>>,
}

impl Image for Gate {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn physical_block_size(&self) -> u32 {
        512
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn identity(&self) -> Option<ImageId> {
        self.disk.identity()
    }

    fn locate(&self, offset: u64, len: u64) -> io::Result<Location> {
        self.disk.locate(offset, len)
    }

    fn read_at(&self, layer: Layer, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let _ = self.entered.send(());
        // A closed channel lets all reads through.
        let _ = self.pass.lock().unwrap().recv();
        self.disk.read_at(layer, offset, data)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.disk.write_at(offset, data)
    }

    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.disk.write_zeroes(offset, len, unmap)
    }
}

#[test]
fn a_reset_in_the_middle_of_io_ends_it() {
    let (entered, has_entered) = mpsc::channel();
    let (pass, gate) = mpsc::channel();
    let gate = Gate { disk: MemoryDisk::new(), entered, pass: Mutex::new(gate) };
    let block = Block::new("vm", "disk", 1, Disk::new(Arc::new(gate), Engine::Auto)).unwrap();
    let mut driver = Driver::started(block, FLUSH_FEATURE);

    let len = (SECTORS * SECTOR) as u32;
    driver.put_header(READ, 0);
    driver.submit(&[(HEADER, 16, false), (DATA, len, true), (STATUS, 1, true)]);
    has_entered.recv_timeout(Duration::from_secs(120)).unwrap();
    std::thread::scope(|scope| {
        let resetting = scope.spawn(|| {
            driver.transport.reset();
            &mut driver
        });
        drop(pass);
        let driver = resetting.join().unwrap();
        assert_eq!(driver.status(), 0);

        // The device no longer accesses memory.
        driver.memory.write_slice(&vec![0x55; len as usize], GuestAddress(DATA)).unwrap();
        assert_eq!(driver.poll_used().map(|used| used.0), Some(0));
        let status: u8 = driver.memory.read_obj(GuestAddress(STATUS)).unwrap();
        assert!([OK, IO_ERROR].contains(&status));
        let mut data = vec![0; len as usize];
        driver.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        assert!(data.iter().all(|&byte| byte == 0x55));
    });

    driver.start(RING_FEATURES | FLUSH_FEATURE);
    assert!(driver.read_sectors(0, 1).is_ok());
}

/// Serves the rings in `memory` on this thread until they are empty or broken, then stops.
fn serve(memory: &crate::GuestMemory, event_idx: bool) {
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
    queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    let interrupt = Arc::new(Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
    let queue = ServedQueue::new(queue, memory.clone(), interrupt);

    let disk = Arc::new(MemoryDisk::new().disk());
    let rules = Rules { read_only: false, features: ALL_FEATURES };
    let common = Common {
        disk,
        id: [b'x'; MAX_ID_LEN],
        rules,
        write_through: true,
        stats: Arc::default(),
        observer: None,
    };
    let mut service =
        Service::new(Arc::new(common), queue, EventFd::new(libc::EFD_NONBLOCK).unwrap(), "block-test")
            .unwrap();
    let stop = StopFlag::default();
    // The rings may be valid or not. A queue that wraps around may be served for ever, so stop it at some
    // point.
    for _ in 0..64 {
        if service.serve(&stop).is_err() || service.channel.in_flight() == 0 {
            break;
        }
        let _ = service.channel.wait();
    }
    stop.set();
    let _ = service.serve(&stop);
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => BUFFERS..BUFFERS + 0x2000,
        2 => prop::sample::select(vec![HEADER, STATUS, INDIRECT, DESCRIPTORS, AVAILABLE, USED]),
        2 => prop::sample::select(vec![MEMORY_SIZE - 8, MEMORY_SIZE, FAR_REGION - 1, FAR_REGION, u64::MAX - 100]),
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![prop::sample::select(vec![0, 1, 16, 20, 32, 160, 512, 4096, 1 << 20]), any::<u32>()]
}

type Table = Vec<(u64, u32, u16, u16)>;

fn table() -> impl Strategy<Value = Table> {
    prop::collection::vec((address(), length(), 0u16..8, 0u16..QUEUE_SIZE + 2), QUEUE_SIZE as usize)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Descriptor tables that resemble valid ones, with every possible mistake.
    #[test]
    fn any_descriptors_are_survived(
        direct in table(),
        indirect in table(),
        heads in prop::collection::vec(0u16..QUEUE_SIZE + 1, QUEUE_SIZE as usize),
        available in 0u16..QUEUE_SIZE + 2,
        headers in prop::collection::vec((0u32..14, 0u64..1100), 32),
        event_idx in any::<bool>(),
    ) {
        let memory = memory();
        for (base, table) in [(DESCRIPTORS, direct), (INDIRECT, indirect)] {
            for (i, (address, len, flags, next)) in table.into_iter().enumerate() {
                let descriptor = Descriptor::new(address, len, flags, next);
                memory.write_obj(descriptor, GuestAddress(base + i as u64 * 16)).unwrap();
            }
        }
        for (i, (kind, sector)) in headers.into_iter().enumerate() {
            memory.write_obj(u64::from(kind), GuestAddress(BUFFERS + i as u64 * 16)).unwrap();
            memory.write_obj(sector, GuestAddress(BUFFERS + i as u64 * 16 + 8)).unwrap();
        }
        for (i, head) in heads.into_iter().enumerate() {
            memory.write_obj(head, GuestAddress(AVAILABLE + 4 + i as u64 * 2)).unwrap();
        }
        memory.write_obj(available, GuestAddress(AVAILABLE + 2)).unwrap();

        serve(&memory, event_idx);
    }

    /// Rings, tables and requests of arbitrary bytes.
    #[test]
    fn any_bytes_in_memory_are_survived(
        bytes in prop::collection::vec(any::<u8>(), 0x400),
        available in 0u16..QUEUE_SIZE + 2,
        event_idx in any::<bool>(),
    ) {
        let memory = memory();
        for page in 0..0x20 {
            memory.write_slice(&bytes, GuestAddress(page * 0x1000)).unwrap();
        }
        memory.write_obj(available, GuestAddress(AVAILABLE + 2)).unwrap();

        serve(&memory, event_idx);
    }
}
