//! Requests of a well-behaved driver, and errors of the host.

use super::*;

const RING_FEATURES_WITH_FLUSH: u64 = crate::virtio::RING_FEATURES | FLUSH_FEATURE;

#[test]
fn the_configuration_describes_the_disk() {
    let mut disk = MemoryDisk::new();
    disk.read_only = true;
    let block = disk.block();
    assert_ne!(block.features() & (1 << VIRTIO_BLK_F_RO), 0);

    let mut config = [0xaa; 40];
    block.read_config(0, &mut config);
    assert_eq!(config[0..8], (SECTORS as u64).to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes(), "segments");
    assert_eq!(config[20..24], 512u32.to_le_bytes(), "logical block");
    assert_eq!(config[24..28], [3, 0, 8, 0], "eight logical blocks in a physical one");
    assert_eq!(config[28..], [0; 12]);

    let block = MemoryDisk::new().block();
    assert_eq!(block.features() & ALL_FEATURES, ALL_FEATURES);
    let mut config = [0xaa; 64];
    block.read_config(0, &mut config);
    assert_eq!(config[34..36], [0; 2], "one queue needs no count");
    for limits in [36, 48] {
        assert_eq!(config[limits..limits + 4], (1u32 << 21).to_le_bytes(), "sectors of a range");
        assert_eq!(config[limits + 4..limits + 8], 16u32.to_le_bytes(), "ranges");
    }
    assert_eq!(config[44..48], 8u32.to_le_bytes(), "alignment of discards");
    assert_eq!(config[56..], [1, 0, 0, 0, 0, 0, 0, 0], "zeroing may unmap");
    let several = Block::new("vm", "disk", 4, MemoryDisk::new().disk()).unwrap();
    several.read_config(0, &mut config);
    assert_eq!((several.queue_sizes().len(), &config[34..36]), (4, &[4, 0][..]));
}

#[test]
fn data_is_read_and_written_in_several_segments() {
    let disk = MemoryDisk::new();
    let mut driver = Driver::started(disk.block(), FLUSH_FEATURE);

    // Across odd boundaries, and into both regions of memory.
    let pieces = [(DATA + 1, 3, true), (FAR_REGION + 7, 1000, true), (DATA + 0x800, 533, true)];
    assert_eq!(driver.request(READ, 5, &pieces), (OK, 1537));
    let mut data = vec![0; 1536];
    driver.memory.read_slice(&mut data[..3], GuestAddress(DATA + 1)).unwrap();
    driver.memory.read_slice(&mut data[3..1003], GuestAddress(FAR_REGION + 7)).unwrap();
    driver.memory.read_slice(&mut data[1003..], GuestAddress(DATA + 0x800)).unwrap();
    assert_eq!(data, disk.medium().data[5 * SECTOR..8 * SECTOR]);

    let pieces = pieces.map(|(address, len, _)| (address, len, false));
    assert_eq!(driver.request(WRITE, 100, &pieces), (OK, 1));
    assert_eq!(disk.medium().data[100 * SECTOR..103 * SECTOR], data);
}

/// Records its calls: image, address, bytes, offset.
#[derive(Default)]
struct Notes(Mutex<Vec<(ImageId, u64, usize, u64)>>);

impl ReadObserver for Notes {
    fn filled(&self, image: ImageId, address: GuestAddress, bytes: usize, offset: u64) {
        self.0.lock().unwrap().push((image, address.0, bytes, offset));
    }
}

