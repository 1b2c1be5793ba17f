//! qcow2 images: chains, identities and refusals.

use std::fs::{self, File};
use std::path::Path;

use super::targets::{chain, qemu_img};
use super::*;

fn open(path: &Path, format: Option<Format>, read_only: bool) -> Result<Disk, OpenError> {
    Disk::open(&DiskOptions { format, read_only, ..DiskOptions::new(path) })
}

fn refused(path: &Path, format: Option<Format>, read_only: bool) -> String {
    open(path, format, read_only).expect_err("the image is refused").to_string()
}

#[test]
fn blocks_have_the_identity_of_the_image_that_they_lie_in() {
    let directory = tempfile::tempdir().unwrap();
    let mut data = MemoryDisk::new().medium().data.clone();
    let Some(top) = chain(directory.path(), &[4096, 65536], &mut data) else { return };
    let second = directory.path().join("other");
    let middle = directory.path().join("layer0");
    let backing = format!("backing_file={},backing_fmt=qcow2", middle.display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &backing], &second).unwrap();

    // Two overlays of one image give common blocks the same identity.
    let [first, second] = [&top, &second].map(|path| open(path, Some(Format::Qcow2), false).unwrap());
    let (first, second) = (first.image(), second.image());
    assert_ne!(first.identity(), second.identity());
    let place = |image: &dyn Image, sector: u64| image.locate(sector * SECTOR_SIZE, 4096).unwrap();
    let before = place(first, 0);
    assert_eq!((before.layer, before.image), (Layer(1), place(second, 0).image), "written in the middle");
    let base = place(first, 616);
    assert_eq!((base.layer, base.image), (Layer(2), place(second, 616).image));
    assert!(base.image.is_some() && base.image != before.image);
    assert_eq!(base.image, place(first, 700).image);

    // A write moves blocks to the overlay, and only to that overlay.
    first.write_at(616 * SECTOR_SIZE, &[7; 4096]).unwrap();
    assert_eq!(place(first, 616).image, first.identity());
    assert_eq!(place(second, 616), base);
    // Blocks of the base are read from the base, whatever the overlay holds by now.
    let mut found = vec![0; 4096];
    first.read_at(base.layer, 616 * SECTOR_SIZE, &mut found).unwrap();
    assert_eq!(found, data[616 * SECTOR..624 * SECTOR]);
    // Zeros have no identity.
    first.write_zeroes(0, 65536, true).unwrap();
    assert_eq!(place(first, 0).image, None);
    first.read_at(Layer(0), 0, &mut found).unwrap();
    assert_eq!(found, [0; 4096]);
}

#[test]
fn one_file_in_two_formats_has_two_identities() {
    let directory = tempfile::tempdir().unwrap();
    let mut data = MemoryDisk::new().medium().data.clone();
    let Some(path) = chain(directory.path(), &[65536], &mut data) else { return };
    let overlay = directory.path().join("overlay");
    let backing = format!("backing_file={},backing_fmt=raw", path.display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &backing], &overlay).unwrap();
    let disk = open(&path, Some(Format::Qcow2), false).unwrap();
    disk.image().write_at(0, &[7; 65536]).unwrap();
    disk.image().flush().unwrap();
    drop(disk);

    let image = |path: &Path, format| {
        let options = DiskOptions { policy: CachePolicy::Buffered, ..DiskOptions::new(path) };
        Disk::open(&DiskOptions { format: Some(format), read_only: true, ..options }).unwrap()
    };
    let [qcow2, raw] = [Format::Qcow2, Format::Raw].map(|format| image(&path, format));
    let over_raw = image(&overlay, Format::Qcow2);
    let show = |disk: &Disk| {
        let place = disk.image().locate(0, 4096).unwrap();
        let mut shown = vec![0; 4096];
        disk.image().read_at(place.layer, 0, &mut shown).unwrap();
        (place.image.unwrap(), shown)
    };
    let [qcow2, raw, over_raw] = [&qcow2, &raw, &over_raw].map(show);
    assert_eq!(qcow2.1, [7; 4096]);
    assert!(raw.1.starts_with(b"QFI\xfb"));
    assert_ne!(qcow2.0, raw.0, "other contents are known by other names");
    assert_eq!(raw, over_raw, "equal contents by equal ones, whatever lies above");
}

