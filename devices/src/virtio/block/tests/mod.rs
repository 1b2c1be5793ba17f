use std::collections::HashSet;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use vm_memory::Bytes;

use super::*;
use crate::virtio::testing::*;

mod files;
mod hostile;
mod model;
mod requests;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// What a status byte holds before the device writes it.
const NO_STATUS: u8 = 0xee;

const FLUSH_FEATURE: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const SECTOR: usize = SECTOR_SIZE as usize;
const SECTORS: usize = 1024;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

/// A disk in memory that fails as it is told to, seen from outside.
#[derive(Default)]
struct Medium {
    data: Vec<u8>,
    /// Sectors that can be neither read nor written.
    bad_sectors: HashSet<u64>,
    flush_fails: bool,
    flushes: usize,
    panics: bool,
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
        Block::with_backend("vm", "disk", Box::new(self.clone())).unwrap()
    }

    /// Where an access lies in the medium's data, unless the medium fails.
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

impl Backend for MemoryDisk {
    fn size(&self) -> u64 {
        self.medium().data.len() as u64
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn physical_block_size(&self) -> u32 {
        4096
    }

    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let range = self.range(offset, data.len())?;
        data.copy_from_slice(&self.medium().data[range]);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = self.range(offset, data.len())?;
        self.medium().data[range].copy_from_slice(data);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut medium = self.medium();
        if medium.flush_fails {
            return Err(io::Error::other("no flush"));
        }
        medium.flushes += 1;
        Ok(())
    }
}

impl Driver {
    fn put_header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(HEADER + 4)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(NO_STATUS, GuestAddress(STATUS)).unwrap();
    }

    /// A request with `data` between header and status. Returns the status and the bytes written.
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
