//! Which frame holds which disk block: *names* of frames. A frame may hold several blocks of the same
//! content, and most frames hold none.
//!
//! A name is given only to bytes that the host itself read from the disk, or that have their digest. It
//! goes with the first write to the block.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::replace::History;
use crate::collections::segments::tree_bytes;
use crate::frames::store::Frame;

/// Blocks of one content beyond these get frames of their own: what is done to a frame is done for each
/// of its names.
const MOST_NAMES: usize = 16;

/// A block of an image, by the engine's number of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct BlockKey {
    /// The engine's number of the image.
    pub(crate) image: u32,
    /// Number of the block in the image.
    pub(crate) block: u32,
}

/// How long the host keeps a block that a guest has read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Keep {
    /// While no guest holds it.
    #[default]
    Exclusive,
    /// Until the engine finds a guest that holds it.
    Scrub,
    /// Whoever holds it.
    Inclusive,
}

/// What is known of a frame that holds blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeldBlock {
    /// The block under which it is in the order of eviction.
    pub(crate) key: BlockKey,
    pub(crate) keep: Keep,
    pub(crate) history: History,
}

/// All names, in order: trees grow in small steps, and find the blocks of a range.
#[derive(Debug, Default)]
pub(crate) struct BlockIndex {
    /// The frame of a block, and the next block with the same frame.
    blocks: BTreeMap<BlockKey, (Frame, Option<BlockKey>)>,
    frames: BTreeMap<Frame, HeldBlock>,
}

impl BlockIndex {
    /// The frame that holds a block.
    pub(crate) fn frame(&self, key: BlockKey) -> Option<Frame> {
        self.blocks.get(&key).map(|&(frame, _)| frame)
    }

    /// What is known of a frame, if it has a name.
    pub(crate) fn of(&self, frame: Frame) -> Option<&HeldBlock> {
        self.frames.get(&frame)
    }

    pub(crate) fn of_mut(&mut self, frame: Frame) -> Option<&mut HeldBlock> {
        self.frames.get_mut(&frame)
    }

    /// Gives a frame its first name, or one more. Returns whether it has it: a frame may have too many.
    /// The block must be on no frame.
    pub(crate) fn add(&mut self, frame: Frame, named: HeldBlock) -> bool {
        debug_assert!(!self.blocks.contains_key(&named.key));
        match self.frames.entry(frame) {
            Entry::Vacant(entry) => {
                entry.insert(named);
                self.blocks.insert(named.key, (frame, None));
                true
            }
            Entry::Occupied(entry) => {
                let head = entry.get().key;
                if self.chain(head).count() >= MOST_NAMES {
                    return false;
                }
                if let Some((_, next)) = self.blocks.get_mut(&head) {
                    let second = next.replace(named.key);
                    self.blocks.insert(named.key, (frame, second));
                }
                true
            }
        }
    }

    /// Takes a name away. Returns the frame that had it and, if it was the name under which the frame is
    /// ordered, what is known of the frame under that name and under its next, if it has any left.
    pub(crate) fn remove(&mut self, key: BlockKey) -> Option<Removed> {
        let (frame, next) = self.blocks.remove(&key)?;
        let named = self.frames.get_mut(&frame)?;
        if named.key == key {
            let was = *named;
            match next {
                Some(next) => named.key = next,
                None => {
                    self.frames.remove(&frame);
                }
            }
            return Some(Removed { frame, was, next });
        }
        let (was, head) = (*named, named.key);
        let before =
            self.chain(head).find(|before| self.blocks.get(before).is_some_and(|b| b.1 == Some(key)));
        if let Some((_, link)) = before.and_then(|before| self.blocks.get_mut(&before)) {
            *link = next;
        }
        Some(Removed { frame, was: HeldBlock { key, ..was }, next: Some(head) })
    }

    /// Takes all names of a frame away.
    pub(crate) fn remove_frame(&mut self, frame: Frame) -> Option<HeldBlock> {
        let named = self.frames.remove(&frame)?;
        let keys: Vec<_> = self.chain(named.key).collect();
        keys.into_iter().for_each(|key| {
            self.blocks.remove(&key);
        });
        Some(named)
    }

