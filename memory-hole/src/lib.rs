//! The protocol of page types between a guest and its host. Guest and host use the same definition, so it is
//! in this crate.
//!
//! A guest publishes the use of its pages in the *memory hole*, which is memory outside guest RAM. The hole
//! is an array of 32-bit words, little-endian like an x86-64 guest, in 4 KiB pages:
//!
//! ```text
//! word 0      the host's header: a description of the hole, and the host's requests
//! word 1024   the guest's header: its progress
//! word 2048   a counter for each block of 1024 page frames. It changes with the block's flags
//! ...         from the next page on, one word of flags for each page frame, by its number
//! ```
//!
//! A word of flags consists of [`PUBLISHED`] and the value of `/proc/kpageflags` for the page frame
//! ([`flags`]). A word of 0 says nothing. Page frame numbers count from guest physical address 0. The words
//! of page frames in a gap of RAM are unused.
//!
//! # Protocol
//! The guest publishes its page frames in *passes*. It writes the changed words, then the counters of their
//! blocks. At the end of a pass it makes the sequence counter odd, writes its header, makes the counter even
//! again, and rings the doorbell by writing any word at its address. A header is invalid if the sequence
//! counter is odd or changes while it is read. A word of flags is a claim only about its own page frame and
//! may be read at any time.
//!
//! The host requests a pass by increasing [`HostHeader::requested`]. A pass that began after the request
//! answers it in [`GuestHeader::answered`]. Each of its words is newer than the request.
//!
//! Nothing in the hole protects the host, because the guest can write any of it at any time. Everything in it
//! is an untrusted claim. The host must keep its own state elsewhere.
//!
//! # Finding the hole
//! A guest finds the hole with the kernel parameter `samepage.hole=BYTES@ADDRESS` ([`PARAMETER`],
//! [`parse_parameter`]), which Linux itself ignores. The memory map reserves the memory. If the value is
//! `port`, the guest has no such memory and sends the same data over a [`port`].

#![no_std]
#![forbid(unsafe_code)]

pub mod flags;
pub mod port;

use core::sync::atomic::{AtomicU32, Ordering, fence};

pub use flags::{PUBLISHED, PageType};

/// The first word of the host's header: "SPHL".
pub const HOST_MAGIC: u32 = u32::from_le_bytes(*b"SPHL");
/// The first word of a guest's header: "sphl".
pub const GUEST_MAGIC: u32 = u32::from_le_bytes(*b"sphl");
/// The version of this layout.
pub const VERSION: u32 = 1;
/// The kernel parameter with the place of the hole.
pub const PARAMETER: &str = "samepage.hole";
/// Number of ranges of RAM in the host's header.
pub const MAX_RANGES: usize = 4;
/// Number of page frames for each counter.
pub const BLOCK_PAGES: u32 = 1024;
/// Size of a page in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// The content of freed pages matters to the guest, which poisons them and checks the poison when it
/// allocates them again. The host must not discard them.
pub const FREED_PAGES_MATTER: u32 = 1 << 0;
/// The guest clears freed pages, and expects zeros when it allocates them again.
pub const FREED_PAGES_ARE_ZERO: u32 = 1 << 1;

const PAGE_WORDS: usize = 1024;
const HOST: usize = 0;
const GUEST: usize = PAGE_WORDS;
const COUNTERS: usize = 2 * PAGE_WORDS;

/// A run of page frames that are RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameRange {
    /// The first page frame.
    pub first: u32,
    /// The number of page frames.
    pub count: u32,
}

/// The host's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostHeader {
    /// Number of page frames with words of flags: the highest frame number plus one.
    pub frames: u32,
    /// Guest physical address of the doorbell; 0 for none.
    pub doorbell: u64,
    /// Ranges of RAM, in ascending order. Unused ranges are empty.
    pub ranges: [FrameRange; MAX_RANGES],
    /// Number of the requested pass. It increases and wraps around.
    pub requested: u32,
    /// The interval of passes that the host wants, in milliseconds. 0 leaves it to the guest.
    pub interval_ms: u32,
}

