//! Images with features of QEMU: each works, or is refused with a command that makes an image that works.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::targets::qemu_img;
use super::*;

const SIZE: usize = 1 << 20;

/// A folder with a raw image, `source`; `None` if qemu-img is missing.
struct Folder {
    directory: tempfile::TempDir,
    data: Vec<u8>,
}

impl Folder {
    fn new() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..SIZE).map(|i| (i / 512 % 250 + i % 5) as u8).collect();
        fs::write(directory.path().join("source"), &data).unwrap();
        let folder = Self { directory, data };
        folder.image("probe", "compat=1.1")?;
        Some(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Returns an image that holds the data, made with options of qemu-img.
    fn image(&self, name: &str, options: &str) -> Option<PathBuf> {
        self.convert(name, &["-o", options])
    }

    fn convert(&self, name: &str, options: &[&str]) -> Option<PathBuf> {
        let (source, path) = (self.path("source"), self.path(name));
        let source = source.to_str().unwrap();
        let arguments = [&["convert", "-q", "-f", "raw", "-O", "qcow2"], options, &[source]].concat();
        qemu_img(&arguments, &path).map(|()| path)
    }

    /// An overlay of an image.
    fn overlay(&self, name: &str, backing: &str, options: &str) -> PathBuf {
        let path = self.path(name);
        let backing = format!("backing_file={}{options}", self.path(backing).display());
        let output = Command::new("qemu-img")
            .args(["create", "-q", "-u", "-f", "qcow2", "-o", &backing])
            .arg(&path)
            .arg(SIZE.to_string())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        path
    }
}

fn open(path: &Path, read_only: bool) -> Result<Disk, OpenError> {
    Disk::open(&DiskOptions { format: Some(Format::Qcow2), read_only, ..DiskOptions::new(path) })
}

/// Checks that an image is refused for reading and writing and is not changed. The command in the error must
/// make an image that holds `data`.
fn refused(path: &Path, part: &str, data: &[u8]) -> String {
    let before = fs::read(path).unwrap();
    let [error, other] = [true, false].map(|read_only| open(path, read_only).unwrap_err().to_string());
    assert_eq!(error, other);
    assert!(error.contains(part) && error.contains(path.to_str().unwrap()), "{error}");
    assert!(fs::read(path).unwrap() == before, "an image that is refused was changed");
    let (_, command) = error.split_once(" it: ").expect("there is a command");
    let folder = path.parent().unwrap();
    fs::write(folder.join("PASSWORD_FILE"), "secret").unwrap();
    let run = Command::new("sh").args(["-c", command]).current_dir(folder).output().unwrap();
    assert!(run.status.success(), "{command}: {run:?}");
    let new = if command.contains("NEW.qcow2") { folder.join("NEW.qcow2") } else { path.to_owned() };
    holds(&open(&new, false).unwrap(), data);
    error
}

fn holds(disk: &Disk, data: &[u8]) {
    let mut found = vec![0; data.len()];
    let mut at = 0;
    while at < data.len() {
        let place = disk.image().locate(at as u64, (data.len() - at) as u64).unwrap();
        let end = at + place.len as usize;
        disk.image().read_at(place.layer, at as u64, &mut found[at..end]).unwrap();
        at = end;
    }
    assert!(found == data, "the disk holds something else");
}

/// Writes in several places, zeros a range, and checks the result with qemu-img.
fn writes_well(path: &Path, mut data: Vec<u8>) -> Vec<u8> {
    {
        let disk = open(path, false).unwrap();
        let features = FLUSH_FEATURE | ZEROES_FEATURE;
        let mut driver = Driver::started(Block::new("vm", "disk", 1, disk).unwrap(), features);
        for (sector, byte) in [(1_usize, 1_u8), (300, 2), (1777, 3)] {
            let range = sector * SECTOR..(sector + 130) * SECTOR;
            data[range.clone()].fill(byte);
            assert_eq!(driver.write_sectors(sector as u64, &data[range]), OK);
        }
        assert_eq!(driver.clear_sectors(WRITE_ZEROES, &[(500, 400, 1)]), OK);
        data[500 * SECTOR..900 * SECTOR].fill(0);
        assert_eq!(driver.request(FLUSH, 0, &[]), (OK, 1));
        drop(driver);
        holds(&open(path, false).unwrap(), &data);
    }
    qemu_img(&["check", "-q", "-f", "qcow2"], path).unwrap();
    let flat = path.with_extension("flat");
    qemu_img(&["convert", "-q", "-f", "qcow2", "-O", "raw", path.to_str().unwrap()], &flat).unwrap();
    assert!(fs::read(flat).unwrap() == data, "{path:?}: qemu-img finds something else");
    data
}

