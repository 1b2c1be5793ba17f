//! The limits of a disk, and disks with several queues.

use super::*;
use crate::virtio::RING_FEATURES;
use samepage_spec::{RateLimits, Size};

#[test]
fn a_disk_over_its_limit_waits_until_it_may_go_on() {
    let block = MemoryDisk::new().block();
    let (limiter, stats) = (block.limiter(), block.stats());
    // One request passes. Its debt lasts for the whole test.
    limiter.set(RateLimits { rate: Some(Size(1)), iops: None });
    let mut driver = Driver::started(block, ALL_FEATURES);
    assert!(driver.read_sectors(0, 64).is_ok());
    for _ in 0..3 {
        driver.put_header(READ, 0);
        driver.submit(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    }
    while stats.throttled.load(Relaxed) == 0 {
        std::thread::yield_now();
    }
    assert_eq!(driver.poll_used(), None);
    limiter.set(RateLimits::default());
    for _ in 0..3 {
        driver.wait_used();
    }
    assert_eq!(stats.throttled.load(Relaxed), 1, "the others waited behind it");

    // A reset does not wait for the limit.
    limiter.set(RateLimits { rate: None, iops: Some(1) });
    assert!(driver.read_sectors(0, 1).is_ok() && driver.poll_used().is_none());
    driver.put_header(READ, 0);
    driver.submit(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    driver.transport.reset();
    limiter.set(RateLimits::default());
    driver.start(RING_FEATURES | ALL_FEATURES);
    assert!(driver.read_sectors(0, 1).is_ok());
}

#[test]
fn a_disk_within_its_limit_goes_on_by_itself() {
    let block = MemoryDisk::new().block();
    let (limiter, stats) = (block.limiter(), block.stats());
    limiter.set(RateLimits { rate: Some(Size(1 << 20)), iops: Some(200) });
    let mut driver = Driver::started(block, ALL_FEATURES);
    for sector in 0..50 {
        assert!(driver.read_sectors(sector, 1).is_ok());
    }
    assert_ne!(stats.throttled.load(Relaxed), 0);
}

#[test]
fn every_queue_is_served() {
    let disk = MemoryDisk::new();
    let block = Block::new("vm", "disk", 3, disk.disk()).unwrap();
    let several = 1 << VIRTIO_BLK_F_MQ;
    assert_ne!(block.features() & several, 0);
    let stats = block.stats();
    let mut driver = Driver::new(block);
    // Each queue gets its own rings and one request.
    let rings = |queue: u64| (0x40000 + queue * 0x4000, 0x41000 + queue * 0x4000, 0x42000 + queue * 0x4000);
    for (features, served) in [(several, 3), (0, 1)] {
        assert_eq!(driver.negotiate(RING_FEATURES | FLUSH_FEATURE | features), FEATURES_OK);
        driver.memory.write_slice(&[0; 0xc000], GuestAddress(0x40000)).unwrap();
        let before = stats.reads.load(Relaxed);
        for queue in 0..3 {
            let (descriptors, available, used) = rings(queue);
            driver.set_up_queue_number(queue as u32, descriptors, available, used);
        }
        driver.set(virtio_bindings::bindings::virtio_mmio::VIRTIO_MMIO_STATUS, DRIVER_OK);
        driver.put_header(READ, 5);
        for queue in 0..3 {
            let (descriptors, available, _) = rings(queue);
            let chain = [(HEADER, 16, false), (DATA + queue * 0x1000, 512, true), (STATUS + queue, 1, true)];
            driver.put_chain(descriptors, &chain);
            driver.memory.write_obj(1u16, GuestAddress(available + 2)).unwrap();
            driver.notify_queue(queue as u32);
        }
        while stats.reads.load(Relaxed) < before + served {
            std::thread::yield_now();
        }
        driver.transport.reset();
        for queue in 0..3 {
            let used: u16 = driver.memory.read_obj(GuestAddress(rings(queue).2 + 2)).unwrap();
            assert_eq!(used, u16::from(queue < served));
        }
    }
}
