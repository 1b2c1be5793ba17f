//! Images that are created when a disk is opened.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::targets::chain;
use super::*;
use crate::disk::NewImage;

const SIZE: u64 = 1 << 20;

/// Returns the options of an overlay that is created if it is missing.
fn overlay(path: &Path, backing: Option<&Path>, new: NewImage) -> DiskOptions {
    let (format, backing) = (Some(Format::Qcow2), backing.map(Path::to_owned));
    DiskOptions { format, backing, create: Some(new), ..DiskOptions::new(path) }
}

fn created(path: &Path, backing: &Path) -> Disk {
    Disk::open(&overlay(path, Some(backing), NewImage::default())).unwrap()
}

fn refused(options: &DiskOptions) -> String {
    Disk::open(options).expect_err("it is refused").to_string()
}

/// A folder with a raw image.
fn raw() -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.img");
    let data: Vec<u8> = (0..SIZE as usize).map(|i| (i / 512 % 250 + i % 5 + 1) as u8).collect();
    fs::write(&base, &data).unwrap();
    (folder, base, data)
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut data = vec![0; disk.image().size() as usize];
    let mut at = 0;
    while at < data.len() {
        let place = disk.image().locate(at as u64, (data.len() - at) as u64).unwrap();
        let part = &mut data[at..][..place.len as usize];
        disk.image().read_at(place.layer, at as u64, part).unwrap();
        at += place.len as usize;
    }
    data
}

/// Has qemu-img check an image, and returns what it tells about it; `None` if the host has no qemu-img.
fn info(path: &Path) -> Option<String> {
    let check = Command::new("qemu-img").args(["check", "-q"]).arg(path).output().ok()?;
    assert!(check.status.success(), "{check:?}");
    let info = Command::new("qemu-img").args(["info", "--output=json"]).arg(path).output().ok()?;
    assert!(info.status.success(), "{info:?}");
    Some(String::from_utf8(info.stdout).unwrap())
}

#[test]
fn an_overlay_shows_its_backing_image_until_it_is_written() {
    let (folder, base, mut data) = raw();
    let path = folder.path().join("vm-0.qcow2");
    let disk = created(&path, &base);
    assert_eq!((disk.image().size(), content(&disk)), (SIZE, data.clone()));
    disk.image().write_at(65536, &[7; 4096]).unwrap();
    data[65536..65536 + 4096].fill(7);
    disk.image().flush().unwrap();
    drop(disk);
    if let Some(info) = info(&path) {
        for part in [
            "\"backing-filename\": \"base.img\"",
            "\"backing-filename-format\": \"raw\"",
            "\"compat\": \"1.1\"",
        ] {
            assert!(info.contains(part), "{part} is missing in {info}");
        }
    }
    // It exists by now, and stays as it is. Nobody else may read it.
    assert_eq!(content(&created(&path, &base)), data);
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    assert!(fs::read(&base).unwrap() != data);
    let names = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(names, 2, "something else was left in the folder");
}

#[test]
fn a_new_image_may_be_larger_than_its_backing_image_or_have_none() {
    let (folder, base, data) = raw();
    let [large, empty] = ["large", "empty"].map(|name| folder.path().join(name));
    let sized = |size| NewImage { size: Some(size), backing_format: None };
    let disk = Disk::open(&overlay(&large, Some(&base), sized(3 * SIZE))).unwrap();
    let mut whole = data;
    whole.resize(3 * SIZE as usize, 0);
    assert_eq!(content(&disk), whole);
    disk.image().write_at(2 * SIZE, &[9; 512]).unwrap();
    whole[2 * SIZE as usize..][..512].fill(9);
    assert_eq!(content(&disk), whole);
    drop(disk);
    let disk = Disk::open(&overlay(&empty, None, sized(SIZE))).unwrap();
    assert_eq!(content(&disk), vec![0; SIZE as usize]);
    drop(disk);
    let told = [&large, &empty].map(|path| info(path));
    if let [Some(large), Some(empty)] = told {
        assert!(large.contains("\"virtual-size\": 3145728") && !empty.contains("backing"), "{large} {empty}");
    }
    // Images of clouds have such sizes.
    let huge = folder.path().join("huge");
    drop(Disk::open(&overlay(&huge, Some(&base), sized(1 << 44))).unwrap());
    info(&huge);
    assert!(huge.metadata().unwrap().blocks() * 512 < 1 << 20, "a new image takes next to no space");
    let small = refused(&overlay(&folder.path().join("small"), Some(&base), sized(512)));
    assert!(small.contains("less than its backing image") && small.contains("1048576"), "{small}");
    for size in [0, 1000, 1 << 60] {
        let wrong = refused(&overlay(&folder.path().join("wrong"), None, sized(size)));
        assert!(wrong.contains("multiple of 512"), "{wrong}");
    }
    assert!(!folder.path().join("small").exists() && !folder.path().join("wrong").exists());
}

