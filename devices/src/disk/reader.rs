//! Reads blocks of an image for disks in other processes.
//!
//! The image is opened here, so its blocks have this process's identities, whatever the other process says.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;

use super::cache::{BLOCK_SIZE, Fetch, ImageId};
use super::channel::{Action, Channel, ChannelLost, Completion, Operation};
use super::image::{Image, Layer};
use super::memory::Memory;
use super::{CachePolicy, Disk, DiskOptions, Format, OpenError};

/// An image that is open for reading and locked, from which any number of [readers](BlockReader) read.
#[derive(Debug)]
pub struct ReadImage {
    disk: Disk,
}

impl ReadImage {
    /// Opens and locks an image and its backing images.
    ///
    /// # Errors
    /// Fails if a file cannot be opened, is being written, or is not an image of the format.
    pub fn open(path: &Path, format: Option<Format>) -> Result<Self, OpenError> {
        let options =
            DiskOptions { read_only: true, format, policy: CachePolicy::Exclusive, ..DiskOptions::new(path) };
        Ok(Self { disk: Disk::open(&options)? })
    }
}

/// Where blocks of an image are.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    image: ImageId,
    layer: Layer,
}

impl Source {
    /// Returns the identity of the image that holds the blocks.
    pub fn image(&self) -> ImageId {
        self.image
    }
}

/// Reads blocks of an image, many at a time. It belongs to one thread.
pub struct BlockReader {
    image: Arc<ReadImage>,
    channel: Box<dyn Channel>,
    completions: Vec<Completion>,
}

impl BlockReader {
    /// Returns a reader. Threads that it may need get the name `name`.
    ///
    /// # Errors
    /// Fails if the process is out of files or threads.
    pub fn new(image: Arc<ReadImage>, name: &str) -> io::Result<Self> {
        let channel = image.disk.channel(name)?;
        Ok(Self { image, channel, completions: Vec::new() })
    }

    /// Returns where blocks are that another process has found in a file: its device, its number, and the number of its
    /// format. `None` if not all of them are in one image of this chain, or if another file has them here.
    pub fn locate(&self, [device, inode, format]: [u64; 3], blocks: Range<u64>) -> Option<Source> {
        let image: &dyn Image = self.image.disk.image();
        let direct = image.raw().and_then(|raw| raw.direct());
        if direct.is_some_and(|direct| u64::from(direct.offset) > BLOCK_SIZE) || self.image.disk.is_lost() {
            return None;
        }
        let start = blocks.start.checked_mul(BLOCK_SIZE)?;
        let end = blocks.end.checked_mul(BLOCK_SIZE)?;
        if start >= end || end > image.size() {
            return None;
        }
        let location = image.locate(start, end - start).ok().filter(|found| found.len >= end - start)?;
        let id = location.image?;
        let [own_device, own_inode, _, own_format] = id.parts();
        let is_same = [own_device, own_inode, own_format] == [device, inode, format];
        is_same.then_some(Source { image: id, layer: location.layer })
    }

    /// Reads the blocks of a fetch, whose number is `id`.
    pub fn read(&mut self, id: usize, source: Source, fetch: Fetch) {
        let action = Action::Read(source.layer, Memory::Fetch(fetch));
        let offset = match &action {
            Action::Read(_, Memory::Fetch(fetch)) => fetch.first() * BLOCK_SIZE,
            _ => 0,
        };
        self.channel.submit(Operation { id, offset, action });
    }

    /// Begins what is to be read, and returns what was read: the number of each fetch, and whether it was read in full.
    /// Its memory belongs to the cache again.
    ///
    /// # Errors
    /// Fails if nothing can be read any more.
    pub fn work(&mut self) -> io::Result<Vec<(usize, bool)>> {
        let lost = |ChannelLost(reason)| io::Error::other(reason);
        self.channel.kick().map_err(lost)?;
        self.channel.reap(&mut self.completions).map_err(lost)?;
        let mut done = Vec::with_capacity(self.completions.len());
        for Completion { operation, result, is_lost } in self.completions.drain(..) {
            if is_lost {
                self.image.disk.set_lost();
            }
            done.push((operation.id, result.is_ok() && !is_lost));
        }
        Ok(done)
    }

    /// Returns the number of fetches that are being read.
    pub fn in_flight(&self) -> usize {
        self.channel.in_flight()
    }

    /// Waits until one was read, if there is any.
    ///
    /// # Errors
    /// Fails if nothing can be read any more.
    pub fn wait(&mut self) -> io::Result<()> {
        self.channel.wait().map_err(|ChannelLost(reason)| io::Error::other(reason))
    }

    /// Returns a file that becomes readable at each new end of a fetch, whether or not earlier ones were taken.
    pub fn event(&self) -> RawFd {
        self.channel.event()
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "hands out memory by address")]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::ptr::NonNull;

    use super::*;

    #[test]
    fn blocks_are_read_from_the_file_that_is_meant() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("raw");
        let data: Vec<u8> = (0..16 * BLOCK_SIZE).map(|at| (at / BLOCK_SIZE) as u8 + 1).collect();
        std::fs::write(&path, &data).unwrap();
        let image = Arc::new(ReadImage::open(&path, Some(Format::Raw)).unwrap());
        let mut reader = BlockReader::new(image, "test").unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        let file = [metadata.dev(), metadata.ino(), 0];
        let source = reader.locate(file, 3..5).unwrap();
        assert_eq!(source.image().parts()[..2], file[..2]);
        for (file, blocks) in [
            ([file[0], file[1] + 1, 0], 3..5),
            ([file[0], file[1], 1], 3..5),
            (file, 15..17),
            (file, 5..5),
            (file, u64::MAX - 1..u64::MAX),
        ] {
            assert!(reader.locate(file, blocks.clone()).is_none(), "{blocks:?}");
        }
        let memory = Box::leak(Box::new([const { Aligned([0; 4096]) }; 2]));
        let address = NonNull::from(&mut *memory).cast::<u8>();
        // SAFETY: aligned, and the memory is never freed.
        let fetch = unsafe { Fetch::new(3, 2, address, 0, Arc::new(())) };
        reader.read(7, source, fetch);
        let mut done = reader.work().unwrap();
        while done.is_empty() {
            reader.wait().unwrap();
            done = reader.work().unwrap();
        }
        assert_eq!((done, reader.in_flight()), (vec![(7, true)], 0));
        // SAFETY: the fetch has ended.
        let read = unsafe { std::slice::from_raw_parts(address.as_ptr(), 2 * 4096) };
        assert!(*read == data[3 * 4096..5 * 4096]);
    }

    #[repr(align(4096))]
    #[derive(Clone, Copy)]
    struct Aligned(#[expect(dead_code, reason = "read by address")] [u8; 4096]);
}
