//! Disks on files.

use std::fs::{self, File};
use std::path::Path;

use tempfile::NamedTempFile;

use super::*;

fn image(sectors: usize) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), vec![0x11; sectors * SECTOR]).unwrap();
    file
}

fn open(path: &Path, read_only: bool) -> Result<Block, BlockError> {
    Block::open(&config("root", DiskOptions { read_only, ..DiskOptions::new(path) }), None)
}

fn config(id: &str, disk: DiskOptions) -> BlockConfig {
    BlockConfig { vm: "vm".to_owned(), id: id.to_owned(), queues: 1, disk }
}

fn error(path: &Path, read_only: bool) -> String {
    let error = open(path, read_only).err().expect("the disk is refused").to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
    error
}

#[test]
fn writes_reach_the_file_and_reads_come_from_it() {
    let file = image(64);
    let mut driver = Driver::started(open(file.path(), false).unwrap(), FLUSH_FEATURE);
    assert_eq!(driver.write_sectors(3, &[0x22; 2 * SECTOR]), OK);
    assert_eq!(driver.request(FLUSH, 0, &[]), (OK, 1));
    let data = fs::read(file.path()).unwrap();
    assert_eq!(data.len(), 64 * SECTOR);
    assert_eq!(data[3 * SECTOR..5 * SECTOR], [0x22; 2 * SECTOR]);
    assert_eq!(driver.read_sectors(2, 4).unwrap(), data[2 * SECTOR..6 * SECTOR]);
}

