//! Disks of every kind, with known content.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cache::FakeCache;
use super::*;

/// A kind of disk.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    Memory {
        zeroes: bool,
    },
    Raw {
        policy: CachePolicy,
        engine: Engine,
        align: Option<u32>,
    },
    /// A chain of images, the lowest first, by the sizes of their clusters.
    Qcow2 {
        clusters: &'static [u32],
        policy: CachePolicy,
    },
    /// A raw image behind a cache.
    Cached {
        align: Option<u32>,
    },
}

/// A disk and its content.
pub(super) struct Test {
    pub(super) disk: Disk,
    pub(super) initial: Vec<u8>,
    pub(super) memory: Option<MemoryDisk>,
    /// Guest memory that the disk's driver must use.
    pub(super) guest: crate::GuestMemory,
    pub(super) _directory: tempfile::TempDir,
}

impl Target {
    /// Makes the disk; `None` with a message if the host lacks a tool for it.
    pub(super) fn make(self) -> Option<Test> {
        let directory = tempfile::tempdir().unwrap();
        let mut initial = MemoryDisk::new().medium().data.clone();
        let mut memory = None;
        let guest = crate::virtio::testing::memory();
        let disk = match self {
            Self::Memory { zeroes } => {
                let disk = MemoryDisk::new();
                disk.medium().no_zeroes = !zeroes;
                memory = Some(disk.clone());
                disk.disk()
            }
            Self::Raw { policy, engine, align } => {
                raw(&directory.path().join("raw"), &initial, policy, engine, align)
            }
            Self::Qcow2 { clusters, policy } => {
                let path = chain(directory.path(), clusters, &mut initial)?;
                let options = DiskOptions { format: Some(Format::Qcow2), policy, ..DiskOptions::new(path) };
                Disk::open(&options).unwrap()
            }
            Self::Cached { align } => {
                let path = directory.path().join("raw");
                let mut disk = raw(&path, &initial, CachePolicy::Exclusive, Engine::Auto, align);
                disk.set_cache(Arc::new(FakeCache::new(guest.clone())));
                disk
            }
        };
        Some(Test { disk, initial, memory, guest, _directory: directory })
    }
}

/// Makes a raw image that holds `data`. With `align`, direct I/O uses larger blocks than necessary.
pub(super) fn raw(path: &Path, data: &[u8], policy: CachePolicy, engine: Engine, align: Option<u32>) -> Disk {
    fs::write(path, data).unwrap();
    let options = DiskOptions { policy, engine, ..DiskOptions::new(path) };
    match align {
        None => Disk::open(&options).unwrap(),
        Some(align) => Disk::new(Arc::new(RawFile::open_in_blocks(path, align).unwrap()), engine),
    }
}

/// Runs qemu-img; `None` if it is missing.
pub(super) fn qemu_img(arguments: &[&str], path: &Path) -> Option<()> {
    let output = match Command::new("qemu-img").args(arguments).arg(path).output() {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: qemu-img cannot be run: {error}");
            return None;
        }
    };
    assert!(output.status.success(), "qemu-img {arguments:?} {path:?}: {output:?}");
    Some(())
}

/// Makes a chain of qcow2 images over a raw image that holds `data`, the lowest first. If there are several,
/// each except the last holds some sectors of its own, which are also written to `data`.
pub(super) fn chain(directory: &Path, clusters: &[u32], data: &mut Vec<u8>) -> Option<PathBuf> {
    let mut below = (directory.join("base"), "raw");
    fs::write(&below.0, &*data).unwrap();
    for (number, cluster) in clusters.iter().enumerate() {
        let path = directory.join(format!("layer{number}"));
        let backing =
            format!("backing_file={},backing_fmt={},cluster_size={cluster}", below.0.display(), below.1);
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &backing], &path)?;
        below = (path, "qcow2");
        if number + 1 < clusters.len() {
            let options = DiskOptions { format: Some(Format::Qcow2), ..DiskOptions::new(&below.0) };
            let disk = Disk::open(&options).unwrap();
            for start in (number * 7 * SECTOR..data.len() - 8 * SECTOR).step_by(67 * SECTOR) {
                let piece = &mut data[start..start + 5 * SECTOR];
                piece.fill(0xa0 + number as u8);
                disk.image().write_at(start as u64, piece).unwrap();
            }
            disk.image().flush().unwrap();
        }
    }
    Some(below.0)
}
