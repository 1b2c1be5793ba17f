//! The end of the disk.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;

use crate::blocks::admission::Sampler;
use crate::memory::content::Page;
use crate::remote::buffer::Buffer;
use crate::remote::socket::Socket;
use crate::service::line::messages::{MOST_BLOCKS, Outcome, SLOTS, Said, Wanted, Welcome, bits};

/// A read in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot(u32);

/// The line of one queue.
#[derive(Debug)]
pub struct Line {
    socket: Socket,
    buffer: Buffer,
    /// Slots without a read.
    free: Vec<u32>,
    /// How many blocks each read is about; 0 for a free slot.
    blocks: [usize; SLOTS],
}

impl Line {
    /// Waits for what the engine's end says first. Returns what chooses the samples as well.
    ///
    /// # Errors
    /// Fails if the other end is gone, or says what makes no sense.
    pub fn accept(socket: OwnedFd) -> io::Result<(Self, Sampler)> {
        let mut socket = Socket::new(socket);
        let (Welcome { sampler }, [memory]) = socket.receive_with()?;
        let buffer = Buffer::map_pages(&memory, (SLOTS * MOST_BLOCKS) as u32)?;
        let free = (0..SLOTS as u32).rev().collect();
        Ok((Self { socket, buffer, free, blocks: [0; SLOTS] }, sampler))
    }

    /// A file that becomes readable when an answer comes, or when the other end is gone.
    #[must_use]
    pub fn event(&self) -> RawFd {
        self.socket.as_fd().as_raw_fd()
    }

    /// Whether a slot is free.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Reads in progress.
    #[must_use]
    pub fn in_progress(&self) -> usize {
        SLOTS - self.free.len()
    }

    /// Asks for blocks, one at least.
    ///
    /// # Errors
    /// Fails if the other end is gone.
    ///
    /// # Panics
    /// Panics if no slot is free, or if there are more than [`MOST_BLOCKS`] blocks.
    pub fn ask(&mut self, wanted: Wanted) -> io::Result<Slot> {
        let count = wanted.targets.len();
        assert!((1..=MOST_BLOCKS).contains(&count), "{count} blocks in one read");
        let slot = *self.free.last().expect("whoever asks has looked for a free slot");
        self.socket.send(&Said::Read { slot, wanted })?;
        self.free.pop();
        self.blocks[slot as usize] = count;
        Ok(Slot(slot))
    }

    /// Says that all reads of the disk go through the cache from now on.
    ///
    /// # Errors
    /// Fails if the other end is gone.
    pub fn end_sampling(&mut self) -> io::Result<()> {
        self.socket.send(&Said::SamplingEnds)
    }

    /// Returns an answer, if one has come. The content stays until the slot is [given back](Self::give_back).
    ///
    /// # Errors
    /// Fails if the other end is gone, or says what makes no sense.
    pub fn receive(&mut self) -> io::Result<Option<(Slot, Outcome)>> {
        let outcome = match self.socket.try_receive::<Outcome>() {
            Ok(outcome) => outcome,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        let count = self.blocks.get(outcome.slot as usize).copied().unwrap_or(0);
        if count == 0 || (outcome.copied | outcome.past) & !bits(count) != 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer to no question"));
        }
        Ok(Some((Slot(outcome.slot), outcome)))
    }

    /// Copies the content of a block out.
    pub fn take(&self, slot: Slot, index: usize, page: &mut Page) {
        self.buffer.take((slot.0 as usize * MOST_BLOCKS + index) as u32, page);
    }

    /// Ends a read.
    pub fn give_back(&mut self, slot: Slot) {
        self.blocks[slot.0 as usize] = 0;
        self.free.push(slot.0);
    }

    /// Waits for an answer, or for the other end to go.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn wait(&self) -> io::Result<()> {
        retry_on_intr(|| poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], None))?;
        Ok(())
    }
}