#[test]
fn an_image_with_another_backing_image_is_refused_and_stays() {
    let (folder, base, data) = raw();
    let [path, other, link] = ["a.qcow2", "other.img", "link"].map(|name| folder.path().join(name));
    fs::write(&other, &data).unwrap();
    symlink(&base, &link).unwrap();
    drop(created(&path, &link));
    let before = fs::read(&path).unwrap();
    // The link is another name of the same file, until it is changed.
    drop(created(&path, &base));
    let why = refused(&overlay(&path, Some(&other), NewImage::default()));
    for part in ["base.img", "other.img", "not by"] {
        assert!(why.contains(part), "{part} is missing in {why}");
    }
    fs::remove_file(&link).unwrap();
    symlink(&other, &link).unwrap();
    assert!(refused(&overlay(&path, Some(&link), NewImage::default())).contains("not by"));
    assert_eq!(fs::read(&path).unwrap(), before);
    let empty = folder.path().join("empty");
    drop(Disk::open(&overlay(&empty, None, NewImage { size: Some(SIZE), backing_format: None })).unwrap());
    assert!(refused(&overlay(&empty, Some(&base), NewImage::default())).contains("no other image"));
    // Without a format the user has not said that the file is an overlay.
    fs::write(&path, &data).unwrap();
    assert!(refused(&overlay(&path, Some(&base), NewImage::default())).contains("does not begin like"));
}

#[test]
fn the_format_of_a_backing_image_is_detected_where_that_is_safe() {
    let folder = tempfile::tempdir().unwrap();
    let mut data = MemoryDisk::new().medium().data.clone();
    let Some(top) = chain(folder.path(), &[65536, 65536], &mut data) else { return };
    let [path, alone, over] = ["new", "alone", "over"].map(|name| folder.path().join(name));
    // What a guest can write to a raw disk names no other file.
    let why = refused(&overlay(&path, Some(&top), NewImage::default()));
    assert!(why.contains("backing-format=qcow2") && !path.exists(), "{why}");
    let given = NewImage { size: None, backing_format: Some(Format::Qcow2) };
    assert_eq!(content(&Disk::open(&overlay(&path, Some(&top), given)).unwrap()), data);
    info(&path);
    // A qcow2 image that refers to no file is read as what it looks like.
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&alone).arg("1M").status();
    assert!(made.unwrap().success());
    let disk = created(&over, &alone);
    assert_eq!(content(&disk), vec![0; SIZE as usize]);
    drop(disk);
    assert!(info(&over).unwrap().contains("\"backing-filename-format\": \"qcow2\""));
}

#[test]
fn a_backing_image_that_is_written_is_refused() {
    let (folder, base, _) = raw();
    let path = folder.path().join("new");
    let writer = Disk::open(&DiskOptions { format: Some(Format::Raw), ..DiskOptions::new(&base) }).unwrap();
    let why = refused(&overlay(&path, Some(&base), NewImage::default()));
    assert!(why.contains("in use") && why.contains("base.img") && !path.exists(), "{why}");
    drop(writer);
    let disk = created(&path, &base);
    // Other VMs read the same image, and none writes it.
    let second = created(&folder.path().join("second"), &base);
    let writer = DiskOptions { format: Some(Format::Raw), ..DiskOptions::new(&base) };
    assert!(refused(&writer).contains("in use"));
    drop((disk, second));
}

#[test]
fn a_new_image_that_nobody_needs_is_removed() {
    let (folder, base, _) = raw();
    let path = folder.path().join("vm.qcow2");
    let disk = created(&path, &base);
    let new = disk.new_file().cloned().expect("it is this disk's");
    drop(disk);
    // It stays until somebody says so, and an image that was there is nobody's to remove.
    assert!(created(&path, &base).new_file().is_none());
    new.remove();
    assert!(!path.exists());
    new.remove();
    // Another file in its place stays. The first one exists for so long, or the other could get its inode.
    let disk = created(&path, &base);
    fs::rename(&path, folder.path().join("moved")).unwrap();
    fs::write(&path, "mine").unwrap();
    disk.new_file().unwrap().remove();
    assert_eq!(fs::read(&path).unwrap(), b"mine");
}