/// The guest's header, written at the end of a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestHeader {
    /// [`FREED_PAGES_MATTER`], [`FREED_PAGES_ARE_ZERO`]; other bits are ignored.
    pub features: u32,
    /// Number of the pass. It changes with each pass.
    pub generation: u32,
    /// The host's last request before the pass began.
    pub answered: u32,
    /// Time until the next pass if there is no request, in milliseconds.
    pub next_ms: u32,
    /// The end of the pass, in milliseconds of the guest's monotonic clock.
    pub time_ms: u64,
    /// Words that this pass changed.
    pub changed: u32,
    /// The guest's CPU time for this pass, in microseconds.
    pub cpu_us: u32,
}

/// The reason why a guest's header could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// There is no header of this version.
    Absent,
    /// The header kept changing.
    Unsettled,
}

/// Number of words in the pages of counters.
const fn counter_words(frames: u32) -> usize {
    (frames.div_ceil(BLOCK_PAGES) as usize).next_multiple_of(PAGE_WORDS)
}

/// Returns the size in bytes of a hole for this number of page frames: whole pages.
#[must_use]
pub const fn bytes_for(frames: u32) -> u64 {
    let words = COUNTERS + counter_words(frames) + (frames as usize).next_multiple_of(PAGE_WORDS);
    words as u64 * 4
}

/// Returns size and address from the value of [`PARAMETER`], or `None` if the value is invalid.
#[must_use]
pub fn parse_parameter(value: &str) -> Option<(u64, u64)> {
    let (bytes, address) = value.split_once('@')?;
    Some((number(bytes)?, number(address)?))
}

fn number(text: &str) -> Option<u64> {
    text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |digits| u64::from_str_radix(digits, 16).ok())
}

/// The words of a hole and their meaning.
///
/// Every access is that of a whole word, so no side sees half of a written word.
#[derive(Clone, Copy, Debug)]
pub struct Hole<'a> {
    words: &'a [AtomicU32],
    frames: u32,
}

impl<'a> Hole<'a> {
    /// Returns a hole for this number of page frames, or `None` if the memory is too small.
    #[must_use]
    pub fn new(words: &'a [AtomicU32], frames: u32) -> Option<Self> {
        (words.len() as u64 * 4 >= bytes_for(frames)).then_some(Self { words, frames })
    }

    /// Returns the hole that the host's header describes. Returns `None` if there is no header, or if the
    /// hole does not fit into the memory.
    #[must_use]
    pub fn described(words: &'a [AtomicU32]) -> Option<Self> {
        let nothing = Self::new(words, 0)?;
        let header = nothing.host_header()?;
        Self::new(words, header.frames)
    }

