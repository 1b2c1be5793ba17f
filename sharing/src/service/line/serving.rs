//! The end of the engine: answers a disk, with blocks that the group has, or that whoever serves reads from the image.

#![expect(unsafe_code, reason = "copies what was read out of frames by address")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use crate::blocks::admission::{SAMPLED, Sample};
use crate::blocks::{BlockRead, Image, ReadPlan};
use crate::memory::content::Page;
use crate::memory::ram::PAGE_SIZE;
use crate::remote::buffer::Buffer;
use crate::remote::socket::{self, Socket};
use crate::service::line::messages::{MOST_BLOCKS, Outcome, SLOTS, Said, Wanted, Welcome, bit, bits};
use crate::service::{BlockClient, Fetched};

/// Samples are not thinner.
const THINNEST: u64 = SAMPLED >> 16;

/// One queue's line.
#[derive(Debug)]
pub struct Serving {
    socket: Socket,
    buffer: Buffer,
    client: BlockClient,
    /// Number of the disk in its VM.
    disk: usize,
    reads: [Option<Read>; SLOTS],
}

/// A read that was not answered yet.
#[derive(Clone, Copy, Debug)]
struct Read {
    outcome: Outcome,
    /// Fetches that have not ended. The read itself counts until it has begun.
    fetches: usize,
}

/// A read that the disk wants.
#[derive(Debug)]
pub struct Question {
    slot: usize,
    /// What is wanted.
    pub wanted: Wanted,
}

/// A run of blocks to be read from the image. It is to be [ended](Serving::end).
#[derive(Debug)]
pub struct Fetching {
    slot: usize,
    /// Place of the first block among those of the question.
    from: usize,
    token: u64,
    /// Number of the first block in the image.
    pub first: u64,
    /// How many.
    pub blocks: u32,
    /// Where they are read to. Nobody else touches this memory until the fetch is ended. It exists as long as the
    /// client, or a clone of it.
    pub landing: NonNull<u8>,
}

// SAFETY: the memory at the address belongs to whoever has this value, on any thread.
unsafe impl Send for Fetching {}