    /// The names of one frame are another's from now on, which has none.
    pub(crate) fn move_frame(&mut self, from: Frame, to: Frame) {
        let Some(named) = self.frames.remove(&from) else { return };
        let keys: Vec<_> = self.chain(named.key).collect();
        for key in keys {
            if let Some((frame, _)) = self.blocks.get_mut(&key) {
                *frame = to;
            }
        }
        self.frames.insert(to, named);
    }

    fn chain(&self, head: BlockKey) -> impl Iterator<Item = BlockKey> + '_ {
        std::iter::successors(Some(head), |key| self.blocks.get(key).and_then(|&(_, next)| next))
    }

    /// Frames with names.
    pub(crate) fn frames(&self) -> usize {
        self.frames.len()
    }

    /// The first block of an image that is on a frame, among these.
    pub(crate) fn first_within(&self, image: u32, blocks: Range<u32>) -> Option<BlockKey> {
        let key = |block: u32| BlockKey { image, block };
        let range = (!blocks.is_empty()).then(|| self.blocks.range(key(blocks.start)..key(blocks.end)))?;
        range.map(|(&key, _)| key).next()
    }

    pub(crate) fn bytes(&self) -> usize {
        tree_bytes(&self.blocks) + tree_bytes(&self.frames)
    }
}

/// A name that was taken away.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Removed {
    pub(crate) frame: Frame,
    /// What was known of the frame, under the name taken away.
    pub(crate) was: HeldBlock,
    /// A name that it still has.
    pub(crate) next: Option<BlockKey>,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn key(block: u32) -> BlockKey {
        BlockKey { image: 1, block }
    }

    fn named(block: u32) -> HeldBlock {
        HeldBlock { key: key(block), keep: Keep::Exclusive, history: History::NONE }
    }

    fn at(number: u32) -> Frame {
        Frame::new(number)
    }

    #[test]
    fn a_frame_has_so_many_names_at_most() {
        let mut names = BlockIndex::default();
        assert!((0..MOST_NAMES as u32).all(|block| names.add(at(9), named(block))));
        assert!(!names.add(at(9), named(99)));
        assert_eq!(names.frame(key(99)), None);
        names.move_frame(at(9), at(4));
        assert!((0..MOST_NAMES as u32).all(|block| names.frame(key(block)) == Some(at(4))));
        assert_eq!(names.first_within(1, 3..7), Some(key(3)));
        assert_eq!(names.first_within(1, MOST_NAMES as u32..u32::MAX), None);
        assert_eq!((names.first_within(1, 3..3), names.first_within(2, 0..u32::MAX)), (None, None));
        assert!(names.remove_frame(at(4)).is_some());
        assert_eq!((names.frames(), names.blocks.len()), (0, 0));
    }

    proptest! {
        #[test]
        fn names_agree_with_a_model(changes in prop::collection::vec((0..4_u8, 0..12_u32, 0..5_u32), 0..200)) {
            let mut names = BlockIndex::default();
            let mut model: BTreeMap<u32, Frame> = BTreeMap::new();
            for (change, block, frame) in changes {
                let frame = at(frame);
                match change {
                    0 | 1 if !model.contains_key(&block) => {
                        prop_assert!(names.add(frame, named(block)));
                        model.insert(block, frame);
                    }
                    2 => {
                        let removed = names.remove(key(block));
                        let was = model.remove(&block);
                        prop_assert_eq!(removed.map(|removed| removed.frame), was);
                        if let Some(Removed { frame, next, .. }) = removed {
                            let left = model.values().any(|&other| other == frame);
                            prop_assert_eq!(next.is_some(), left);
                            prop_assert!(next.is_none_or(|next| names.of(frame).is_some_and(|n| n.key == next)));
                        }
                    }
                    3 => {
                        names.remove_frame(frame);
                        model.retain(|_, other| *other != frame);
                    }
                    _ => {}
                }
                for block in 0..12 {
                    prop_assert_eq!(names.frame(key(block)), model.get(&block).copied());
                }
                for frame in at(0).run(5) {
                    let head = names.of(frame).map(|named| names.frame(named.key));
                    prop_assert_eq!(head, model.values().any(|&other| other == frame).then_some(Some(frame)));
                }
            }
        }
    }
}
