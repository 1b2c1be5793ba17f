//! Tables that grow and shrink in small steps: a table is many small *segments*, of which one at a time is
//! split in two, or joined with the one that was split off it. So no single change has to go over all entries.
//!
//! This is linear hashing (Litwin, "Linear hashing: a new tool for file and table addressing", 1980). With `n`
//! segments, and `p` the greatest power of two that is at most `n`, the first `n - p` segments have been split:
//! they and the segments beyond `p` are told apart by one bit of the hash more than the others.

use std::collections::BTreeMap;

/// Entries of a segment that is about to be split, on average: a split takes some microseconds.
pub(crate) const SEGMENT: usize = 512;

/// The segment of a hash, of `count` segments.
pub(crate) fn segment_of(hash: u64, count: usize) -> usize {
    debug_assert!(count > 0);
    let split = 1_u64 << count.ilog2();
    let longer = hash & (2 * split - 1);
    if longer < count as u64 { longer as usize } else { (hash & (split - 1)) as usize }
}

/// The segment that number `last` was split off, or is to be.
pub(crate) fn split_off(last: usize) -> usize {
    debug_assert!(last > 0);
    last - (1 << last.ilog2())
}

/// Whether so many entries are too many for `count` segments that are split at `size` entries on average.
pub(crate) fn crowded(entries: usize, count: usize, size: usize) -> bool {
    entries > count * size
}

/// Whether so many entries are few enough to be in one segment less.
pub(crate) fn deserted(entries: usize, count: usize, size: usize) -> bool {
    count > 1 && entries < (count - 1) * size / 2
}

/// Bytes that a balanced tree takes, about: its leaves are two thirds full.
pub(crate) fn tree_bytes<K, V>(tree: &BTreeMap<K, V>) -> usize {
    tree.len() * (size_of::<K>() + size_of::<V>()) * 3 / 2
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn one_more_segment_takes_entries_of_one_other_alone(hash in any::<u64>(), last in 1..5000_usize) {
            let (before, after) = (segment_of(hash, last), segment_of(hash, last + 1));
            prop_assert!(before < last);
            prop_assert!(after == before || (after == last && before == split_off(last)));
        }
    }

    #[test]
    fn a_split_segment_is_not_joined_again_at_once() {
        for count in 1..2000 {
            let entries = count * SEGMENT + 1;
            assert!(crowded(entries, count, SEGMENT) && !deserted(entries, count + 1, SEGMENT));
        }
    }
}