#[test]
fn an_observer_is_told_what_reads_put_where() {
    let disk = MemoryDisk::new();
    let notes = Arc::new(Notes::default());
    let mut block = disk.block();
    block.set_read_observer(notes.clone());
    let mut driver = Driver::started(block, FLUSH_FEATURE);
    driver.request(READ, 8, &[(DATA, 4096, true), (FAR_REGION, 1024, true)]);
    assert_eq!(
        *notes.0.lock().unwrap(),
        [(MEMORY_IMAGE, DATA, 4096, 4096), (MEMORY_IMAGE, FAR_REGION, 1024, 8192)]
    );

    // There is no report of writes, of failed reads, or of addresses outside memory.
    notes.0.lock().unwrap().clear();
    driver.request(WRITE, 8, &[(DATA, 4096, false)]);
    disk.medium().bad_sectors.insert(16);
    assert_eq!(driver.request(READ, 16, &[(DATA, 4096, true)]).0, IO_ERROR);
    assert_eq!(driver.request(READ, 8, &[(1 << 40, 4096, true)]).0, IO_ERROR);
    assert!(notes.0.lock().unwrap().is_empty());
}

#[test]
fn a_request_larger_than_a_step_is_whole() {
    let disk = MemoryDisk::new();
    let mut driver = Driver::started(disk.block(), FLUSH_FEATURE);
    let sectors = 300 << 10 >> 9;
    let data = driver.read_sectors(1, sectors).unwrap();
    assert_eq!(data, disk.medium().data[SECTOR..(1 + sectors) * SECTOR]);
    assert_eq!(driver.write_sectors(0, &data), OK);
    assert_eq!(data, disk.medium().data[..sectors * SECTOR]);
}

#[test]
fn the_layout_of_descriptors_does_not_matter() {
    let disk = MemoryDisk::new();
    let mut driver = Driver::started(disk.block(), FLUSH_FEATURE);

    // The header in two parts; data and status in one descriptor; empty descriptors between.
    driver.put_header(READ, 9);
    driver.submit(&[(HEADER, 5, false), (0, 0, false), (HEADER + 5, 11, false), (DATA, 513, true)]);
    assert_eq!(driver.wait_used().1, 513);
    let mut data = [0; 513];
    driver.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
    assert_eq!(data[..SECTOR], disk.medium().data[9 * SECTOR..10 * SECTOR]);
    assert_eq!(data[SECTOR], OK);

    // Header and data in one descriptor of an indirect table.
    driver.put_header(WRITE, 20);
    driver.memory.write_slice(&[7; SECTOR], GuestAddress(HEADER + 16)).unwrap();
    driver.submit_indirect(&[(HEADER, 16 + SECTOR as u32, false), (DATA, 1, true)]);
    assert_eq!(driver.wait_used().1, 1);
    assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(DATA)).unwrap(), OK);
    assert_eq!(disk.medium().data[20 * SECTOR..21 * SECTOR], [7; SECTOR]);
}

