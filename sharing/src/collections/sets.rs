//! Sets of pages: dense ones, a bit for each page, and rare ones.

use std::iter;
use std::ops::Range;

/// A set of a VM's pages, a bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// An empty set for this many pages.
    #[must_use]
    pub fn new(pages: u32) -> Self {
        Self { words: vec![0; (pages as usize).div_ceil(64)] }
    }

    /// The bits: page n is bit n % 64 of word n / 64.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The bits, to be changed. Bits beyond the last page stay 0.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Whether the page is in the set.
    #[must_use]
    pub fn contains(&self, page: u32) -> bool {
        self.words[page as usize / 64] & bit(page) != 0
    }

    /// Adds a page.
    pub fn insert(&mut self, page: u32) {
        self.words[page as usize / 64] |= bit(page);
    }

    /// Takes a page out; returns whether it was in.
    pub fn remove(&mut self, page: u32) -> bool {
        let word = &mut self.words[page as usize / 64];
        let was = *word & bit(page) != 0;
        *word &= !bit(page);
        was
    }

    /// Adds the pages of a range.
    pub fn insert_range(&mut self, pages: Range<u32>) {
        for (index, mask) in masks(&pages) {
            self.words[index] |= mask;
        }
    }

    /// Takes the pages of a range out.
    pub fn remove_range(&mut self, pages: Range<u32>) {
        for (index, mask) in masks(&pages) {
            self.words[index] &= !mask;
        }
    }

    /// Adds the pages of words of another set, which stand for pages from `64 * first_word` on.
    pub fn insert_words(&mut self, first_word: usize, words: &[u64]) {
        for (word, other) in self.words[first_word..].iter_mut().zip(words) {
            *word |= other;
        }
    }

    /// Takes the pages of some words of another set of the same size over.
    pub fn take_words(&mut self, words: Range<usize>, other: &mut Self) {
        for (word, other) in self.words[words.clone()].iter_mut().zip(&mut other.words[words]) {
            *word |= std::mem::take(other);
        }
    }

    /// Takes all pages out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Whether no page is in.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// How many pages are in.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// The first page at or after `from` that is in.
    #[must_use]
    pub fn next_from(&self, from: u32) -> Option<u32> {
        self.next_within(from..u32::MAX)
    }

    /// The first page of a range that is in. Looks at the range alone, so that who goes through a large set by the
    /// piece looks at each word once.
    #[must_use]
    pub fn next_within(&self, pages: Range<u32>) -> Option<u32> {
        let (first, end) = (pages.start as usize / 64, (pages.end as usize).div_ceil(64));
        let words = self.words.get(first..end.min(self.words.len()))?;
        let word = words.first()? & (u64::MAX << (pages.start % 64));
        let page = if word != 0 {
            (first * 64) as u32 + word.trailing_zeros()
        } else {
            let index = 1 + words[1..].iter().position(|&word| word != 0)?;
            ((first + index) * 64) as u32 + words[index].trailing_zeros()
        };
        (page < pages.end).then_some(page)
    }

    /// The pages in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| ones(index, word))
    }

    /// The runs of consecutive pages in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        self.runs_within(0..(self.words.len() * 64) as u32)
    }

    /// The runs of consecutive pages within a range, in order.
    pub fn runs_within(&self, pages: Range<u32>) -> impl Iterator<Item = Range<u32>> + '_ {
        let mut next = pages.start;
        std::iter::from_fn(move || {
            let start = self.next_within(next..pages.end)?;
            let end = self.end_of_run(start).min(pages.end);
            next = end;
            (start < end).then_some(start..end)
        })
    }

    fn end_of_run(&self, start: u32) -> u32 {
        let mut index = start as usize / 64;
        let mut gaps = !self.words[index] & (u64::MAX << (start % 64));
        loop {
            if gaps != 0 {
                return (index * 64) as u32 + gaps.trailing_zeros();
            }
            index += 1;
            match self.words.get(index) {
                Some(word) => gaps = !word,
                None => return (index * 64) as u32,
            }
        }
    }

    /// Bytes that the set takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.words.len() * size_of::<u64>()
    }
}

/// A set of a VM's pages that is empty most of the time, and takes no memory then.
#[derive(Clone, Debug)]
pub(crate) struct RareSet {
    pages: u32,
    set: Option<PageSet>,
}

impl RareSet {
    /// An empty set for this many pages.
    pub(crate) fn new(pages: u32) -> Self {
        Self { pages, set: None }
    }

    fn set(&mut self) -> &mut PageSet {
        self.set.get_or_insert_with(|| PageSet::new(self.pages))
    }

    pub(crate) fn contains(&self, page: u32) -> bool {
        self.set.as_ref().is_some_and(|set| set.contains(page))
    }

    pub(crate) fn insert(&mut self, page: u32) {
        self.set().insert(page);
    }

    pub(crate) fn remove(&mut self, page: u32) {
        if let Some(set) = &mut self.set {
            set.remove(page);
        }
    }

    pub(crate) fn remove_range(&mut self, pages: Range<u32>) {
        if let Some(set) = &mut self.set {
            set.remove_range(pages);
        }
    }

    /// Takes the place of another set, which is empty. Returns whether that changes anything.
    pub(crate) fn replace(&mut self, other: &mut PageSet) -> bool {
        let Some(set) = self.set.take() else { return false };
        *other = set;
        true
    }

    /// Moves the pages of some words of 64 to another set of the same size.
    pub(crate) fn move_words(&mut self, words: Range<usize>, other: &mut PageSet) {
        if let Some(set) = &mut self.set {
            other.take_words(words, set);
        }
    }

    pub(crate) fn clear(&mut self) {
        self.set = None;
    }