/// Sets a bit of the incompatible features.
fn set_feature(path: &Path, bit: u32) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut features = [0; 8];
    file.read_exact_at(&mut features, 72).unwrap();
    let features = u64::from_be_bytes(features) | 1 << bit;
    file.write_all_at(&features.to_be_bytes(), 72).unwrap();
}

/// Replaces the recorded format of the backing file with an unknown one.
fn forget_backing_format(path: &Path) {
    let mut image = fs::read(path).unwrap();
    let kind = 0xe279_2aca_u32.to_be_bytes();
    let at = image.windows(4).position(|bytes| bytes == kind).expect("there is a record");
    image[at..at + 4].copy_from_slice(b"none");
    fs::write(path, image).unwrap();
}

#[test]
fn encrypted_images_are_refused() {
    let Some(folder) = Folder::new() else { return };
    let secret = ["--object", "secret,id=key,data=secret"];
    let luks = ["-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"];
    let path = folder.convert("lu ks'", &[secret, luks].concat()).unwrap();
    refused(&path, "it is encrypted (LUKS)", &folder.data);
    // QEMU reads the old method only in its tools.
    let aes = ["-o", "encrypt.format=aes,encrypt.key-secret=key"];
    let path = folder.convert("aes", &[secret, aes].concat()).unwrap();
    refused(&path, "it is encrypted (AES)", &folder.data);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&9_u32.to_be_bytes(), 32).unwrap();
    assert!(open(&path, true).unwrap_err().to_string().contains("encrypted by an unknown method"));
}

#[test]
fn features_that_are_not_understood_are_refused() {
    let Some(folder) = Folder::new() else { return };
    let data_file = format!("data_file={}", folder.path("data").display());
    let path = folder.image("external", &data_file).unwrap();
    refused(&path, "keeps its data in another file", &folder.data);
    let path = folder.convert("zstd", &["-c", "-o", "compression_type=zstd"]).unwrap();
    refused(&path, "uses another compression than deflate", &folder.data);
    let path = folder.image("extended", "extended_l2=on,cluster_size=64k").unwrap();
    refused(&path, "extended L2 entries", &folder.data);

    // For an unknown feature there is no command that certainly helps.
    let path = folder.image("unknown", "compat=1.1").unwrap();
    set_feature(&path, 40);
    let error = open(&path, true).unwrap_err().to_string();
    assert!(error.contains("unknown feature (bit 40)") && error.contains("qemu-img convert -f"), "{error}");
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0; 8], 72).unwrap();
    open(&path, true).unwrap();
    file.write_all_at(&112_u32.to_be_bytes(), 100).unwrap();
    file.write_all_at(&[0, 0, 0, 1], 108).unwrap();
    assert!(open(&path, true).unwrap_err().to_string().contains("unknown fields"));
}

#[test]
fn images_that_are_dirty_or_corrupt_are_refused_until_they_are_repaired() {
    let Some(folder) = Folder::new() else { return };
    let path = folder.image("dirty", "lazy_refcounts=on").unwrap();
    writes_well(&path, folder.data.clone());
    let path = folder.image("dirty", "lazy_refcounts=on").unwrap();
    set_feature(&path, 0);
    refused(&path, "was not closed", &folder.data);
    set_feature(&path, 1);
    refused(&path, "is marked as corrupt", &folder.data);
}

#[test]
fn backing_files_are_checked_as_well() {
    let Some(folder) = Folder::new() else { return };
    folder.convert("zstd", &["-c", "-o", "compression_type=zstd"]).unwrap();
    folder.overlay("middle", "zstd", ",backing_fmt=qcow2");
    let top = folder.overlay("top", "middle", ",backing_fmt=qcow2");
    let error = open(&top, true).unwrap_err().to_string();
    for part in
        ["top is backed by", "middle is backed by", "zstd: it uses another compression", "qemu-img convert"]
    {
        assert!(error.contains(part), "{error}");
    }
    // The error names other formats, and files without a format.
    qemu_img(
        &["convert", "-q", "-f", "raw", "-O", "vmdk", folder.path("source").to_str().unwrap()],
        &folder.path("vmdk"),
    )
    .unwrap();
    let path = folder.overlay("over vmdk", "vmdk", ",backing_fmt=vmdk");
    refused(&path, "an image of the unknown format \"vmdk\"", &folder.data);
    let path = folder.path("over json");
    let name =
        format!("json:{{\"driver\":\"raw\",,\"file.filename\":\"{}\"}}", folder.path("source").display());
    let options = format!("backing_file={name},backing_fmt=raw");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options], &path).unwrap();
    refused(&path, "is not a plain file", &folder.data);
}

