//! The hole over a stream of bytes, for guests whose kernel does not permit `/dev/mem`.
//!
//! In this case only the host accesses the hole. It writes the data that the guest sends over a port of a
//! virtio console ([`NAME`]). The host's header goes in the other direction. A stream consists of messages of
//! little-endian 32-bit words:
//!
//! | word | content |
//! | --- | --- |
//! | 0 | "spm1" |
//! | 1 | kind |
//! | 2 | number of following words, at most [`MAX_BODY`] |
//! | 3 and on | depends on the kind |
//!
//! | kind | sender | following words |
//! | --- | --- | --- |
//! | 1 | guest | number of a page frame, then its word of flags and those of the following page frames |
//! | 2 | guest | the end of a pass: features, generation, answered, next_ms, time_ms (low, high), changed, cpu_us |
//! | 3 | host | 1 if the host begins to listen, else 0; frames, requested, interval_ms, and [`MAX_RANGES`] times first and count |
//!
//! The guest sends the changed words, then the end of the pass. The host sends its header when the guest
//! opens the port, and after each change. When the host begins to listen, it knows nothing of earlier data,
//! so the guest sends all words again.
//!
//! An invalid message ends the stream, because the start of the next message is unknown. The host closes the
//! port, and starts again when the guest reopens it.

use core::fmt;

use crate::{FrameRange, GuestHeader, HostHeader, MAX_RANGES};

/// The name of the port, as in `/sys/class/virtio-ports/*/name`.
pub const NAME: &str = "org.samepage.hole";
/// The value of [`PARAMETER`](crate::PARAMETER) if there is a port and no memory.
pub const PARAMETER_VALUE: &str = "port";
/// The first word of each message: "spm1".
pub const MAGIC: u32 = u32::from_le_bytes(*b"spm1");
/// Limit for the words of a message after the three words of its head.
pub const MAX_BODY: u32 = 4096;
/// Limit for the page frames in a message.
pub const MAX_FLAGS: usize = MAX_BODY as usize - 1;

/// Length of the start of a message of flags, in bytes.
pub const FLAGS_BYTES: usize = 4 * (HEAD + 1);
/// Length of the message at the end of a pass, in bytes.
pub const PASS_BYTES: usize = 4 * (HEAD + PASS_BODY);
/// Length of the host's message, in bytes.
pub const HOST_BYTES: usize = 4 * (HEAD + HOST_BODY);

const HEAD: usize = 3;
const FLAGS: u32 = 1;
const PASS: u32 = 2;
const HOST: u32 = 3;
const PASS_BODY: usize = 8;
const HOST_BODY: usize = 4 + 2 * MAX_RANGES;

/// Returns the start of a message of flags. The words of `count` page frames from `first` on follow, at most
/// [`MAX_FLAGS`].
#[must_use]
pub fn flags(first: u32, count: u32) -> [u8; FLAGS_BYTES] {
    bytes(&[MAGIC, FLAGS, count + 1, first])
}

/// Returns the message at the end of a pass.
#[must_use]
pub fn pass(header: &GuestHeader) -> [u8; PASS_BYTES] {
    bytes(&[
        MAGIC,
        PASS,
        PASS_BODY as u32,
        header.features,
        header.generation,
        header.answered,
        header.next_ms,
        header.time_ms as u32,
        (header.time_ms >> 32) as u32,
        header.changed,
        header.cpu_us,
    ])
}

/// Returns the host's message. `begins` tells whether the host begins to listen. A port has no doorbell.
#[must_use]
pub fn host(header: &HostHeader, begins: bool) -> [u8; HOST_BYTES] {
    let mut words = [0; HEAD + HOST_BODY];
    words[..HEAD + 4].copy_from_slice(&[
        MAGIC,
        HOST,
        HOST_BODY as u32,
        u32::from(begins),
        header.frames,
        header.requested,
        header.interval_ms,
    ]);
    for (words, range) in words[HEAD + 4..].chunks_exact_mut(2).zip(&header.ranges) {
        words.copy_from_slice(&[range.first, range.count]);
    }
    bytes(&words)
}

fn bytes<const N: usize>(words: &[u32]) -> [u8; N] {
    let mut bytes = [0; N];
    for (bytes, word) in bytes.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// A decoded part of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// The word of flags of a page frame. The page frame may not exist.
    Flags {
        /// The number of the page frame.
        frame: u32,
        /// The word.
        word: u32,
    },
    /// The end of a pass.
    Pass(GuestHeader),
    /// The host's message.
    Host {
        /// The header, without a doorbell.
        header: HostHeader,
        /// Whether the host begins to listen.
        begins: bool,
    },
}

