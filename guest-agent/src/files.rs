//! Files and block devices: writes known content, and reads with a checksum.
//!
//! Data passes through a buffer of [`BUFFER`] bytes; sizes are in bytes.

use crate::checksum::Fnv1a;
use crate::content::{self, PAGE_SIZE};
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

/// Number of bytes for each system call: large, because calls are slow if the guest's kernel is slow.
pub const BUFFER: usize = 256 * 1024;

/// The result of reading or writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summed {
    /// Bytes read or written.
    pub bytes: u64,
    /// The checksum of those bytes, in order.
    pub checksum: Fnv1a,
}

/// The source of read data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The page cache, if it has the data.
    Cached,
    /// The device. The page cache is asked to drop the clean data of the file first.
    Device,
}

/// Reads `path` from the start to the end, but at most `limit` bytes.
///
/// # Errors
/// Fails if the file cannot be opened or read.
pub fn sum(path: &Path, limit: u64, source: Source) -> io::Result<Summed> {
    let file = File::open(path)?;
    if source == Source::Device {
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    let mut reader = file.take(limit);
    let mut buf = vec![0; BUFFER];
    let mut summed = Summed { bytes: 0, checksum: Fnv1a::new() };
    loop {
        match reader.read(&mut buf) {
            Ok(0) => return Ok(summed),
            Ok(n) => {
                summed.checksum.update(&buf[..n]);
                summed.bytes += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Writes the first `bytes` bytes of the stream of `seed` to the start of `path`. A file is created or
/// truncated first; a block device is overwritten.
///
/// # Errors
/// Fails if the file cannot be opened or written. On success, the data may not be on the device yet.
pub fn write(path: &Path, bytes: u64, seed: u64) -> io::Result<Summed> {
    let mut file = File::create(path)?;
    let mut buf = vec![0; BUFFER];
    let mut summed = Summed { bytes: 0, checksum: Fnv1a::new() };
    while summed.bytes < bytes {
        let len = (bytes - summed.bytes).min(BUFFER as u64) as usize;
        content::fill(seed, summed.bytes / PAGE_SIZE as u64, &mut buf[..len]);
        file.write_all(&buf[..len])?;
        summed.checksum.update(&buf[..len]);
        summed.bytes += len as u64;
    }
    Ok(summed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_can_be_computed() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("out");
        for bytes in [0, 1, 4095, BUFFER as u64, 3 * BUFFER as u64 + 5] {
            let written = write(&path, bytes, 9)?;
            assert_eq!(written.bytes, bytes);
            assert_eq!(written.checksum, Fnv1a::of(&content::bytes(9, bytes as usize)));
            assert_eq!(sum(&path, u64::MAX, Source::Cached)?, written);
            assert_eq!(sum(&path, bytes, Source::Device)?, written);
        }
        Ok(())
    }

    #[test]
    fn reading_stops_at_the_limit() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("out");
        write(&path, 10_000, 9)?;
        let summed = sum(&path, 5000, Source::Cached)?;
        assert_eq!(summed, Summed { bytes: 5000, checksum: Fnv1a::of(&content::bytes(9, 5000)) });
        Ok(())
    }

    #[test]
    fn a_missing_file_is_an_error() {
        let error = sum(Path::new("/nonexistent"), 1, Source::Cached).expect_err("no such file");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
