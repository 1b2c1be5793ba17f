//! Which guest page a block was copied to, and what the host's own bytes looked like. The page is the
//! guest's: it may hold anything by now, and counts as the block only where its content has the digest.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::ops::Range;

use super::block_index::BlockKey;
use super::replace::History;
use crate::collections::segments::tree_bytes;
use crate::memory::content::Page;
use crate::numbers::GlobalPage;

/// A digest that nobody who lacks the key can find a second content for: keyed BLAKE3, cut to 128 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Proof([u8; 16]);

/// Makes proofs under a random key of its own.
pub(crate) struct Prover {
    key: [u8; blake3::KEY_LEN],
}

impl Prover {
    pub(crate) fn new() -> io::Result<Self> {
        let mut key = [0; blake3::KEY_LEN];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut key)?;
        Ok(Self { key })
    }

    pub(crate) fn proof(&self, page: &Page) -> Proof {
        let hash = blake3::keyed_hash(&self.key, page);
        let mut proof = [0; 16];
        proof.copy_from_slice(&hash.as_bytes()[..16]);
        Proof(proof)
    }
}

impl std::fmt::Debug for Prover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prover").finish_non_exhaustive()
    }
}

/// Pages beyond these that one block was copied to are not noted.
const MOST_PAGES: usize = 64;

/// What was copied to a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyRecord {
    pub(crate) key: BlockKey,
    pub(crate) proof: Proof,
    pub(crate) history: History,
}

/// The notes of all VMs, by global, in order: trees grow in small steps, and find the blocks of a range.
#[derive(Debug, Default)]
pub(crate) struct CopyRecords {
    /// Each with the next page that the same block was copied to.
    pages: BTreeMap<GlobalPage, (CopyRecord, Option<GlobalPage>)>,
    /// The last page that each block was copied to.
    holders: BTreeMap<BlockKey, GlobalPage>,
}

impl CopyRecords {
    pub(crate) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Notes that a block was copied to a page. Where it was copied to too many pages this one is not
    /// noted.
    pub(crate) fn insert(&mut self, global: GlobalPage, record: CopyRecord) {
        self.remove(global);
        let head = self.holders.get(&record.key).copied();
        if self.chain(head).count() < MOST_PAGES {
            self.pages.insert(global, (record, head));
            self.holders.insert(record.key, global);
        }
    }

    /// What was copied to a page.
    pub(crate) fn get(&self, global: GlobalPage) -> Option<&CopyRecord> {
        self.pages.get(&global).map(|(record, _)| record)
    }

    /// The page that a block was last copied to.
    pub(crate) fn holder(&self, key: BlockKey) -> Option<(GlobalPage, CopyRecord)> {
        let global = *self.holders.get(&key)?;
        self.get(global).map(|&record| (global, record))
    }

    /// The page is about to hold something else, or does.
    pub(crate) fn remove(&mut self, global: GlobalPage) -> Option<CopyRecord> {
        let (record, next) = self.pages.remove(&global)?;
        let head = self.holders.get(&record.key).copied();
        if head == Some(global) {
            match next {
                Some(next) => self.holders.insert(record.key, next),
                None => self.holders.remove(&record.key),
            };
            return Some(record);
        }
        let before =
            self.chain(head).find(|before| self.pages.get(before).is_some_and(|b| b.1 == Some(global)));
        if let Some((_, link)) = before.and_then(|before| self.pages.get_mut(&before)) {
            *link = next;
        }
        Some(record)
    }

    fn chain(&self, head: Option<GlobalPage>) -> impl Iterator<Item = GlobalPage> + '_ {
        std::iter::successors(head, |global| self.pages.get(global).and_then(|&(_, next)| next))
    }

    /// The first block of an image that was copied to a page, among these.
    pub(crate) fn first_within(&self, image: u32, blocks: Range<u32>) -> Option<BlockKey> {
        let key = |block: u32| BlockKey { image, block };
        let range = (!blocks.is_empty()).then(|| self.holders.range(key(blocks.start)..key(blocks.end)))?;
        range.map(|(&key, _)| key).next()
    }

    /// A block is not what it was: no page is known for it.
    pub(crate) fn forget_block(&mut self, key: BlockKey) {
        let head = self.holders.remove(&key);
        let pages: Vec<_> = self.chain(head).collect();
        pages.into_iter().for_each(|global| {
            self.pages.remove(&global);
        });
    }

    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        tree_bytes(&self.pages) + tree_bytes(&self.holders)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::numbers::Number;

    fn key(block: u32) -> BlockKey {
        BlockKey { image: 3, block }
    }

    fn note(block: u32) -> CopyRecord {
        CopyRecord { key: key(block), proof: Proof([block as u8; 16]), history: History::NONE }
    }

    #[test]
    fn proofs_differ_by_content_and_by_key() {
        let (one, other) = (Prover::new().unwrap(), Prover::new().unwrap());
        let (zeros, mut page) = ([0; 4096], [0; 4096]);
        page[4095] = 1;
        assert_eq!(one.proof(&zeros), one.proof(&[0; 4096]));
        assert_ne!(one.proof(&zeros), one.proof(&page));
        assert_ne!(one.proof(&zeros), other.proof(&zeros));
    }

    fn at(number: u32) -> GlobalPage {
        GlobalPage::new(number)
    }

    #[test]
    fn a_block_that_is_copied_all_over_is_noted_for_some_pages_only() {
        let mut copies = CopyRecords::default();
        (0..1000).for_each(|global| copies.insert(at(global), note(5)));
        assert_eq!(copies.len(), MOST_PAGES);
        assert_eq!(copies.first_within(3, 0..9), Some(key(5)));
        assert_eq!((copies.first_within(3, 6..9), copies.first_within(4, 0..9)), (None, None));
        copies.forget_block(key(5));
        assert!(copies.is_empty() && copies.holders.is_empty());
    }

    proptest! {
        #[test]
        fn no_note_outlives_its_block(changes in prop::collection::vec((0..5_u8, 0..20_u32, 0..6_u32), 0..200)) {
            let mut copies = CopyRecords::default();
            let mut model: BTreeMap<GlobalPage, u32> = BTreeMap::new();
            for (change, global, block) in changes {
                match change {
                    0 | 1 => {
                        copies.insert(at(global), note(block));
                        model.insert(at(global), block);
                    }
                    2 => {
                        let removed = copies.remove(at(global)).map(|record| record.key.block);
                        prop_assert_eq!(removed, model.remove(&at(global)));
                    }
                    3 => {
                        let end = block + global % 3;
                        while let Some(key) = copies.first_within(3, block..end) {
                            copies.forget_block(key);
                        }
                        model.retain(|_, other| !(block..end).contains(other));
                    }
                    _ => {
                        for global in global..global + block {
                            copies.remove(at(global));
                        }
                        model.retain(|other, _| !(at(global)..at(global + block)).contains(other));
                    }
                }
                for global in 0..20 {
                    prop_assert_eq!(copies.get(at(global)).map(|record| record.key.block), model.get(&at(global)).copied());
                }
                for block in 0..6 {
                    let holder = copies.holder(key(block)).map(|(global, _)| global);
                    let known = model.values().any(|&other| other == block);
                    prop_assert_eq!(holder.is_some(), known);
                    prop_assert!(holder.is_none_or(|global| model[&global] == block));
                }
            }
        }
    }
}