#[test]
fn requests_queued_together_all_complete() {
    let disk = MemoryDisk::new();
    // With EVENT_IDX and without (VERSION_1 alone).
    for features in [RING_FEATURES_WITH_FLUSH, 1 << 32] {
        let mut driver = Driver::new(disk.block());
        driver.start(features);
        for round in 0..500 {
            driver.put_header(READ, round);
            for _ in 0..5 {
                driver.submit(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
            }
            for _ in 0..5 {
                assert_eq!(driver.wait_used().1, 513);
            }
            let sector: u64 = driver.memory.read_obj(GuestAddress(DATA)).unwrap();
            assert_eq!(sector, round);
        }
    }
}

#[test]
fn the_guest_reads_the_serial_number() {
    let mut driver = Driver::started(MemoryDisk::new().block(), FLUSH_FEATURE);
    assert_eq!(driver.request(GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    let id: [u8; 20] = driver.memory.read_obj(GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(driver.request(GET_ID, 0, &[(DATA, 2, true)]), (OK, 3));
    assert_eq!(driver.request(GET_ID, 0, &[]), (OK, 1));
}

#[test]
fn unknown_requests_are_unsupported() {
    let block = MemoryDisk::new().block();
    let stats = block.stats();
    let mut driver = Driver::started(block, FLUSH_FEATURE);
    for kind in [2, 3, 11, 13, u32::MAX] {
        assert_eq!(driver.request(kind, 0, &[(DATA, 512, false)]), (UNSUPPORTED, 1));
    }
    assert_eq!(stats.errors.load(Relaxed), 5);
    assert!(stats.last_error().unwrap().contains("4294967295"));
}

#[test]
fn host_errors_fail_the_request_and_no_other() {
    let disk = MemoryDisk::new();
    disk.medium().bad_sectors.insert(8);
    let block = disk.block();
    let stats = block.stats();
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = told.clone();
    stats.observe_host_errors(Box::new(move |message| heard.lock().unwrap().push(message.to_owned())));
    let mut driver = Driver::started(block, FLUSH_FEATURE);

    assert_eq!(driver.read_sectors(SECTORS as u64, 1), Err(IO_ERROR), "that is the guest's fault");
    assert!(told.lock().unwrap().is_empty());
    assert_eq!(driver.read_sectors(7, 2), Err(IO_ERROR));
    assert_eq!(*told.lock().unwrap(), ["read 1024 bytes at sector 7: bad sector"]);
    assert!(stats.last_error().unwrap().contains("read 1024 bytes at sector 7: bad sector"));
    assert_eq!(driver.write_sectors(8, &[1; SECTOR]), IO_ERROR);
    assert!(driver.read_sectors(7, 1).is_ok());
    assert_eq!(driver.write_sectors(9, &[1; SECTOR]), OK);

    disk.medium().flush_fails = true;
    assert_eq!(driver.request(FLUSH, 0, &[]), (IO_ERROR, 1));
    disk.medium().flush_fails = false;
    assert_eq!(driver.request(FLUSH, 0, &[]), (OK, 1));

    let counts = [&stats.reads, &stats.writes, &stats.flushes, &stats.read_bytes, &stats.written_bytes];
    assert_eq!(counts.map(|count| count.load(Relaxed)), [1, 1, 1, 512, 512]);
    assert_eq!(stats.errors.load(Relaxed), 4);
    assert_eq!(told.lock().unwrap().len(), 1, "the log is not flooded");
}

#[test]
fn a_driver_without_flushes_gets_stable_writes() {
    let disk = MemoryDisk::new();
    let mut driver = Driver::started(disk.block(), 0);
    assert_eq!(driver.write_sectors(0, &[1; SECTOR]), OK);
    assert_eq!(disk.medium().flushes, 1);
    disk.medium().flush_fails = true;
    assert_eq!(driver.write_sectors(0, &[2; SECTOR]), IO_ERROR);

    disk.medium().flush_fails = false;
    driver.start(RING_FEATURES_WITH_FLUSH);
    assert_eq!(driver.write_sectors(0, &[3; SECTOR]), OK);
    assert_eq!(disk.medium().flushes, 1, "a driver that knows flushes asks for them");
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut disk = MemoryDisk::new();
    disk.read_only = true;
    let before = disk.medium().data.clone();
    let mut driver = Driver::started(disk.block(), FLUSH_FEATURE);
    assert_eq!(driver.write_sectors(0, &[1; SECTOR]), IO_ERROR);
    assert!(driver.read_sectors(0, 1).is_ok());
    assert_eq!(disk.medium().data, before);
}

#[test]
fn a_driver_may_poll_without_interrupts() {
    let mut driver = Driver::new(MemoryDisk::new().block());
    driver.start(1 << 32);
    driver.memory.write_obj(1u16, GuestAddress(AVAILABLE)).unwrap();
    driver.put_header(READ, 3);
    driver.submit(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    while driver.poll_used().is_none() {
        std::thread::yield_now();
    }
    // A joined worker has passed the point where it raises the interrupt.
    driver.transport.shutdown();
    assert!(driver.interrupt().read().is_err());
}

#[test]
fn a_backend_that_panics_breaks_its_device_alone() {
    let disk = MemoryDisk::new();
    let mut driver = Driver::started(disk.block(), FLUSH_FEATURE);
    disk.medium().panics = true;
    driver.put_header(READ, 0);
    driver.submit(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    driver.wait_needs_reset();
    assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), NO_STATUS);

    driver.start(RING_FEATURES_WITH_FLUSH);
    driver.wait_needs_reset();
}