/// The reason why a stream is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// A message begins with this word instead of [`MAGIC`].
    Magic(u32),
    /// This kind of message does not exist.
    Kind(u32),
    /// A message of this kind cannot have this length.
    Length {
        /// The kind.
        kind: u32,
        /// The number of following words according to the message.
        words: u32,
    },
    /// The numbers of the page frames do not fit into 32 bits.
    Frames {
        /// The first page frame.
        first: u32,
        /// The number of page frames.
        count: u32,
    },
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(word) => write!(f, "a message begins with {word:#010x} instead of {MAGIC:#010x}"),
            Self::Kind(kind) => write!(f, "there are no messages of kind {kind}"),
            Self::Length { kind, words } => write!(f, "a message of kind {kind} does not have {words} words"),
            Self::Frames { first, count } => {
                write!(f, "{count} page frames from {first} on have numbers beyond 32 bits")
            }
        }
    }
}

impl core::error::Error for Malformed {}

/// Decodes a stream that arrives in pieces of any size. It stores only a few words.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    /// The received bytes of the next word.
    bytes: [u8; 4],
    filled: usize,
    /// Number of received words of the present message.
    taken: u32,
    kind: u32,
    length: u32,
    /// The words after the head, except flags.
    body: [u32; HOST_BODY],
}

