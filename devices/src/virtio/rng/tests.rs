use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use samepage_spec::Size;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::*;

fn started(limits: RateLimits) -> (Driver, Arc<RngStats>) {
    let rng = Rng::new("vm", limits);
    let stats = rng.stats();
    (Driver::started(rng, 0), stats)
}

fn bytes(driver: &Driver, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    driver.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn buffers_are_filled_each_time_with_other_bytes() {
    let (mut driver, stats) = started(RateLimits::default());
    driver.submit(&[(BUFFERS, 100, true), (BUFFERS + 0x1000, 5000, true)]);
    assert_eq!(driver.wait_used().1, 5100);
    let first = bytes(&driver, BUFFERS, 100);
    assert!(first.iter().any(|&byte| byte != 0));
    // Nothing beyond the buffer.
    assert_eq!(bytes(&driver, BUFFERS + 100, 64), [0; 64]);
    driver.submit(&[(BUFFERS, 100, true)]);
    assert_eq!(driver.wait_used().1, 100);
    assert_ne!(bytes(&driver, BUFFERS, 100), first);
    assert_eq!((stats.requests.load(Relaxed), stats.bytes.load(Relaxed)), (2, 5200));
}

#[test]
fn a_request_gets_no_more_than_its_limit() {
    let (mut driver, _) = started(RateLimits::default());
    let buffer = (BUFFERS, 0x30000, true);
    driver.submit_indirect(&[buffer; 20]);
    assert_eq!(driver.wait_used().1, MAX_REQUEST_BYTES as u32);
    assert_eq!(bytes(&driver, BUFFERS + MAX_REQUEST_BYTES as u64, 64), [0; 64]);
}

#[test]
fn requests_without_room_get_nothing() {
    let (mut driver, stats) = started(RateLimits::default());
    driver.submit(&[(BUFFERS, 100, false)]);
    assert_eq!(driver.wait_used().1, 0);
    driver.submit(&[(BUFFERS, 0, true)]);
    assert_eq!(driver.wait_used().1, 0);
    assert_eq!(stats.errors.load(Relaxed), 0);
}

#[test]
fn buffers_outside_memory_and_endless_chains_break_the_device_until_its_reset() {
    for buffers in [&[(MEMORY_SIZE - 8, 16, true)][..], &[(u64::MAX - 4, 8, true)], &[(BUFFERS, 1, true); 33]]
    {
        let (mut driver, stats) = started(RateLimits::default());
        driver.submit_indirect(buffers);
        driver.wait_needs_reset();
        assert_eq!(stats.errors.load(Relaxed), 1);
        driver.start(crate::virtio::RING_FEATURES);
        driver.submit(&[(BUFFERS, 8, true)]);
        assert_eq!(driver.wait_used().1, 8);
    }
}

#[test]
fn limits_delay_requests_and_a_reset_waits_for_none() {
    let limits = RateLimits { rate: Some(Size(20_000)), iops: None };
    let (mut driver, stats) = started(limits);
    let start = Instant::now();
    // The burst of a tenth of a second, and a debt of another tenth.
    driver.submit(&[(BUFFERS, 4000, true)]);
    driver.wait_used();
    driver.submit(&[(BUFFERS, 1, true)]);
    driver.wait_used();
    assert!(start.elapsed() >= Duration::from_millis(90));
    assert_eq!(stats.throttled.load(Relaxed), 1);
    // A debt of days.
    let slow = RateLimits { rate: Some(Size(1)), iops: None };
    let (mut driver, stats) = started(slow);
    driver.submit(&[(BUFFERS, 60_000, true)]);
    driver.wait_used();
    driver.submit(&[(BUFFERS, 1, true)]);
    while stats.throttled.load(Relaxed) == 0 {
        std::thread::yield_now();
    }
    driver.start(crate::virtio::RING_FEATURES);
    driver.submit(&[]);
}