#[test]
fn what_changed_while_it_was_closed_has_another_identity() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("raw");
    fs::write(&path, [1; 8192]).unwrap();
    let identity = || open(&path, Some(Format::Raw), true).unwrap().image().identity().unwrap();
    let first = open(&path, Some(Format::Raw), true).unwrap();
    let shared = identity();
    assert_eq!(first.image().identity(), Some(shared));
    drop(first);
    // As fast as possible: the file system's clock may not have advanced.
    let mut known = vec![shared];
    for change in 0..50_u8 {
        match change % 3 {
            0 => fs::write(&path, [change; 8192]).unwrap(),
            1 => File::options().write(true).open(&path).unwrap().set_len(4096).unwrap(),
            // Another file with the same name and often the same number.
            _ => {
                fs::remove_file(&path).unwrap();
                fs::write(&path, [change; 8192]).unwrap();
            }
        }
        let new = identity();
        assert!(!known.contains(&new), "change {change}");
        known.push(new);
    }
}

#[test]
fn a_chain_is_locked_as_a_whole() {
    let directory = tempfile::tempdir().unwrap();
    let mut data = MemoryDisk::new().medium().data.clone();
    let Some(top) = chain(directory.path(), &[65536, 65536], &mut data) else { return };
    let (base, middle) = (directory.path().join("base"), directory.path().join("layer0"));
    let disk = open(&top, Some(Format::Qcow2), false).unwrap();
    assert!(refused(&base, Some(Format::Raw), false).contains("in use"));
    assert!(refused(&middle, Some(Format::Qcow2), false).contains("in use"));
    assert!(refused(&top, Some(Format::Qcow2), true).contains("in use"));
    open(&middle, Some(Format::Qcow2), true).unwrap();
    drop(disk);
    let writer = open(&base, Some(Format::Raw), false).unwrap();
    let error = refused(&top, Some(Format::Qcow2), true);
    for part in ["layer1 is backed by another image", "layer0 is backed by", "base for reading", "in use"] {
        assert!(error.contains(part), "{error}");
    }
    drop(writer);
    open(&base, Some(Format::Raw), false).unwrap();
}

#[test]
fn a_format_is_not_guessed_where_a_guest_could_have_chosen_it() {
    let directory = tempfile::tempdir().unwrap();
    let mut data = MemoryDisk::new().medium().data.clone();
    let Some(overlay) = chain(directory.path(), &[65536], &mut data) else { return };
    assert!(refused(&overlay, None, false).contains("add format=qcow2 or format=raw"));
    let error = refused(&overlay, None, true);
    assert!(error.contains("refers to another file") && error.contains("add format="), "{error}");
    // Opened as raw, the disk shows the file's bytes. A disk that is not a qcow2 image needs no format.
    let whole = fs::metadata(&overlay).unwrap().len().next_multiple_of(SECTOR_SIZE);
    File::options().write(true).open(&overlay).unwrap().set_len(whole).unwrap();
    let raw = open(&overlay, Some(Format::Raw), false).unwrap();
    assert_eq!(raw.image().size(), whole);
    open(&directory.path().join("base"), None, false).unwrap();

    // An image without references may be detected, but not written.
    let alone = directory.path().join("alone");
    let source = directory.path().join("base");
    qemu_img(&["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", source.to_str().unwrap()], &alone).unwrap();
    assert!(refused(&alone, None, false).contains("format="));
    let disk = open(&alone, None, true).unwrap();
    // The data is compressed, so there is no raw place to read it from.
    let mut found = vec![0; 100 * SECTOR];
    disk.image().read_at(Layer(0), 51 * SECTOR_SIZE, &mut found).unwrap();
    assert_eq!(found, MemoryDisk::new().medium().data[51 * SECTOR..151 * SECTOR]);
}