    /// Returns the number of page frames with words.
    #[must_use]
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// Returns the number of blocks of page frames. Each block has a counter.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.frames.div_ceil(BLOCK_PAGES)
    }

    /// Returns the host's header, or `None` if there is none of this version.
    #[must_use]
    pub fn host_header(&self) -> Option<HostHeader> {
        let word = |index: usize| self.load(HOST + index);
        if (word(0), word(1)) != (HOST_MAGIC, VERSION) {
            return None;
        }
        let mut ranges = [FrameRange::default(); MAX_RANGES];
        for (index, range) in ranges.iter_mut().enumerate() {
            *range = FrameRange { first: word(16 + 2 * index), count: word(17 + 2 * index) };
        }
        Some(HostHeader {
            frames: word(2),
            doorbell: u64::from(word(4)) | u64::from(word(5)) << 32,
            ranges,
            requested: word(8),
            interval_ms: word(9),
        })
    }

    /// Writes the host's header, the magic number last.
    pub fn set_host_header(&self, header: &HostHeader) {
        let set = |index: usize, value: u32| self.store(HOST + index, value);
        set(2, header.frames);
        set(4, header.doorbell as u32);
        set(5, (header.doorbell >> 32) as u32);
        set(8, header.requested);
        set(9, header.interval_ms);
        for (index, range) in header.ranges.iter().enumerate() {
            set(16 + 2 * index, range.first);
            set(17 + 2 * index, range.count);
        }
        set(1, VERSION);
        self.words[HOST].store(HOST_MAGIC, Ordering::Release);
    }

    /// Requests a pass. The number must differ from the previous one. The guest sees the host's earlier
    /// writes before the request.
    pub fn set_requested(&self, number: u32) {
        self.words[HOST + 8].store(number, Ordering::Release);
    }

    /// Sets the interval of passes that the host wants, in milliseconds. 0 leaves it to the guest.
    pub fn set_interval_ms(&self, interval: u32) {
        self.store(HOST + 9, interval);
    }

    /// Returns the guest's header, if the header is stable. Tries a few times and never waits.
    ///
    /// # Errors
    /// Fails with the reason if there is no valid header.
    pub fn guest_header(&self) -> Result<GuestHeader, Unread> {
        const ATTEMPTS: u32 = 16;
        let word = |index: usize| self.load(GUEST + index);
        if (word(0), word(1)) != (GUEST_MAGIC, VERSION) {
            return Err(Unread::Absent);
        }
        for _ in 0..ATTEMPTS {
            let before = self.words[GUEST + 2].load(Ordering::Acquire);
            let header = GuestHeader {
                features: word(3),
                generation: word(4),
                answered: word(5),
                next_ms: word(6),
                changed: word(7),
                time_ms: u64::from(word(8)) | u64::from(word(9)) << 32,
                cpu_us: word(10),
            };
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && word(2) == before {
                return Ok(header);
            }
            core::hint::spin_loop();
        }
        Err(Unread::Unsettled)
    }

    /// Writes the guest's header under the sequence counter.
    pub fn set_guest_header(&self, header: &GuestHeader) {
        let set = |index: usize, value: u32| self.store(GUEST + index, value);
        // A guest that died in the middle may have left the counter odd.
        let sequence = self.load(GUEST + 2) & !1;
        set(2, sequence.wrapping_add(1));
        fence(Ordering::Release);
        set(3, header.features);
        set(4, header.generation);
        set(5, header.answered);
        set(6, header.next_ms);
        set(7, header.changed);
        set(8, header.time_ms as u32);
        set(9, (header.time_ms >> 32) as u32);
        set(10, header.cpu_us);
        set(1, VERSION);
        set(0, GUEST_MAGIC);
        self.words[GUEST + 2].store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// Removes the guest's header, because it is no longer valid.
    pub fn clear_guest_header(&self) {
        self.words[GUEST].store(0, Ordering::Release);
    }

    /// Returns the counter of a block. The block's number must be below [`Hole::blocks`].
    #[must_use]
    pub fn counter(&self, block: u32) -> u32 {
        self.words[COUNTERS + block as usize].load(Ordering::Acquire)
    }

    /// Changes the counter of a block whose words have changed.
    pub fn count(&self, block: u32) {
        let counter = &self.words[COUNTERS + block as usize];
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }

    /// Returns the words of a block's page frames. The first page frame is `block * BLOCK_PAGES`.
    #[must_use]
    pub fn block(&self, block: u32) -> &'a [AtomicU32] {
        let first = block * BLOCK_PAGES;
        &self.flags()[first as usize..self.frames.min(first + BLOCK_PAGES) as usize]
    }

    /// Returns the words of all page frames.
    #[must_use]
    pub fn flags(&self) -> &'a [AtomicU32] {
        let start = COUNTERS + counter_words(self.frames);
        &self.words[start..start + self.frames as usize]
    }

    fn load(&self, index: usize) -> u32 {
        self.words[index].load(Ordering::Relaxed)
    }

    fn store(&self, index: usize, value: u32) {
        self.words[index].store(value, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn memory(frames: u32) -> Vec<AtomicU32> {
        (0..bytes_for(frames) / 4).map(|_| AtomicU32::new(0)).collect()
    }

    #[test]
    fn sizes_are_whole_pages() {
        assert_eq!(bytes_for(0), 8192);
        assert_eq!(bytes_for(1), 16384);
        assert_eq!(bytes_for(1024), 16384);
        assert_eq!(bytes_for(1025), 20480);
        assert_eq!(bytes_for(1 << 20), (4 << 20) + 8192 + 4096);
    }

    #[test]
    fn headers_are_read_as_written() {
        let memory = memory(5000);
        assert!(Hole::described(&memory).is_none());
        let hole = Hole::new(&memory, 5000).unwrap();
        let host = HostHeader {
            frames: 5000,
            doorbell: 0x12_3456_7000,
            ranges: [
                FrameRange { first: 1, count: 2 },
                FrameRange { first: 3, count: 4 },
                FrameRange::default(),
                FrameRange { first: 7, count: 8 },
            ],
            requested: u32::MAX,
            interval_ms: 250,
        };
        hole.set_host_header(&host);
        assert_eq!(hole.host_header(), Some(host));
        assert_eq!(Hole::described(&memory).unwrap().frames(), 5000);
        assert_eq!(hole.guest_header(), Err(Unread::Absent));
        let guest = GuestHeader {
            features: FREED_PAGES_MATTER,
            generation: 3,
            answered: 9,
            next_ms: 1000,
            time_ms: 1 << 40,
            changed: 12,
            cpu_us: 77,
        };
        hole.set_guest_header(&guest);
        assert_eq!(hole.guest_header(), Ok(guest));
        memory[GUEST + 2].fetch_add(1, Ordering::Relaxed);
        assert_eq!(hole.guest_header(), Err(Unread::Unsettled));
        hole.set_guest_header(&guest);
        assert_eq!(hole.guest_header(), Ok(guest));
        hole.clear_guest_header();
        assert_eq!(hole.guest_header(), Err(Unread::Absent));
        hole.set_requested(7);
        hole.set_interval_ms(2000);
        assert_eq!(hole.host_header(), Some(HostHeader { requested: 7, interval_ms: 2000, ..host }));
    }

    #[test]
    fn blocks_cover_all_page_frames_once() {
        for frames in [1, 1023, 1024, 1025, 4096, 5000] {
            let memory = memory(frames);
            let hole = Hole::new(&memory, frames).unwrap();
            (0..hole.blocks()).flat_map(|block| hole.block(block)).for_each(|word| {
                word.fetch_add(1, Ordering::Relaxed);
            });
            assert!(hole.flags().iter().all(|word| word.load(Ordering::Relaxed) == 1));
            assert_eq!(memory.iter().map(|word| word.load(Ordering::Relaxed)).sum::<u32>(), frames);
            hole.count(hole.blocks() - 1);
            assert_eq!(hole.counter(hole.blocks() - 1), 1);
        }
    }

    #[test]
    fn a_header_that_asks_for_more_than_there_is_is_refused() {
        let memory = memory(1000);
        let hole = Hole::new(&memory, 1000).unwrap();
        for frames in [1025, 1 << 20, u32::MAX] {
            hole.set_host_header(&HostHeader { frames, ..HostHeader::default() });
            assert!(Hole::described(&memory).is_none());
        }
        assert!(Hole::new(&memory[..10], 0).is_none());
    }

    #[test]
    fn the_parameter_names_size_and_address() {
        assert_eq!(parse_parameter("16384@0xc0000000"), Some((16384, 0xc000_0000)));
        assert_eq!(parse_parameter("0x4000@4096"), Some((16384, 4096)));
        for wrong in ["", "@", "1@", "@1", "1", "1@-1", "x@1", "1@0xg"] {
            assert_eq!(parse_parameter(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_memory_is_read_without_harm(words in prop::collection::vec(any::<u32>(), 0..8192), magic: bool) {
            let words: Vec<_> = words.into_iter().map(AtomicU32::new).collect();
            if magic && words.len() > GUEST + 2 {
                words[HOST].store(HOST_MAGIC, Ordering::Relaxed);
                words[GUEST].store(GUEST_MAGIC, Ordering::Relaxed);
                words[HOST + 1].store(VERSION, Ordering::Relaxed);
                words[GUEST + 1].store(VERSION, Ordering::Relaxed);
            }
            if let Some(hole) = Hole::described(&words) {
                let _ = hole.guest_header();
                prop_assert_eq!(hole.flags().len(), hole.frames() as usize);
            }
        }
    }
}
