//! The kernel's flags of page frames.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use samepage_hole::flags;

use super::Error;

/// Number of page frames for each system call: few calls, and little memory.
pub const BATCH: usize = 1024;

/// A source of page flags.
pub trait Flags {
    /// Reads the words for the page frames from `first` on, as far as the kernel knows them. The other words
    /// become 0. `words` has at most [`BATCH`] elements.
    ///
    /// # Errors
    /// Fails if the flags cannot be read.
    /// That of reading them.
    fn read(&mut self, first: u32, words: &mut [u32]) -> Result<(), Error>;
}

/// `/proc/kpageflags`.
#[derive(Debug)]
pub struct KernelFlags {
    file: File,
    buffer: Vec<u8>,
}

impl KernelFlags {
    /// Opens `/proc/kpageflags`.
    ///
    /// # Errors
    /// Fails if the kernel has no such file, or does not allow reading it.
    pub fn open() -> Result<Self, Error> {
        let file = File::open("/proc/kpageflags").map_err(|source| Error::Flags { source })?;
        Ok(Self { file, buffer: vec![0; BATCH * 8] })
    }
}

impl Flags for KernelFlags {
    fn read(&mut self, first: u32, words: &mut [u32]) -> Result<(), Error> {
        let buffer = &mut self.buffer[..words.len() * 8];
        let mut filled = 0;
        while filled < buffer.len() {
            match self.file.read_at(&mut buffer[filled..], u64::from(first) * 8 + filled as u64) {
                Ok(0) => break,
                Ok(bytes) => filled += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Flags { source }),
            }
        }
        let known = buffer[..filled].chunks_exact(8).map(|bytes| {
            let bytes = bytes.try_into().expect("chunks of 8 bytes");
            flags::word(u64::from_ne_bytes(bytes))
        });
        for (word, flags) in words.iter_mut().zip(known.chain(std::iter::repeat(0))) {
            *word = flags;
        }
        Ok(())
    }
}
