use std::collections::HashSet;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::Bytes;

use super::*;
use crate::disk::cache::ImageId;
use crate::disk::image::{Layer, Location};
use crate::disk::raw::RawFile;
use crate::disk::{CachePolicy, Disk, Engine, Format};
use crate::virtio::testing::*;

mod cache;
mod create;
mod files;
mod formats;
mod hostile;
mod limits;
mod line;
mod locks;
mod lost;
mod model;
mod power;
mod qcow2;
mod requests;
mod size;
mod targets;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// What a status byte holds before the device writes it.
const NO_STATUS: u8 = 0xee;

const FLUSH_FEATURE: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const DISCARD_FEATURE: u64 = 1 << VIRTIO_BLK_F_DISCARD;
const ZEROES_FEATURE: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;
/// The features that a modern driver accepts for a writable disk.
const ALL_FEATURES: u64 = FLUSH_FEATURE | DISCARD_FEATURE | ZEROES_FEATURE;
const SECTOR: usize = SECTOR_SIZE as usize;
const SECTORS: usize = 1024;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

const MEMORY_IMAGE: ImageId = ImageId::new(1, 2, 3, Format::Raw);

/// A disk in memory that fails on request, as the test sees it.
#[derive(Default)]
struct Medium {
    data: Vec<u8>,
    /// Sectors that can be neither read nor written.
    bad_sectors: HashSet<u64>,
    flush_fails: bool,
    flushes: usize,
    panics: bool,
    /// From this sector on there is no space.
    full_from: Option<u64>,
    /// Whether zeros must be written.
    no_zeroes: bool,
}

#[derive(Clone)]
struct MemoryDisk {
    medium: Arc<Mutex<Medium>>,
    read_only: bool,
}

impl MemoryDisk {
    /// A disk whose sectors all differ.
    fn new() -> Self {
        let mut data: Vec<u8> = (0..SECTORS * SECTOR).map(|i| (i % 251) as u8).collect();
        for (i, sector) in data.chunks_mut(SECTOR).enumerate() {
            sector[..8].copy_from_slice(&(i as u64).to_le_bytes());
        }
        let medium = Medium { data, ..Medium::default() };
        Self { medium: Arc::new(Mutex::new(medium)), read_only: false }
    }

    fn medium(&self) -> std::sync::MutexGuard<'_, Medium> {
        self.medium.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn block(&self) -> Block {
        Block::new("vm", "disk", 1, self.disk()).unwrap()
    }

    fn disk(&self) -> Disk {
        Disk::new(Arc::new(self.clone()), Engine::Auto)
    }

    fn check_space(&self, range: &std::ops::Range<usize>) -> io::Result<()> {
        let full = self.medium().full_from.is_some_and(|sector| range.end > sector as usize * SECTOR);
        if full { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
    }

    /// Returns the range of an access in the medium's data, or the medium's failure.
    fn range(&self, offset: u64, len: usize) -> io::Result<std::ops::Range<usize>> {
        let medium = self.medium();
        assert!(!medium.panics, "a test made the medium panic");
        let mut sectors = offset / SECTOR_SIZE..(offset + len as u64).div_ceil(SECTOR_SIZE);
        if sectors.any(|sector| medium.bad_sectors.contains(&sector)) {
            return Err(io::Error::other("bad sector"));
        }
        Ok(offset as usize..offset as usize + len)
    }
}

impl Image for MemoryDisk {
    fn size(&self) -> u64 {
        self.medium().data.len() as u64
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn physical_block_size(&self) -> u32 {
        4096
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn identity(&self) -> Option<ImageId> {
        Some(MEMORY_IMAGE)
    }

    fn locate(&self, _offset: u64, len: u64) -> io::Result<Location> {
        Ok(Location { layer: Layer(0), image: self.identity(), len })
    }

    fn read_at(&self, _layer: Layer, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let range = self.range(offset, data.len())?;
        data.copy_from_slice(&self.medium().data[range]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = self.range(offset, data.len())?;
        self.check_space(&range)?;
        self.medium().data[range].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut medium = self.medium();
        if medium.flush_fails {
            return Err(io::Error::other("no flush"));
        }
        medium.flushes += 1;
        Ok(())
    }

    /// Gives discarded sectors a content that no driver writes.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let range = self.range(offset, len as usize)?;
        self.medium().data[range].fill(0xdd);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        if self.medium().no_zeroes {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let range = self.range(offset, len as usize)?;
        self.check_space(&range)?;
        self.medium().data[range].fill(0);
        Ok(())
    }
}

impl Driver {
    fn put_header(&self, kind: u32, sector: u64) {
        self.put_header_at(HEADER, kind, sector);
        self.memory.write_obj(NO_STATUS, GuestAddress(STATUS)).unwrap();
    }

    fn put_header_at(&self, address: u64, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(address)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(address + 4)).unwrap();
        self.memory.write_obj(sector, GuestAddress(address + 8)).unwrap();
    }

    /// Makes a request with ranges of sectors: start, number, flags.
    fn clear_sectors(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        for (i, (sector, sectors, flags)) in (0..).zip(ranges) {
            self.memory.write_obj(*sector, GuestAddress(DATA + i * 16)).unwrap();
            self.memory.write_obj(*sectors, GuestAddress(DATA + i * 16 + 8)).unwrap();
            self.memory.write_obj(*flags, GuestAddress(DATA + i * 16 + 12)).unwrap();
        }
        self.request(kind, 0, &[(DATA, ranges.len() as u32 * 16, false)]).0
    }

    /// Makes a request with `data` between header and status. Returns the status and the bytes written.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.put_header(kind, sector);
        let buffers = [&[(HEADER, 16, false)], data, &[(STATUS, 1, true)]].concat();
        self.submit(&buffers);
        let (_, written) = self.wait_used();
        (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), written)
    }

    fn read_sectors(&mut self, sector: u64, sectors: usize) -> Result<Vec<u8>, u8> {
        let len = sectors * SECTOR;
        match self.request(READ, sector, &[(DATA, len as u32, true)]) {
            (OK, written) => {
                assert_eq!(written as usize, len + 1);
                let mut data = vec![0; len];
                self.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
                Ok(data)
            }
            (status, _) => Err(status),
        }
    }

    fn write_sectors(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.memory.write_slice(data, GuestAddress(DATA)).unwrap();
        self.request(WRITE, sector, &[(DATA, data.len() as u32, false)]).0
    }
}
