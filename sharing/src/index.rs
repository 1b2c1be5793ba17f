//! Where content is looked up: frames by digest, and pages that were found unique by digest.
//!
//! Both are hash tables under the keyed digest, so a look-up takes one probe or two whatever the
//! number of entries. An entry says only what to compare with.

use hashbrown::HashTable;

use crate::members::{Members, Place};
use crate::store::{Frame, FrameStore};

/// Frames by the digest of their content: the stable index.
#[derive(Debug, Default)]
pub(crate) struct FrameIndex(HashTable<Frame>);

impl FrameIndex {
    pub(crate) fn insert(&mut self, frame: Frame, store: &FrameStore) {
        self.0.insert_unique(hash(store.digest(frame)), frame, |&other| hash(store.digest(other)));
    }

    pub(crate) fn remove(&mut self, frame: Frame, store: &FrameStore) {
        if let Ok(entry) = self.0.find_entry(hash(store.digest(frame)), |&other| other == frame) {
            entry.remove();
        }
    }

    /// A frame of this digest for which `same` holds.
    pub(crate) fn find(
        &self,
        digest: u32,
        store: &FrameStore,
        mut same: impl FnMut(Frame) -> bool,
    ) -> Option<Frame> {
        self.0.find(hash(digest), |&frame| store.digest(frame) == digest && same(frame)).copied()
    }

    pub(crate) fn shrink(&mut self, store: &FrameStore) {
        self.0.shrink_to_fit(|&frame| hash(store.digest(frame)));
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.allocation_size()
    }
}

/// Pages that are not shared, by the digest of their content when they were looked at: the unstable
/// index. A page is taken out when it is known to have changed.
#[derive(Debug, Default)]
pub(crate) struct PageIndex(HashTable<Place>);

impl PageIndex {
    pub(crate) fn insert(&mut self, place: Place, members: &Members) {
        self.0.insert_unique(hash(members.digest(place)), place, |&other| hash(members.digest(other)));
    }

    /// Takes a page out that was entered under this digest.
    pub(crate) fn remove(&mut self, place: Place, digest: u32) {
        if let Ok(entry) = self.0.find_entry(hash(digest), |&other| other == place) {
            entry.remove();
        }
    }

    /// A page of this digest for which `same` holds.
    pub(crate) fn find(
        &self,
        digest: u32,
        members: &Members,
        mut same: impl FnMut(Place) -> bool,
    ) -> Option<Place> {
        self.0.find(hash(digest), |&place| members.digest(place) == digest && same(place)).copied()
    }

    pub(crate) fn shrink(&mut self, members: &Members) {
        self.0.shrink_to_fit(|&place| hash(members.digest(place)));
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.allocation_size()
    }
}

/// Spreads a digest over the 64 bits that the tables use.
fn hash(digest: u32) -> u64 {
    u64::from(digest).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
