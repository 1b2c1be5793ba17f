//! What devices know about pages before anyone has scanned them: what they were filled with. A hint says what to try
//! first; contents are compared before anything is shared.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::numbers::GlobalPage;

/// Hints that wait for the engine; further ones are dropped.
const QUEUED: usize = 1024;
/// Blocks are remembered for one in so many pages of all VMs.
const PAGES_PER_BLOCK: usize = 16;

/// What a device says: these pages now hold the blocks of a disk image from `block` on. Images are numbered by who
/// opens them, one number for each image of a group whatever the path; blocks are of 4 KiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hint {
    /// The pages.
    pub pages: Range<u32>,
    /// Number of the image.
    pub image: u32,
    /// The block in the first of the pages.
    pub block: u64,
}

impl Hint {
    /// Returns the hint about the first pages, so many at most, and the hint about the rest.
    pub(crate) fn split(self, most: u32) -> (Self, Option<Self>) {
        let middle = self.pages.start.saturating_add(most);
        if middle >= self.pages.end {
            return (self, None);
        }
        let rest =
            Self { pages: middle..self.pages.end, block: self.block.wrapping_add(most.into()), ..self };
        (Self { pages: self.pages.start..middle, ..self }, Some(rest))
    }
}

/// One VM's hints on their way to the engine. Giving one takes a short lock and never waits for the
/// engine.
#[derive(Debug, Default)]
pub struct Hints {
    queue: Mutex<VecDeque<Hint>>,
    dropped: AtomicU64,
}

impl Hints {
    /// Gives a hint. Returns whether it is the first that waits: the engine may be asleep then.
    pub fn give(&self, hint: Hint) -> bool {
        let mut queue = self.queue.lock();
        if queue.len() >= QUEUED {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        queue.push_back(hint);
        queue.len() == 1
    }

    /// Hints that were dropped because the engine did not come to them.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub(crate) fn take(&self) -> Option<Hint> {
        self.queue.lock().pop_front()
    }

    /// How many wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.lock().len()
    }

    /// A part of the hint that was taken last is left to be taken.
    pub(crate) fn put_back(&self, hint: Hint) {
        self.queue.lock().push_front(hint);
    }

    pub(crate) fn metadata_bytes(&self) -> usize {
        self.queue.lock().capacity() * size_of::<Hint>()
    }
}

/// Entries of a piece of the table.
const PIECE: usize = 256;

/// Which page was last said to hold a block: a table of fixed size, in which blocks take each other's
/// places. A piece of it takes memory once a block is in it: nobody waits for all of it to be made.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    pieces: Vec<Option<Piece>>,
    /// Pieces that take memory.
    made: usize,
}

type Piece = Box<[Option<Entry>; PIECE]>;

#[derive(Clone, Copy, Debug)]
struct Entry {
    block: u64,
    image: u32,
    global: GlobalPage,
}

impl Blocks {
    /// Makes room for VMs of this many pages in all; what is remembered is forgotten when the size
    /// changes.
    pub(crate) fn fit(&mut self, pages: u64) {
        let wanted = (pages as usize / PAGES_PER_BLOCK).div_ceil(PIECE).max(1);
        if self.pieces.len() != wanted {
            self.pieces = vec![None; wanted];
            self.made = 0;
        }
    }

    /// Remembers the page that holds a block. Returns the page that held it before, as far as known.
    pub(crate) fn replace(&mut self, image: u32, block: u64, global: GlobalPage) -> Option<GlobalPage> {
        let key = (block ^ u64::from(image) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let index = ((u128::from(key) * (self.pieces.len() * PIECE) as u128) >> 64) as usize;
        let piece = self.pieces.get_mut(index / PIECE)?;
        self.made += usize::from(piece.is_none());
        let entry = &mut piece.get_or_insert_with(|| Box::new([None; PIECE]))[index % PIECE];
        let before = entry.replace(Entry { block, image, global })?;
        (before.image == image && before.block == block && before.global != global).then_some(before.global)
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn bytes(&self) -> usize {
        self.pieces.capacity() * size_of::<Option<Piece>>() + self.made * size_of::<[Option<Entry>; PIECE]>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers::Number;

    fn at(number: u32) -> GlobalPage {
        GlobalPage::new(number)
    }

    #[test]
    fn a_block_is_remembered_where_it_was_last() {
        let mut blocks = Blocks::default();
        assert_eq!(blocks.replace(1, 7, at(3)), None, "there is no room");
        blocks.fit(16 * 512);
        assert_eq!(blocks.made, 0, "nothing is made in advance");
        assert_eq!(blocks.replace(1, 7, at(3)), None);
        assert_eq!(blocks.replace(1, 7, at(90)), Some(at(3)));
        assert_eq!(blocks.replace(1, 7, at(90)), None, "the same page");
        assert_eq!(blocks.replace(2, 7, at(5)), None, "another image");
        for block in 0..10_000 {
            blocks.replace(1, block, at(block as u32));
        }
        assert_eq!((blocks.pieces.len(), blocks.made), (2, 2));
        blocks.clear();
        assert_eq!((blocks.replace(1, 7, at(3)), blocks.bytes()), (None, 0));
    }

    #[test]
    fn a_hint_is_taken_up_in_parts() {
        let (first, rest) = Hint { pages: 10..20, image: 3, block: 100 }.split(4);
        assert_eq!(first, Hint { pages: 10..14, image: 3, block: 100 });
        assert_eq!(rest, Some(Hint { pages: 14..20, image: 3, block: 104 }));
        let whole = Hint { pages: 10..20, image: 3, block: 100 };
        assert_eq!(whole.clone().split(10), (whole, None));
    }

    #[test]
    fn hints_wait_in_order_and_do_not_pile_up() {
        let hints = Hints::default();
        let hint = |page| Hint { pages: page..page + 1, image: 1, block: 0 };
        assert!(hints.give(hint(0)) && !hints.give(hint(1)));
        (2..2000).for_each(|page| {
            hints.give(hint(page));
        });
        assert_eq!(hints.dropped(), 2000 - QUEUED as u64);
        assert_eq!(hints.take(), Some(hint(0)));
        assert_eq!(hints.take().map(|hint| hint.pages), Some(1..2));
    }
}
