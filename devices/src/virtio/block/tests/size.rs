//! Images that grow and shrink while a guest uses them.

use std::fs::{self, File};
use std::path::Path;

use super::cache::FakeCache;
use super::targets::{chain, raw};
use super::*;
use crate::virtio::RING_FEATURES;

const BLOCK: usize = 4096;

fn set_len(path: &Path, len: u64) {
    File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

/// A disk of 16 blocks. Each is filled with its number plus one.
fn disk(path: &Path, policy: CachePolicy) -> Disk {
    let data: Vec<u8> = (0..16 * BLOCK).map(|i| (i / BLOCK + 1) as u8).collect();
    raw(path, &data, policy, Engine::Auto, None)
}

impl Driver {
    /// Sectors and generation, as the driver reads them.
    fn size(&mut self) -> (u64, u32) {
        let [low, high] = [0x100, 0x104].map(|register| u64::from(self.get(register)));
        (low | high << 32, self.get(0xfc))
    }

    /// Reads one block; the first request of this driver. Returns the status after the interrupt, which a
    /// device raises after the request is in the used ring.
    fn read_and_wait_for_interrupt(&mut self, sector: u64) -> u8 {
        self.put_header(READ, sector);
        self.submit(&[(HEADER, 16, false), (DATA, BLOCK as u32, true), (STATUS, 1, true)]);
        self.wait_interrupt();
        self.poll_used().unwrap();
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }
}

#[test]
fn a_driver_is_told_of_an_image_that_grew() {
    for policy in [CachePolicy::None, CachePolicy::Buffered] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("raw");
        let block = Block::new("vm", "disk", 1, disk(&path, policy)).unwrap();
        let size = block.size();
        let mut driver = Driver::started(block, ALL_FEATURES);
        assert_eq!(driver.size(), (128, 0));
        set_len(&path, 32 * BLOCK as u64);
        assert_eq!(driver.read_and_wait_for_interrupt(128), IO_ERROR, "nobody has said so");
        assert_eq!(size.refresh().unwrap(), 32 * BLOCK as u64);
        assert_eq!(size.bytes(), 32 * BLOCK as u64);
        assert_eq!(driver.interrupt().read().unwrap(), 1);
        // VIRTIO_MMIO_INT_CONFIG
        assert_eq!(driver.get(0x60) & 2, 2);
        driver.set(0x64, 2);
        assert_eq!(driver.size(), (256, 1));
        assert_eq!(driver.read_sectors(128, 8).unwrap(), [0; BLOCK]);
        assert_eq!(driver.write_sectors(248, &[9; BLOCK]), OK);
        assert_eq!(driver.read_sectors(256, 1), Err(IO_ERROR));
        // Nothing has changed, so there is no notification.
        size.refresh().unwrap();
        assert_eq!(driver.size(), (256, 1));
        assert_eq!(driver.get(0x60) & 2, 0);
    }
}

#[test]
fn requests_beyond_the_end_of_an_image_that_shrank_fail() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("raw");
    let block = Block::new("vm", "disk", 1, disk(&path, CachePolicy::None)).unwrap();
    let size = block.size();
    let mut driver = Driver::started(block, ALL_FEATURES);
    set_len(&path, 8 * BLOCK as u64);
    size.refresh().unwrap();
    assert_eq!(driver.size(), (64, 1));
    assert_eq!(driver.read_sectors(56, 8).unwrap(), [8; BLOCK]);
    assert_eq!(driver.read_sectors(57, 8), Err(IO_ERROR));
    assert_eq!(driver.write_sectors(64, &[9; BLOCK]), IO_ERROR);
    assert_eq!(driver.clear_sectors(WRITE_ZEROES, &[(64, 8, 0)]), IO_ERROR);
    assert_eq!(driver.clear_sectors(DISCARD, &[(64, 8, 0)]), IO_ERROR);
    assert_eq!(fs::metadata(&path).unwrap().len(), 8 * BLOCK as u64, "nothing has made it longer");
}

#[test]
fn what_was_cut_off_is_not_served_from_the_cache() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("raw");
    let guest = memory();
    let mut disk = disk(&path, CachePolicy::Exclusive);
    disk.set_cache(Arc::new(FakeCache::new(guest.clone())));
    let block = Block::new("vm", "disk", 1, disk).unwrap();
    let size = block.size();
    let mut driver = Driver::with_memory(block, guest);
    driver.start(RING_FEATURES | ALL_FEATURES);
    assert_eq!(driver.read_sectors(12 * 8, 8).unwrap(), [13; BLOCK]);
    // When the size is refreshed, the file is as large as before.
    set_len(&path, 8 * BLOCK as u64);
    set_len(&path, 16 * BLOCK as u64);
    size.refresh().unwrap();
    assert_eq!(driver.read_sectors(12 * 8, 8).unwrap(), [0; BLOCK]);
}

#[test]
fn sizes_that_cannot_be_are_refused_and_change_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("raw");
    let block = Block::new("vm", "disk", 1, disk(&path, CachePolicy::None)).unwrap();
    let size = block.size();
    let mut driver = Driver::new(block);
    for len in [0, 16 * BLOCK as u64 + 100] {
        set_len(&path, len);
        let error = size.refresh().unwrap_err().to_string();
        assert!(error.contains(&format!("its size of {len} bytes is not a positive multiple of")), "{error}");
    }
    // The path refers to another file.
    fs::rename(&path, directory.path().join("old")).unwrap();
    assert!(size.refresh().unwrap_err().to_string().contains("No such file"));
    fs::write(&path, [0; BLOCK]).unwrap();
    let error = size.refresh().unwrap_err().to_string();
    assert!(error.contains("another file now") && error.contains(path.to_str().unwrap()), "{error}");
    assert_eq!(driver.size(), (128, 0));
}

#[test]
fn a_qcow2_image_keeps_its_size() {
    let directory = tempfile::tempdir().unwrap();
    let mut data = MemoryDisk::new().medium().data.clone();
    let Some(path) = chain(directory.path(), &[65536], &mut data) else { return };
    let options = DiskOptions { format: Some(Format::Qcow2), ..DiskOptions::new(&path) };
    let block = Block::new("vm", "disk", 1, Disk::open(&options).unwrap()).unwrap();
    assert_eq!(block.size().refresh().unwrap(), data.len() as u64);
}
