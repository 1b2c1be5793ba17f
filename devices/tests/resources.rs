//! Checks that a stopped disk leaves no files and threads in the process. This test has a program of its own,
//! so that no other test opens files or starts threads meanwhile.

#![allow(missing_docs)]

use std::time::{Duration, Instant};
use std::{fs, thread};

use samepage_devices::disk::DiskOptions;
use samepage_devices::virtio::RING_FEATURES;
use samepage_devices::virtio::block::{Block, BlockConfig, SECTOR_SIZE};
use samepage_devices::virtio::mmio::MmioTransport;
use samepage_devices::{BusDevice, GuestMemory};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

const QUEUE_READY: u64 = 0x44;
const STATUS: u64 = 0x70;

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn workers() -> Vec<String> {
    let threads = fs::read_dir("/proc/self/task").unwrap();
    let names = threads.filter_map(|thread| fs::read_to_string(thread.unwrap().path().join("comm")).ok());
    names.filter(|name| name.starts_with("block-")).map(|name| name.trim_end().to_owned()).collect()
}

/// Waits until exactly these threads of disks run. A thread sets its own name, and the kernel removes its
/// entry in `/proc` a moment after it was joined.
fn expect_workers(expected: &[&str]) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while workers() != expected {
        assert!(Instant::now() < deadline, "{:?} are running, not {expected:?}", workers());
        thread::yield_now();
    }
}

fn start(transport: &mut MmioTransport) {
    for (register, value) in [
        (STATUS, 0),
        (STATUS, 3),
        (0x24, 1),
        (0x20, (RING_FEATURES >> 32) as u32),
        (STATUS, 11),
        (0x38, 16),
        (0x80, 0x1000),
        (0x90, 0x2000),
        (0xa0, 0x3000),
        (QUEUE_READY, 1),
        (STATUS, 15),
    ] {
        transport.write(register, &value.to_le_bytes());
    }
    let mut status = [0; 4];
    transport.read(STATUS, &mut status);
    assert_eq!(status, [15, 0, 0, 0]);
}

#[test]
fn stopping_joins_the_worker_and_closes_every_file() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(8 * SECTOR_SIZE).unwrap();
    let config = BlockConfig {
        vm: "alpha".to_owned(),
        id: "root".to_owned(),
        queues: 1,
        disk: DiskOptions::new(image.path()),
    };
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let before = open_files();

    for _ in 0..3 {
        let block = Block::open(&config, None).unwrap();
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut transport = MmioTransport::new(memory.clone(), Box::new(block), interrupt).unwrap();
        let idle = open_files();

        start(&mut transport);
        expect_workers(&["block-alpha-roo"]);
        transport.write(STATUS, &0u32.to_le_bytes());
        expect_workers(&[]);
        assert_eq!(open_files(), idle);

        start(&mut transport);
        transport.shutdown();
        assert_eq!(open_files(), idle);
        start(&mut transport);
        drop(transport);
        expect_workers(&[]);
        assert_eq!(open_files(), before);
    }
}