#[test]
fn damaged_images_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let mut junk = b"QFI\xfb".to_vec();
    junk.resize(4096, 0xff);
    fs::write(&path, &junk).unwrap();
    assert!(refused(&path, Some(Format::Qcow2), false).contains("open qcow2 image"));
    junk.truncate(30);
    fs::write(&path, &junk).unwrap();
    assert!(refused(&path, Some(Format::Qcow2), true).contains("open qcow2 image"));
    fs::write(&path, [0; 4096]).unwrap();
    assert!(refused(&path, Some(Format::Qcow2), true).contains("open qcow2 image"));

    // An image that backs itself.
    let itself = format!("backing_file={},backing_fmt=qcow2,size=1M", path.display());
    let other = directory.path().join("other");
    if qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-o", &itself], &other).is_some() {
        fs::copy(&other, &path).unwrap();
        let error = refused(&path, Some(Format::Qcow2), true);
        assert!(error.contains("chain of backing files has more than"), "{error}");
        assert!(refused(&path, Some(Format::Qcow2), false).contains("in use"));
    }
}

#[test]
fn an_image_that_is_cut_fails_reads_instead_of_losing_data() {
    let directory = tempfile::tempdir().unwrap();
    let mut data = MemoryDisk::new().medium().data.clone();
    let Some(top) = chain(directory.path(), &[65536], &mut data) else { return };
    let disk = open(&top, Some(Format::Qcow2), false).unwrap();
    let mut driver = Driver::started(Block::new("vm", "disk", 1, disk).unwrap(), ALL_FEATURES);
    assert_eq!(driver.write_sectors(0, &data[..64 * SECTOR]), OK);
    assert_eq!(driver.read_sectors(500, 8).unwrap(), data[500 * SECTOR..508 * SECTOR]);
    let base = File::options().write(true).open(directory.path().join("base")).unwrap();
    base.set_len(300 * SECTOR_SIZE).unwrap();
    assert_eq!(driver.read_sectors(500, 8), Err(IO_ERROR));
    base.set_len(data.len() as u64).unwrap();
    assert!(driver.read_sectors(100, 8).is_ok());
    File::options().write(true).open(&top).unwrap().set_len(70000).unwrap();
    assert_eq!(driver.read_sectors(100, 8), Err(IO_ERROR));
}

#[test]
fn what_was_written_is_what_other_programs_read() {
    let directory = tempfile::tempdir().unwrap();
    let mut data = MemoryDisk::new().medium().data.clone();
    let Some(top) = chain(directory.path(), &[65536, 4096], &mut data) else { return };
    {
        let disk = open(&top, Some(Format::Qcow2), false).unwrap();
        let mut driver = Driver::started(Block::new("vm", "disk", 1, disk).unwrap(), ALL_FEATURES);
        for (sector, byte) in [(1, 1u8), (300, 2), (777, 3)] {
            let range = sector * SECTOR..(sector + 20) * SECTOR;
            data[range.clone()].fill(byte);
            assert_eq!(driver.write_sectors(sector as u64, &data[range]), OK);
        }
        assert_eq!(driver.clear_sectors(WRITE_ZEROES, &[(500, 100, 1)]), OK);
        data[500 * SECTOR..600 * SECTOR].fill(0);
        assert_eq!(driver.request(FLUSH, 0, &[]), (OK, 1));
    }
    qemu_img(&["check", "-q", "-f", "qcow2"], &top).unwrap();
    let flat = directory.path().join("flat");
    qemu_img(&["convert", "-q", "-f", "qcow2", "-O", "raw", top.to_str().unwrap()], &flat).unwrap();
    assert!(fs::read(flat).unwrap() == data);
}
