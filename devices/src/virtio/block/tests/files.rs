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