#[test]
fn a_backing_format_that_is_not_recorded_is_guessed_where_that_is_safe() {
    let Some(folder) = Folder::new() else { return };
    // Version 2 also records the format, in QEMU's place for it.
    for (name, options, recorded) in
        [("recorded", "compat=0.10", true), ("missing", "compat=1.1", false), ("lost", "compat=0.10", false)]
    {
        let path = folder.overlay(name, "source", &format!(",backing_fmt=raw,{options}"));
        if !recorded {
            forget_backing_format(&path);
        }
        holds(&open(&path, true).unwrap(), &folder.data);
        writes_well(&path, folder.data.clone());
    }
    // A guest may have written a file that looks like an image and refers to another file.
    folder.overlay("middle", "source", ",backing_fmt=raw");
    let path = folder.overlay("top", "middle", ",backing_fmt=qcow2");
    forget_backing_format(&path);
    let error = open(&path, true).unwrap_err().to_string();
    let (_, command) = error.split_once("record it: ").expect("there is a command");
    let run = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(run.status.success(), "{command}: {run:?}");
    holds(&open(&path, true).unwrap(), &folder.data);
    // If a version 2 overlay says that a base with an image's header is raw, the disk shows the base's bytes.
    let middle = fs::read(folder.path("middle")).unwrap();
    let path = folder.overlay("bytes", "middle", ",compat=0.10,backing_fmt=raw");
    holds(&open(&path, true).unwrap(), &middle[..4096]);
}

#[test]
fn version_2_compressed_and_small_clusters_work() {
    let Some(folder) = Folder::new() else { return };
    for (name, options) in [
        ("old", &["-o", "compat=0.10"][..]),
        ("compressed", &["-c"]),
        ("old compressed", &["-c", "-o", "compat=0.10"]),
        ("small", &["-o", "cluster_size=512"]),
        ("large", &["-o", "cluster_size=2M"]),
        ("narrow", &["-o", "refcount_bits=1"]),
        ("wide", &["-o", "refcount_bits=64"]),
        ("whole", &["-o", "preallocation=full"]),
    ] {
        let path = folder.convert(name, options).unwrap();
        holds(&open(&path, true).unwrap(), &folder.data);
        let data = writes_well(&path, folder.data.clone());
        writes_well(&path, data);
    }
}

#[test]
fn internal_snapshots_keep_what_they_hold() {
    let Some(folder) = Folder::new() else { return };
    let path = folder.image("snapshots", "compat=1.1").unwrap();
    qemu_img(&["snapshot", "-c", "first"], &path).unwrap();
    let second = writes_well(&path, folder.data.clone());
    qemu_img(&["snapshot", "-c", "second"], &path).unwrap();
    let mut driver =
        Driver::started(Block::new("vm", "disk", 1, open(&path, false).unwrap()).unwrap(), ALL_FEATURES);
    assert_eq!(driver.clear_sectors(DISCARD, &[(0, 2048, 0)]), OK);
    assert_eq!(driver.write_sectors(77, &[9; 8 * SECTOR]), OK);
    drop(driver);
    qemu_img(&["check", "-q", "-f", "qcow2"], &path).unwrap();
    for (name, data) in [("second", second), ("first", folder.data.clone())] {
        qemu_img(&["snapshot", "-a", name], &path).unwrap();
        holds(&open(&path, true).unwrap(), &data);
    }
}

#[test]
fn bitmaps_are_given_up_with_a_word() {
    let Some(folder) = Folder::new() else { return };
    let path = folder.image("bitmaps", "compat=1.1").unwrap();
    let output = Command::new("qemu-img").args(["bitmap", "--add"]).arg(&path).arg("daily").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(open(&path, true).unwrap().notices().is_empty());
    let disk = open(&path, false).unwrap();
    assert!(disk.notices()[0].contains("make the next backup a full one"), "{:?}", disk.notices());
    disk.image().write_at(0, &[7; 4096]).unwrap();
    drop(disk);
    // Leaked clusters do no harm.
    let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let found = String::from_utf8_lossy(&output.stdout);
    assert!(
        found.contains("leaked clusters") && !found.contains("errors were found on the image"),
        "{found}"
    );
}
