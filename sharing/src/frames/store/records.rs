//! The metadata of all frames: a table that grows and shrinks by the piece, so that no step has to copy it.

use crate::frames::store::Frame;
use crate::numbers::Digest;

/// Frames of one piece.
const PIECE: usize = 1024;
/// Pieces that are freed at once.
const TRIMMED: usize = 16;

/// What a frame is, and who its owners are besides pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct State(u8);

impl State {
    /// In use.
    pub(crate) const LIVE: Self = Self(1);
    /// Its content is there, and no longer changes.
    pub(crate) const FILLED: Self = Self(1 << 1);
    /// Somebody has a [`Hold`](crate::frames::store::Hold) on it.
    pub(crate) const HELD: Self = Self(1 << 2);
    /// It holds a disk block.
    pub(crate) const KEPT: Self = Self(1 << 3);
    /// A guest has mapped it since its memory was fresh.
    pub(crate) const MAPPED: Self = Self(1 << 4);
    /// It is in the index of frames.
    pub(crate) const INDEXED: Self = Self(1 << 5);

    pub(crate) fn has(self, flag: Self) -> bool {
        self.0 & flag.0 != 0
    }

    pub(crate) fn set(&mut self, flag: Self) {
        self.0 |= flag.0;
    }

    /// Returns whether it was set.
    pub(crate) fn clear(&mut self, flag: Self) -> bool {
        let was = self.has(flag);
        self.0 &= !flag.0;
        was
    }
}

/// What is known of frames, by what is read together: 9 bytes each.
#[derive(Debug)]
struct Piece {
    states: Box<[State]>,
    /// Guest pages that refer to each.
    sharers: Box<[u32]>,
    /// Keyed digests of their contents.
    digests: Box<[Digest]>,
}

impl Piece {
    fn new() -> Self {
        Self {
            states: vec![State::default(); PIECE].into(),
            sharers: vec![0; PIECE].into(),
            digests: vec![Digest::default(); PIECE].into(),
        }
    }
}

/// The table.
#[derive(Debug, Default)]
pub(crate) struct Records {
    pieces: Vec<Piece>,
    len: u32,
}

fn place(frame: Frame) -> (usize, usize) {
    (frame.number() as usize / PIECE, frame.number() as usize % PIECE)
}

impl Records {
    /// Frames that the table has places for.
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Makes the table longer: new frames are free.
    pub(crate) fn grow(&mut self, len: u32) {
        debug_assert!(len >= self.len);
        self.len = len;
        while self.pieces.len() * PIECE < len as usize {
            self.pieces.push(Piece::new());
        }
    }

    /// Makes the table shorter. All frames beyond are free, and nothing is noted of them.
    pub(crate) fn shrink(&mut self, len: u32) {
        self.len = len;
        self.trim();
    }

    /// Gives memory back that the table has too much: a bounded piece of work. Returns whether there is more.
    pub(crate) fn trim(&mut self) -> bool {
        let needed = (self.len as usize).div_ceil(PIECE);
        self.pieces.truncate(needed.max(self.pieces.len().saturating_sub(TRIMMED)));
        if self.pieces.len() * 4 < self.pieces.capacity() {
            self.pieces.shrink_to(2 * self.pieces.len());
        }
        self.pieces.len() > needed
    }

    /// The state of a frame; a free one's beyond the end.
    pub(crate) fn state(&self, frame: Frame) -> State {
        let (piece, index) = place(frame);
        self.pieces.get(piece).map_or_else(State::default, |piece| piece.states[index])
    }

    pub(crate) fn state_mut(&mut self, frame: Frame) -> &mut State {
        let (piece, index) = place(frame);
        &mut self.pieces[piece].states[index]
    }

    /// How many pages refer to a frame.
    pub(crate) fn sharers(&self, frame: Frame) -> u32 {
        let (piece, index) = place(frame);
        self.pieces.get(piece).map_or(0, |piece| piece.sharers[index])
    }

    pub(crate) fn sharers_mut(&mut self, frame: Frame) -> &mut u32 {
        let (piece, index) = place(frame);
        &mut self.pieces[piece].sharers[index]
    }

    pub(crate) fn digest(&self, frame: Frame) -> Digest {
        let (piece, index) = place(frame);
        self.pieces[piece].digests[index]
    }

    pub(crate) fn set_digest(&mut self, frame: Frame, digest: Digest) {
        let (piece, index) = place(frame);
        self.pieces[piece].digests[index] = digest;
    }

    pub(crate) fn bytes(&self) -> usize {
        self.pieces.len() * PIECE * (size_of::<State>() + 2 * size_of::<u32>())
            + self.pieces.capacity() * size_of::<Piece>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_gives_memory_back_and_starts_anew() {
        let mut records = Records::default();
        records.grow(3 * PIECE as u32 + 5);
        let frame = Frame::new(3000);
        records.set_digest(frame, Digest::new(7));
        records.state_mut(frame).set(State::LIVE);
        *records.sharers_mut(frame) = 3;
        assert!(records.state(frame).has(State::LIVE) && !records.state(frame).has(State::HELD));
        assert_eq!(
            (records.digest(frame), records.sharers(frame), records.sharers(Frame::new(1 << 30))),
            (Digest::new(7), 3, 0)
        );
        let before = records.bytes();
        records.shrink(10);
        while records.trim() {}
        assert!(records.bytes() < before / 3);
        records.grow(3001);
        assert_eq!((records.state(frame), records.digest(frame)), (State::default(), Digest::default()));
    }
}
