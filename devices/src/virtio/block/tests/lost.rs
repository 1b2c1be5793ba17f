//! A disk's thread accesses guest memory that the host cannot supply. The process survives, the device stops,
//! and no data from there reaches the image or counts as done.
#![expect(unsafe_code, reason = "takes guest memory away")]

use std::sync::mpsc;
use std::time::Duration;

use samepage_sharing::loss::{self, Cause, Watch};
use vm_memory::{GuestAddress, GuestMemoryBackend as _};

use super::*;
use crate::virtio::RING_FEATURES;

/// Watches the first region of guest memory, as a VM does with its RAM.
fn watch(driver: &mut Driver) -> Watch {
    let start = driver.memory.get_host_address(GuestAddress(0)).unwrap();
    // SAFETY: the test owns the region, accesses it only through vm-memory, and unmaps it after the watch
    // ends.
    let watch = unsafe { loss::watch(start.addr(), MEMORY_SIZE as usize) }.unwrap();
    driver.transport.set_memory_lost_flag(watch.flag());
    watch
}

/// Unmaps a page of guest memory.
fn unmap(memory: &crate::GuestMemory, address: u64) {
    let page = memory.get_host_address(GuestAddress(address)).unwrap();
    // SAFETY: a watched page of the test's guest memory.
    assert_eq!(unsafe { libc::munmap(page.cast(), 4096) }, 0);
}

#[test]
fn a_device_that_touches_lost_memory_stops_and_writes_nothing() {
    for (what, place, kind) in [
        ("data to be written", DATA, WRITE),
        ("where data is read to", DATA, READ),
        ("the request's header and status", HEADER, WRITE),
        ("descriptors", DESCRIPTORS, WRITE),
    ] {
        let disk = MemoryDisk::new();
        let before = disk.medium().data.clone();
        let mut driver = Driver::new(disk.block());
        let watch = watch(&mut driver);
        let (sender, told) = mpsc::channel();
        watch.on_loss(move |loss| sender.send(loss).unwrap_or_default()).unwrap();
        driver.start(RING_FEATURES | ALL_FEATURES);
        driver.memory.write_slice(&[7; 4096], GuestAddress(DATA)).unwrap();
        driver.put_header(kind, 8);
        let data = (DATA, 4096, kind == READ);
        driver.put_chain(DESCRIPTORS, &[(HEADER, 16, false), data, (STATUS, 1, true)]);
        unmap(&driver.memory, place);
        driver.make_available(0);
        driver.notify();
        let loss = told.recv_timeout(Duration::from_secs(120)).unwrap();
        assert_eq!(loss.cause, Cause::Unmapped, "{what}");
        driver.wait_needs_reset();
        assert!(disk.medium().data == before, "{what}: something was written");
        assert_eq!(driver.poll_used(), None, "{what}: it was completed");
    }
}

/// The kernel detects the missing page in a write directly from guest memory.
#[test]
fn a_write_that_the_kernel_cannot_read_ends_the_vm_as_well() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    for engine in [Engine::Auto, Engine::Threads] {
        let image = crate::disk::DiskOptions {
            engine,
            policy: CachePolicy::Buffered,
            ..crate::disk::DiskOptions::new(file.path())
        };
        let block = Block::new("vm", "disk", 1, Disk::open(&image).unwrap()).unwrap();
        let mut driver = Driver::new(block);
        let watch = watch(&mut driver);
        driver.start(RING_FEATURES);
        driver.put_header(WRITE, 0);
        driver.put_chain(DESCRIPTORS, &[(HEADER, 16, false), (DATA, 4096, false), (STATUS, 1, true)]);
        unmap(&driver.memory, DATA);
        driver.make_available(0);
        driver.notify();
        driver.wait_needs_reset();
        assert!(watch.lost());
        assert_eq!(driver.poll_used(), None);
    }
}
