//! Where content is looked up: frames (the *stable* index), and pages of all VMs that were scanned
//! and are not shared (the *unstable* index). An entry says only what to compare with.
//!
//! Two orders behind one interface. Under the keyed digest both indexes are hash tables, and a search
//! takes a probe or two whatever the number of entries. By content they are search trees, as KSM's are:
//! every step compares two pages.

#![expect(unsafe_code, reason = "compares frames by address")]

pub(crate) mod table;
mod tree;

use std::cmp;

use crate::frames::store::{Frame, FrameStore};
use crate::memory::content::{self, Page, Snapshot};
use crate::numbers::{Digest, GlobalPage, Number};
use table::Table;
use tree::Tree;

/// In what order the indexes keep what they look up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// By the keyed digest of the content, then by content.
    #[default]
    Digest,
    /// By content, as KSM's trees are: to compare with.
    Content,
}

/// What is looked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) page: &'a Page,
    pub(crate) digest: Digest,
}

/// What searches cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Effort {
    /// Entries that were visited; a look-up in a hash table is one at least.
    pub(crate) steps: u64,
    /// Pages that were compared.
    pub(crate) comparisons: u64,
}

/// Frames and pages: what an entry stands for.
pub(crate) trait Contents {
    /// What entries are numbers of.
    type Entry: Number;

    /// Returns the entry's content.
    fn read(&self, entry: Self::Entry) -> Box<Snapshot>;
    /// Compares a content with the entry's.
    fn order(&self, content: &Page, entry: Self::Entry) -> cmp::Ordering;
    /// Whether a content is the entry's, which has its digest, as far as is known without much effort.
    fn is_alike(&self, content: &Page, entry: Self::Entry) -> bool {
        self.order(content, entry).is_eq()
    }
    /// The digest under which it was entered.
    fn digest(&self, entry: Self::Entry) -> Digest;
    /// Whether what is read there is its content: not once its memory was lost.
    fn readable(&self, entry: Self::Entry) -> bool;
    /// Whether it is to be shared: a VM whose mode has changed leaves the indexes page by page.
    fn shares(&self, entry: Self::Entry) -> bool;
}

impl Contents for FrameStore {
    type Entry = Frame;

    fn read(&self, entry: Frame) -> Box<Snapshot> {
        // SAFETY: entries are filled, and mapped.
        Box::new(unsafe { Snapshot::take(self.content(entry)) })
    }

    fn order(&self, content: &Page, entry: Frame) -> cmp::Ordering {
        // SAFETY: as above.
        unsafe { content::order(content.as_ptr(), self.content(entry)) }
    }

    fn digest(&self, entry: Frame) -> Digest {
        FrameStore::digest(self, entry)
    }

    fn readable(&self, _: Frame) -> bool {
        !self.lost()
    }

    fn shares(&self, _: Frame) -> bool {
        true
    }
}

/// Entries with equal digests beyond these are left out. A guest can fill its memory with one content, or change
/// its pages before the engine hears of it; without a bound each of these entries would be in the way of all others.
const MOST_EQUAL: usize = 4;

/// Entries in one of the orders.
#[derive(Debug)]
enum Index {
    Digest(Table),
    Content(Tree),
}

impl Index {
    fn new(order: Order) -> Self {
        match order {
            Order::Digest => Self::Digest(Table::default()),
            Order::Content => Self::Content(Tree::default()),
        }
    }

    /// Returns whether the entry is there now.
    fn insert<C: Contents>(&mut self, entry: C::Entry, contents: &C) -> bool {
        match self {
            Self::Digest(table) => {
                table.insert_few(contents.digest(entry).number(), entry.number(), MOST_EQUAL)
            }
            Self::Content(tree) => {
                let content = contents.read(entry);
                tree.insert(entry.number(), |other| {
                    let other = C::Entry::new(other);
                    if contents.readable(other) {
                        contents.order(&content, other)
                    } else {
                        cmp::Ordering::Less
                    }
                });
                true
            }
        }
    }

    fn remove(&mut self, entry: impl Number, digest: Digest) {
        match self {
            Self::Digest(table) => table.remove(digest.number(), entry.number()),
            Self::Content(tree) => tree.remove(entry.number()),
        }
    }

    fn find<C: Contents>(
        &self,
        wanted: Wanted<'_>,
        besides: Option<C::Entry>,
        contents: &C,
        effort: &mut Effort,
    ) -> Option<C::Entry> {
        let found = match self {
            Self::Digest(table) => {
                effort.steps += 1;
                table.find(wanted.digest.number(), |entry| {
                    let entry = C::Entry::new(entry);
                    besides != Some(entry) && contents.readable(entry) && contents.shares(entry) && {
                        effort.comparisons += 1;
                        contents.is_alike(wanted.page, entry)
                    }
                })
            }
            Self::Content(tree) => tree.find(|entry| {
                let entry = C::Entry::new(entry);
                effort.steps += 1;
                if !contents.readable(entry) {
                    return cmp::Ordering::Less;
                }
                effort.comparisons += 1;
                match contents.order(wanted.page, entry) {
                    cmp::Ordering::Equal if besides == Some(entry) || !contents.shares(entry) => {
                        cmp::Ordering::Less
                    }
                    order => order,
                }
            }),
        };
        found.map(C::Entry::new)
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Digest(table) => table.bytes(),
            Self::Content(tree) => tree.bytes(),
        }
    }
}

/// The stable index.
#[derive(Debug)]
pub(crate) struct FrameIndex(Index);

impl FrameIndex {
    pub(crate) fn new(order: Order) -> Self {
        Self(Index::new(order))
    }

    /// Enters a live frame, whose digest the store knows, unless there are enough of its content.
    pub(crate) fn insert(&mut self, frame: Frame, store: &mut FrameStore) {
        if !store.set_indexed(frame, true) && !self.0.insert(frame, store) {
            store.set_indexed(frame, false);
        }
    }

    /// Takes a frame out, if it is there.
    pub(crate) fn remove(&mut self, frame: Frame, store: &mut FrameStore) {
        if store.set_indexed(frame, false) {
            self.0.remove(frame, store.digest(frame));
        }
    }

    /// A frame of this content, as far as is known without protection.
    pub(crate) fn find(&self, wanted: Wanted<'_>, store: &FrameStore, effort: &mut Effort) -> Option<Frame> {
        self.0.find(wanted, None, store, effort)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

/// The unstable index. A page is taken out when it is known to have changed.
#[derive(Debug)]
pub(crate) struct PageIndex(Index);

impl PageIndex {
    pub(crate) fn new(order: Order) -> Self {
        Self(Index::new(order))
    }

    /// Enters a page under the digest that is noted of it, unless there are enough of its content. Returns whether
    /// it was entered.
    pub(crate) fn insert(&mut self, global: GlobalPage, pages: &impl Contents<Entry = GlobalPage>) -> bool {
        self.0.insert(global, pages)
    }

    /// Takes a page out that was entered under this digest.
    pub(crate) fn remove(&mut self, global: GlobalPage, digest: Digest) {
        self.0.remove(global, digest);
    }

    /// Another page of this content, as far as is known without protection.
    pub(crate) fn find(
        &self,
        wanted: Wanted<'_>,
        itself: GlobalPage,
        pages: &impl Contents<Entry = GlobalPage>,
        effort: &mut Effort,
    ) -> Option<GlobalPage> {
        self.0.find(wanted, Some(itself), pages, effort)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes()
    }
}