impl Decoder {
    /// Returns a decoder at the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Removes bytes from the front of `bytes` until an item is complete. Returns `None` when all bytes are
    /// consumed.
    ///
    /// # Errors
    /// Fails if the stream is invalid. All following data is invalid too.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Result<Option<Item>, Malformed> {
        while let Some((&byte, rest)) = bytes.split_first() {
            if let (0, Some((word, rest))) = (self.filled, bytes.split_first_chunk()) {
                *bytes = rest;
                self.bytes = *word;
            } else {
                *bytes = rest;
                self.bytes[self.filled] = byte;
                self.filled += 1;
                if self.filled < self.bytes.len() {
                    continue;
                }
                self.filled = 0;
            }
            match self.take(u32::from_le_bytes(self.bytes)) {
                Ok(None) => {}
                Ok(item) => return Ok(item),
                Err(error) => {
                    *self = Self::new();
                    return Err(error);
                }
            }
        }
        Ok(None)
    }

    /// Processes the next word.
    fn take(&mut self, word: u32) -> Result<Option<Item>, Malformed> {
        let place = self.taken;
        self.taken += 1;
        match place {
            0 if word != MAGIC => return Err(Malformed::Magic(word)),
            0 => return Ok(None),
            1 => {
                self.kind = word;
                return if (FLAGS..=HOST).contains(&word) { Ok(None) } else { Err(Malformed::Kind(word)) };
            }
            2 => {
                self.length = word;
                let right = match self.kind {
                    FLAGS => (2..=MAX_BODY).contains(&word),
                    PASS => word == PASS_BODY as u32,
                    _ => word == HOST_BODY as u32,
                };
                let wrong = Malformed::Length { kind: self.kind, words: word };
                return if right { Ok(None) } else { Err(wrong) };
            }
            _ => {}
        }
        let place = place - HEAD as u32;
        if place + 1 == self.length {
            self.taken = 0;
        }
        if self.kind == FLAGS && place > 0 {
            // The check of the first word guarantees that this does not overflow.
            return Ok(Some(Item::Flags { frame: self.body[0] + (place - 1), word }));
        }
        self.body[place as usize] = word;
        if self.kind == FLAGS {
            let count = self.length - 1;
            let fits = word.checked_add(count - 1).is_some();
            return if fits { Ok(None) } else { Err(Malformed::Frames { first: word, count }) };
        }
        Ok((self.taken == 0).then(|| self.item()))
    }

    /// Returns the item of a complete message.
    fn item(&self) -> Item {
        let body = &self.body;
        if self.kind == PASS {
            return Item::Pass(GuestHeader {
                features: body[0],
                generation: body[1],
                answered: body[2],
                next_ms: body[3],
                time_ms: u64::from(body[4]) | u64::from(body[5]) << 32,
                changed: body[6],
                cpu_us: body[7],
            });
        }
        let mut ranges = [FrameRange::default(); MAX_RANGES];
        for (range, words) in ranges.iter_mut().zip(body[4..].chunks_exact(2)) {
            *range = FrameRange { first: words[0], count: words[1] };
        }
        let [_, frames, requested, interval_ms, ..] = *body;
        let header = HostHeader { frames, doorbell: 0, ranges, requested, interval_ms };
        Item::Host { header, begins: body[0] != 0 }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// Returns the items of a stream that arrives in pieces of these lengths, and its fault.
    fn decode(stream: &[u8], pieces: &[usize]) -> (Vec<Item>, Option<Malformed>) {
        let (mut decoder, mut items, mut rest) = (Decoder::new(), Vec::new(), stream);
        let mut pieces = pieces.iter().cycle();
        while !rest.is_empty() {
            let length = pieces.next().map_or(rest.len(), |&length| length.clamp(1, rest.len()));
            let (mut piece, behind) = rest.split_at(length);
            rest = behind;
            loop {
                match decoder.next(&mut piece) {
                    Ok(Some(item)) => items.push(item),
                    Ok(None) => break,
                    Err(error) => return (items, Some(error)),
                }
            }
            assert!(piece.is_empty());
        }
        (items, None)
    }

    fn flags_message(first: u32, words: &[u32]) -> Vec<u8> {
        let mut message = flags(first, words.len() as u32).to_vec();
        message.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        message
    }

    fn guest_header() -> GuestHeader {
        GuestHeader {
            features: 1,
            generation: 2,
            answered: 3,
            next_ms: 4,
            time_ms: 5 << 32 | 6,
            changed: 7,
            cpu_us: 8,
        }
    }

    fn host_header() -> HostHeader {
        let range = |first| FrameRange { first, count: first + 1 };
        HostHeader {
            frames: 9,
            doorbell: 0,
            ranges: [range(10), range(20), range(30), range(40)],
            requested: u32::MAX,
            interval_ms: 11,
        }
    }

    #[test]
    fn messages_are_read_as_written() {
        let mut stream = flags_message(u32::MAX - 1, &[70, 71]);
        stream.extend(pass(&guest_header()));
        stream.extend(host(&host_header(), true));
        stream.extend(host(&host_header(), false));
        let items = vec![
            Item::Flags { frame: u32::MAX - 1, word: 70 },
            Item::Flags { frame: u32::MAX, word: 71 },
            Item::Pass(guest_header()),
            Item::Host { header: host_header(), begins: true },
            Item::Host { header: host_header(), begins: false },
        ];
        for pieces in [&[][..], &[1], &[3], &[4], &[5, 1, 2], &[17]] {
            assert_eq!(decode(&stream, pieces), (items.clone(), None), "in pieces of {pieces:?}");
        }
        let longest = vec![1; MAX_FLAGS];
        assert_eq!(decode(&flags_message(0, &longest), &[]).0.len(), MAX_FLAGS);
    }

    #[test]
    fn what_makes_no_sense_ends_a_stream() {
        let error = |words: &[u32]| decode(&bytes::<16>(words), &[]).1;
        assert_eq!(error(&[MAGIC + 1]), Some(Malformed::Magic(MAGIC + 1)));
        assert_eq!(error(&[MAGIC, 0]), Some(Malformed::Kind(0)));
        assert_eq!(error(&[MAGIC, 4]), Some(Malformed::Kind(4)));
        for (kind, words) in
            [(1, 0), (1, 1), (1, MAX_BODY + 1), (1, u32::MAX), (2, 7), (2, 9), (3, 0), (3, 13)]
        {
            assert_eq!(error(&[MAGIC, kind, words]), Some(Malformed::Length { kind, words }));
        }
        let beyond = Malformed::Frames { first: u32::MAX, count: 2 };
        assert_eq!(error(&[MAGIC, 1, 3, u32::MAX]), Some(beyond));
        assert_eq!(error(&[MAGIC, 1, 2, u32::MAX]), None);
        for error in [Malformed::Magic(1), Malformed::Kind(9), beyond] {
            std::println!("{error}");
        }
    }

    fn message() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            (0..1_u32 << 31, prop::collection::vec(any::<u32>(), 1..40))
                .prop_map(|(first, words)| flags_message(first, &words)),
            Just(pass(&guest_header()).to_vec()),
            any::<bool>().prop_map(|begins| host(&host_header(), begins).to_vec()),
        ]
    }

    proptest! {
        #[test]
        fn any_bytes_cut_anywhere_are_survived(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            pieces in prop::collection::vec(1..20_usize, 0..8),
            heads in 0..4_u32,
        ) {
            // Some that get past the beginning.
            let mut stream = [MAGIC.to_le_bytes(), heads.to_le_bytes()].concat();
            stream.extend(bytes);
            prop_assert_eq!(decode(&stream, &pieces), decode(&stream, &[]));
            let _ = decode(&stream[8..], &pieces);
        }

        #[test]
        fn how_a_stream_is_cut_does_not_matter(
            messages in prop::collection::vec(message(), 0..6),
            spoilt in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
            pieces in prop::collection::vec(1..50_usize, 1..8),
        ) {
            let mut stream = messages.concat();
            if let Some((place, byte)) = spoilt.filter(|_| !stream.is_empty()) {
                let place = place.index(stream.len());
                stream[place] = byte;
            }
            prop_assert_eq!(decode(&stream, &pieces), decode(&stream, &[]));
        }
    }
}
