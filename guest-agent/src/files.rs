//! Files and block devices: writing known content, and reading with a checksum.
//!
//! Data passes through a buffer of [`BUFFER`] bytes; sizes are in bytes.

use crate::checksum::Fnv1a;
use crate::content::{self, PAGE_SIZE};
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

/// Bytes moved by one system call: few calls, as each is dear where the guest's kernel is slow.
pub const BUFFER: usize = 256 * 1024;

/// How much was read or written, and its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summed {
    /// Bytes read or written.
    pub bytes: u64,
    /// The checksum of those bytes, in order.
    pub checksum: Fnv1a,
}

/// Whether reading may be served from memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// From the page cache, where it has the data.
    Cached,
    /// The page cache is asked to forget the (clean) data of the file first.
    Device,
}

/// Reads `path` from its start to its end, but no more than `limit` bytes.
///
/// # Errors
/// That of opening or reading.
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

/// Writes the first `bytes` bytes of the stream of `seed` to `path`, from its start. A file is
/// created, or cut to nothing before; a block device is overwritten.
///
/// # Errors
/// That of opening or writing. The data may still be on its way to the device on return.
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