#[test]
fn a_file_that_shrinks_fails_the_reads_that_it_cannot_serve() {
    let file = image(64);
    let mut driver = Driver::started(open(file.path(), false).unwrap(), FLUSH_FEATURE);
    File::options().write(true).open(file.path()).unwrap().set_len(10 * SECTOR_SIZE + 100).unwrap();
    assert!(driver.read_sectors(0, 10).is_ok());
    assert_eq!(driver.read_sectors(10, 1), Err(IO_ERROR), "half a sector is none");
    assert_eq!(driver.read_sectors(20, 1), Err(IO_ERROR));
    assert_eq!(driver.request(FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn a_file_that_shrinks_under_direct_io_does_so_too() {
    for (engine, align) in [(Engine::Auto, None), (Engine::Threads, None), (Engine::Auto, Some(4096))] {
        let file = image(64);
        let disk = super::targets::raw(file.path(), &[0x11; 64 * SECTOR], CachePolicy::None, engine, align);
        let mut driver = Driver::started(Block::new("vm", "disk", 1, disk).unwrap(), ALL_FEATURES);
        File::options().write(true).open(file.path()).unwrap().set_len(16 * SECTOR_SIZE + 100).unwrap();
        assert!(driver.read_sectors(0, 16).is_ok());
        assert_eq!(driver.read_sectors(16, 1), Err(IO_ERROR));
        assert_eq!(driver.read_sectors(40, 8), Err(IO_ERROR));
        // There is also no data with which part of a block could be written back.
        assert_eq!(driver.write_sectors(41, &[1; SECTOR]), if align.is_some() { IO_ERROR } else { OK });
        assert_eq!(driver.write_sectors(48, &[1; 16 * SECTOR]), OK, "whole blocks make the file longer");
        assert_eq!(driver.read_sectors(48, 16).unwrap(), [1; 16 * SECTOR]);
        assert_eq!(driver.request(FLUSH, 0, &[]), (OK, 1));
    }
}

#[test]
fn discarded_sectors_take_no_space_and_zeroes_are_zeroes() {
    let file = image(2048);
    let mut driver = Driver::started(open(file.path(), false).unwrap(), ALL_FEATURES);
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(file.path()).unwrap());
    File::open(file.path()).unwrap().sync_all().unwrap();
    let before = blocks();
    assert_eq!(driver.clear_sectors(DISCARD, &[(0, 512, 0), (1024, 512, 0)]), OK);
    assert!(blocks() < before, "{} of {before} blocks are left", blocks());
    assert_eq!(driver.clear_sectors(WRITE_ZEROES, &[(600, 3, 0), (700, 5, 1)]), OK);
    let data = fs::read(file.path()).unwrap();
    assert_eq!(data.len(), 2048 * SECTOR);
    for sector in 0..2048 {
        let zeroed = sector < 512
            || (1024..1536).contains(&sector)
            || [600..603, 700..705].iter().any(|r| r.contains(&sector));
        assert_eq!(data[sector * SECTOR], if zeroed { 0 } else { 0x11 }, "sector {sector}");
    }
}

#[test]
fn a_file_that_ends_within_a_block_goes_through_the_page_cache() {
    let file = image(9);
    let options = DiskOptions { policy: CachePolicy::None, ..DiskOptions::new(file.path()) };
    let mut driver = Driver::started(Block::open(&config("root", options), None).unwrap(), FLUSH_FEATURE);
    assert_eq!(driver.write_sectors(8, &[3; SECTOR]), OK);
    assert_eq!(driver.read_sectors(8, 1).unwrap(), [3; SECTOR]);
    assert_eq!(fs::metadata(file.path()).unwrap().len(), 9 * SECTOR_SIZE);
}

#[test]
fn a_file_system_without_direct_io_is_used_all_the_same() {
    // Files in memory support direct I/O or not, depending on the kernel's age.
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else { return };
    let path = directory.path().join("raw");
    let disk = super::targets::raw(&path, &[0x11; 64 * SECTOR], CachePolicy::None, Engine::Auto, None);
    let mut driver = Driver::started(Block::new("vm", "disk", 1, disk).unwrap(), ALL_FEATURES);
    assert_eq!(driver.write_sectors(3, &[0x22; 9 * SECTOR]), OK);
    assert_eq!(driver.read_sectors(3, 9).unwrap(), [0x22; 9 * SECTOR]);
    assert_eq!(driver.clear_sectors(WRITE_ZEROES, &[(4, 2, 0)]), OK);
    assert_eq!(driver.request(FLUSH, 0, &[]), (OK, 1));
    let data = fs::read(&path).unwrap();
    assert_eq!((data[3 * SECTOR], data[4 * SECTOR], data[6 * SECTOR]), (0x22, 0, 0x22));
}

#[test]
fn threads_do_the_work_where_io_uring_is_denied() {
    use seccompiler::{SeccompAction, SeccompFilter, TargetArch};

    // A filter applies to the thread that sets it and to the threads that this thread starts.
    let denied = std::thread::spawn(|| {
        let refuse = SeccompAction::Errno(libc::EPERM as u32);
        let rules = [(libc::SYS_io_uring_setup, Vec::new())].into_iter().collect();
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64).unwrap();
        let program: seccompiler::BpfProgram = filter.try_into().unwrap();
        seccompiler::apply_filter(&program).unwrap();

        let file = image(64);
        let block = open(file.path(), false).unwrap();
        let notices = block.notices().to_vec();
        assert!(notices.iter().any(|notice| notice.contains("io_uring cannot be used")), "{notices:?}");
        let mut driver = Driver::started(block, ALL_FEATURES);
        assert_eq!(driver.write_sectors(3, &[0x22; 9 * SECTOR]), OK);
        assert_eq!(driver.read_sectors(2, 11).unwrap()[SECTOR..10 * SECTOR], [0x22; 9 * SECTOR]);
        assert_eq!(driver.request(FLUSH, 0, &[]), (OK, 1));
        assert_eq!(fs::read(file.path()).unwrap()[3 * SECTOR], 0x22);
    });
    denied.join().expect("a disk without io_uring works");
}

#[test]
fn a_full_disk_is_an_error_of_the_guest_and_loses_nothing() {
    let disk = MemoryDisk::new();
    let block = disk.block();
    let stats = block.stats();
    let mut driver = Driver::started(block, ALL_FEATURES);
    disk.medium().full_from = Some(100);
    assert_eq!(driver.write_sectors(98, &[9; 8 * SECTOR]), IO_ERROR);
    assert!(stats.last_error().unwrap().contains("No space left"), "{:?}", stats.last_error());
    assert_eq!(driver.write_sectors(90, &[9; 2 * SECTOR]), OK);
    assert_eq!(driver.clear_sectors(WRITE_ZEROES, &[(99, 2, 0)]), IO_ERROR);
    assert_eq!(driver.read_sectors(90, 2).unwrap(), [9; 2 * SECTOR]);
}

#[test]
fn a_write_that_the_host_refuses_fails_as_a_whole() {
    let file = image(1);
    let raw = RawFile::open(file.path(), false).unwrap();
    // No file system has files of this size.
    assert!(raw.write_at(i64::MAX as u64 - 100, &[0; SECTOR]).is_err());
    assert!(raw.write_at(0, &[0; SECTOR]).is_ok());
}

#[test]
fn one_writer_or_many_readers() {
    let file = image(8);
    let writer = open(file.path(), false).unwrap();
    for read_only in [false, true] {
        let error = error(file.path(), read_only);
        assert!(error.contains("in use"), "{error}");
    }
    drop(writer);

    let readers = [open(file.path(), true).unwrap(), open(file.path(), true).unwrap()];
    assert!(error(file.path(), false).contains("in use"));
    drop(readers);
    open(file.path(), false).unwrap();
}

#[test]
fn what_is_not_a_disk_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    for read_only in [false, true] {
        assert!(error(directory.path(), read_only).contains("is a directory; give a regular file"));
        assert!(error(&directory.path().join("missing"), read_only).contains("No such file"));
        assert!(error(Path::new("/dev/null"), read_only).contains("not a file that holds data"));
    }
    for size in [0, 1, 511, 513] {
        let path = directory.path().join(size.to_string());
        fs::write(&path, vec![0; size]).unwrap();
        assert!(error(&path, false).contains(&format!("its size of {size} bytes")));
    }
}

#[test]
fn a_name_fits_the_serial_number() {
    let file = image(8);
    for id in ["", "a name that is too long", "zero\0byte"] {
        let refused = Block::open(&config(id, DiskOptions::new(file.path())), None);
        assert!(matches!(refused, Err(BlockError::Id { .. })));
    }
    assert!(Block::new("v\0m", "twenty bytes exactly", 1, MemoryDisk::new().disk()).is_ok());
    for queues in [0, MAX_QUEUES + 1] {
        let refused = Block::new("vm", "disk", queues, MemoryDisk::new().disk());
        assert!(matches!(refused, Err(BlockError::Queues { .. })));
    }
}