    pub(crate) fn count(&self) -> u32 {
        self.set.as_ref().map_or(0, PageSet::count)
    }

    pub(crate) fn next_from(&self, from: u32) -> Option<u32> {
        self.set.as_ref().filter(|_| from < self.pages)?.next_from(from)
    }

    pub(crate) fn runs_within(&self, pages: Range<u32>) -> impl Iterator<Item = Range<u32>> + '_ {
        self.set.iter().flat_map(move |set| set.runs_within(pages.clone()))
    }

    pub(crate) fn bytes(&self) -> usize {
        self.set.as_ref().map_or(0, PageSet::bytes)
    }
}

/// What is left of runs without the pages of other runs. Both are in order, and the runs of each are apart.
pub(crate) fn without<'a>(
    runs: &'a [Range<u32>],
    others: &'a [Range<u32>],
) -> impl Iterator<Item = Range<u32>> + 'a {
    runs.iter().flat_map(move |run| {
        let first = others.partition_point(|other| other.end <= run.start);
        let cuts = others[first..].iter().take_while(|other| other.start < run.end).cloned();
        let mut from = run.start;
        let pieces = cuts.chain(iter::once(run.end..run.end)).map(move |cut| {
            let piece = from..cut.start;
            from = cut.end;
            piece
        });
        pieces.filter(|piece| piece.start < piece.end)
    })
}

/// The pages of words that stand for pages from `64 * first_word` on, in order.
pub fn pages_of(first_word: usize, words: &[u64]) -> impl Iterator<Item = u32> + '_ {
    words.iter().enumerate().flat_map(move |(index, &word)| ones(first_word + index, word))
}

/// The pages that the bits of one word stand for.
pub(crate) fn ones(index: usize, mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        (word != 0).then(|| {
            let bit = word.trailing_zeros();
            word &= word - 1;
            (index * 64) as u32 + bit
        })
    })
}

fn bit(page: u32) -> u64 {
    1 << (page % 64)
}

/// The words that a range touches, and its bits in each.
fn masks(pages: &Range<u32>) -> impl Iterator<Item = (usize, u64)> + use<> {
    let (start, end) = (pages.start, pages.end.max(pages.start));
    (start / 64..end.div_ceil(64)).map(move |index| {
        let low = start.max(index * 64) - index * 64;
        let high = end.min(index * 64 + 64) - index * 64;
        let mask = if high - low == 64 { u64::MAX } else { ((1 << (high - low)) - 1) << low };
        (index as usize, mask)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_set_is_a_set(changes in prop::collection::vec((any::<bool>(), 0..300_u32, 0..140_u32), 0..20)) {
            let mut set = PageSet::new(300);
            let mut model = BTreeSet::new();
            for (insert, start, count) in changes {
                let range = start..(start + count).min(300);
                if insert {
                    set.insert_range(range.clone());
                    model.extend(range);
                } else {
                    set.remove_range(range.clone());
                    model.retain(|page| !range.contains(page));
                }
            }
            prop_assert!(set.iter().eq(model.iter().copied()));
            prop_assert!(set.runs().flatten().eq(model.iter().copied()));
            prop_assert!(set.runs().zip(set.runs().skip(1)).all(|(one, next)| one.end < next.start));
            prop_assert!(set.runs_within(70..200).flatten().eq(model.range(70..200).copied()));
            prop_assert_eq!(set.count() as usize, model.len());
            for from in [0, 63, 64, 150, 299] {
                prop_assert_eq!(set.next_from(from), model.range(from..).next().copied());
                for end in [from, from + 1, from + 63, from + 64, from + 65, u32::MAX] {
                    prop_assert_eq!(set.next_within(from..end), model.range(from..end).next().copied());
                }
            }
        }
    }

    proptest! {
        #[test]
        fn runs_without_others_are_what_is_left(
            one in prop::collection::btree_set(0..60_u32, 0..50),
            other in prop::collection::btree_set(0..60_u32, 0..50),
        ) {
            let runs = |pages: &BTreeSet<u32>| {
                let mut set = PageSet::new(60);
                pages.iter().for_each(|&page| set.insert(page));
                set.runs().collect::<Vec<_>>()
            };
            let (ones, others) = (runs(&one), runs(&other));
            let left: Vec<_> = without(&ones, &others).collect();
            prop_assert!(left.iter().all(|run| run.start < run.end));
            prop_assert!(left.into_iter().flatten().eq(one.difference(&other).copied()));
        }
    }

    #[test]
    fn a_rare_set_takes_memory_only_while_it_holds_pages() {
        let mut set = RareSet::new(200);
        assert!(!set.contains(7) && set.next_from(0).is_none() && set.runs_within(0..200).next().is_none());
        set.remove(7);
        set.remove_range(0..200);
        assert_eq!(set.bytes(), 0);
        (5..9).for_each(|page| set.insert(page));
        set.remove(6);
        assert!(set.runs_within(0..200).eq([5..6, 7..9]));
        assert_eq!((set.count(), set.next_from(6), set.next_from(200)), (3, Some(7), None));
        let mut all = PageSet::new(200);
        set.insert(150);
        set.move_words(1..4, &mut all);
        assert!(all.iter().eq([150]) && set.count() == 3);
        all.clear();
        assert!(set.replace(&mut all) && !set.replace(&mut all));
        assert_eq!((set.bytes(), all.count()), (0, 3));
    }

    #[test]
    fn a_run_to_the_end_ends() {
        let mut set = PageSet::new(128);
        set.insert_range(60..128);
        assert!(set.runs().eq(std::iter::once(60..128)));
        assert_eq!(set.next_from(128), None);
        assert!(set.remove(127) && !set.remove(127) && set.contains(126));
    }
}