impl Serving {
    /// Creates a line for a disk, by its number in its VM. Returns the disk's end.
    ///
    /// # Errors
    /// Fails if the process is out of files or memory.
    pub fn create(client: BlockClient, disk: usize) -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socket::pair()?;
        let mut socket = Socket::new(ours);
        let (memory, buffer) = Buffer::create_pages((SLOTS * MOST_BLOCKS) as u32)?;
        socket.send_with(&Welcome { sampler: client.sampler() }, [memory.as_fd()])?;
        Ok((Self { socket, buffer, client, disk, reads: [None; SLOTS] }, theirs))
    }

    /// A file that becomes readable when a question comes, or when the disk is gone.
    #[must_use]
    pub fn event(&self) -> RawFd {
        self.socket.as_fd().as_raw_fd()
    }

    /// What has the memory of fetches.
    #[must_use]
    pub fn client(&self) -> &BlockClient {
        &self.client
    }

    /// Returns the next read that is wanted, if one is. It is to be [begun](Self::begin), or [passed](Self::pass).
    ///
    /// # Errors
    /// Fails if the disk is gone, or says what makes no sense.
    pub fn receive(&mut self) -> io::Result<Option<Question>> {
        loop {
            let (slot, wanted) = match self.socket.try_receive() {
                Ok(Said::Read { slot, wanted }) => (slot as usize, wanted),
                Ok(Said::SamplingEnds) => {
                    self.client.end_sampling(self.disk);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            };
            let is_free = self.reads.get(slot).is_some_and(Option::is_none);
            if !is_free || !(1..=MOST_BLOCKS).contains(&wanted.targets.len()) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a question that makes no sense"));
            }
            let outcome = Outcome { slot: slot as u32, ..Outcome::default() };
            self.reads[slot] = Some(Read { outcome, fetches: 1 });
            return Ok(Some(Question { slot, wanted }));
        }
    }

    /// Has the disk read all of it itself.
    ///
    /// # Errors
    /// Fails if the disk is gone.
    pub fn pass(&mut self, question: &Question) -> io::Result<()> {
        if let Some(read) = &mut self.reads[question.slot] {
            read.outcome.past = bits(question.wanted.targets.len());
            read.outcome.is_stopped = self.client.is_stopped();
        }
        self.done(question.slot)
    }

    /// Delivers what the group has of a read. `image` is what the wanted file is called here. Returns what is to be read.
    ///
    /// # Errors
    /// Fails if the disk is gone.
    pub fn begin(&mut self, question: &Question, image: Image) -> io::Result<Vec<Fetching>> {
        let Question { slot, wanted } = question;
        let (slot, buffer) = (*slot, &self.buffer);
        let read = BlockRead { keep: wanted.keep, image, first: wanted.first, targets: &wanted.targets };
        let mut copied = 0;
        let copy = |index: usize, content: &Page| {
            copied |= bit(index);
            buffer.put(place(slot, index), content);
        };
        let plan = match wanted.sample {
            Some(sample) => {
                let limit = sample.limit.clamp(THINNEST, SAMPLED);
                let sample = Sample { disk: self.disk, passed: sample.passed, limit };
                self.client.begin_sampled_read(&read, sample, copy)
            }
            None => self.client.begin_read(&read, copy),
        };
        let ReadPlan { from_guests, from_host, fetches, past, room } = plan;
        let index = |block: u64| (block - wanted.first) as usize;
        let past: u32 = past.into_iter().flatten().map(|block| bit(index(block))).sum();
        if let Some(read) = &mut self.reads[slot] {
            // A block that was copied before the engine stopped may be zeros.
            read.outcome.copied = copied & !past;
            read.outcome.past = past;
            (read.outcome.from_guests, read.outcome.from_host) = (from_guests as u32, from_host as u32);
            read.outcome.room = room;
            read.outcome.is_stopped = self.client.is_stopped();
            read.fetches += fetches.len();
        }
        let fetches = fetches.into_iter().map(|run| Fetching {
            slot,
            from: index(run.first),
            token: run.token,
            first: run.first,
            blocks: run.blocks,
            landing: run.landing,
        });
        let fetches = fetches.collect();
        self.done(slot)?;
        Ok(fetches)
    }

    /// Ends a fetch, which was read in full or not.
    ///
    /// # Errors
    /// Fails if the disk is gone.
    pub fn end(&mut self, fetch: &Fetching, is_read: bool) -> io::Result<()> {
        let Fetching { slot, from, token, blocks, landing, .. } = *fetch;
        let buffer = &self.buffer;
        let mut copied = 0;
        let fetched = self.client.end_fetch(token, is_read, |index, content| {
            copied |= bit(from + index);
            buffer.put(place(slot, from + index), content);
        });
        let count = blocks as usize;
        let all = bits(count) << from;
        let past = match fetched {
            Fetched::Delivered => 0,
            Fetched::ToBeCopied => {
                for index in 0..count {
                    // SAFETY: the fetch was read in full. Its memory belongs to whoever has the fetch.
                    let page = unsafe { landing.add(index * PAGE_SIZE).cast::<Page>().as_ref() };
                    buffer.put(place(slot, from + index), page);
                }
                copied = all;
                0
            }
            Fetched::Not => all,
        };
        if let Some(read) = &mut self.reads[slot] {
            read.outcome.copied |= copied & !past;
            read.outcome.past |= past;
            read.outcome.fetched += if past == 0 { blocks } else { 0 };
            read.outcome.is_stopped |= self.client.is_stopped();
        }
        self.done(slot)
    }

    /// A part of a read is done. The last one answers.
    fn done(&mut self, slot: usize) -> io::Result<()> {
        let Some(read) = &mut self.reads[slot] else { return Ok(()) };
        read.fetches -= 1;
        if read.fetches > 0 {
            return Ok(());
        }
        let outcome = read.outcome;
        self.reads[slot] = None;
        self.socket.send(&outcome)
    }
}

/// The page of the common memory for a block.
fn place(slot: usize, index: usize) -> u32 {
    (slot * MOST_BLOCKS + index) as u32
}
