use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// Digests of which some are equal, and some are close to each other and to the end.
fn digest() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), 0..4_u32, (u32::MAX - 3)..=u32::MAX]
}

fn number(key: u32) -> u32 {
    key.wrapping_mul(0x9e37_79b9)
}

/// All entries, which are where they are looked for.
fn entries<const SIZE: usize>(table: &Table<SIZE>) -> BTreeSet<(u32, u32)> {
    let mut all = BTreeSet::new();
    let mut places = 0;
    for (at, segment) in table.segments.iter().enumerate() {
        assert_eq!(segment.entries().count(), segment.used);
        assert!(segment.places.is_empty() || segment.used < segment.places.len(), "a search would not end");
        places += segment.places.len();
        for entry in segment.entries() {
            assert_eq!(table.segment(entry.digest), at);
            assert!(all.insert((entry.digest, entry.key)));
        }
    }
    assert_eq!((all.len(), places), (table.used, table.places));
    all
}

proptest! {
    #[test]
    fn a_table_is_a_set(changes in prop::collection::vec((0..3_u8, digest(), 0..30_u32), 0..400)) {
        let mut table = Table::<6>::default();
        let mut model = BTreeSet::new();
        for (change, digest, key) in changes {
            match change {
                0 => {
                    table.remove(digest, key);
                    model.remove(&(digest, key));
                }
                1 if model.iter().nth(key as usize).is_some() => {
                    let &(digest, key) = model.iter().nth(key as usize).expect("it is there");
                    table.remove(digest, key);
                    model.remove(&(digest, key));
                }
                _ if model.insert((digest, key)) => table.insert(digest, key),
                _ => {}
            }
            prop_assert_eq!(entries(&table), model.clone());
        }
        for &(digest, key) in &model {
            prop_assert_eq!(table.find(digest, |found| found == key), Some(key));
        }
        while let Some((digest, key)) = model.pop_first() {
            table.remove(digest, key);
            let other = digest.wrapping_add(1);
            let known = model.iter().any(|&(digest, _)| digest == other);
            prop_assert_eq!(table.find(other, |_| true).is_some(), known);
        }
        prop_assert_eq!(table.bytes(), 0);
    }

    #[test]
    fn no_digest_has_more_entries_than_allowed(keys in prop::collection::vec(0..5_u32, 0..200)) {
        let mut table = Table::<6>::default();
        let mut counts = [0; 5];
        for (key, digest) in (0..).zip(keys) {
            let few = counts[digest as usize] < 3;
            prop_assert_eq!(table.insert_few(digest, key, 3), few);
            counts[digest as usize] += usize::from(few);
        }
        prop_assert_eq!(entries(&table).len(), counts.iter().sum::<usize>());
    }
}

#[test]
fn an_entry_takes_little_more_than_its_eight_bytes() {
    let mut table: Table = Table::default();
    let mut most = 0.0_f64;
    for key in 0..200_000_u32 {
        table.insert(number(key), key);
        if key > 10_000 {
            most = most.max(table.bytes() as f64 / f64::from(key + 1));
        }
    }
    assert!(most <= 9.6, "{most} bytes");
    most = 0.0;
    for key in 0..190_000_u32 {
        table.remove(number(key), key);
        most = most.max(table.bytes() as f64 / f64::from(200_000 - key));
    }
    assert!(most <= 10.5, "{most} bytes");
}

#[test]
fn no_change_moves_more_than_some_entries_however_many_there_are() {
    let mut table: Table = Table::default();
    let (mut most, mut before) = (0, 0);
    let mut look = |table: &Table| {
        most = most.max(table.moved - before);
        before = table.moved;
    };
    const KEYS: u32 = 1 << 20;
    for key in 0..KEYS {
        table.insert(number(key), key);
        look(&table);
    }
    // Some leave and come back, in all of them.
    for key in 0..KEYS / 2 {
        table.remove(number(key), key);
        look(&table);
        if key % 3 == 0 {
            table.insert(number(key), key);
            look(&table);
        }
    }
    let all = table.moved;
    for key in 0..KEYS {
        table.remove(number(key), key);
        if table.used > 0 {
            look(&table);
        }
    }
    assert!(most <= 4 * SEGMENT, "{most} entries at once");
    // What all of it costs stays in proportion, too.
    assert!(all / (KEYS as usize * 2) < 40, "{all} entries in all");
    assert_eq!(table.bytes(), 0);
}

#[test]
fn entries_that_come_and_go_do_not_have_the_table_grow_and_shrink() {
    let mut table: Table = Table::default();
    for key in 0..100_000 {
        table.insert(number(key), key);
    }
    let before = table.moved;
    for round in 0..100_000 {
        table.remove(number(round), round);
        table.insert(number(100_000 + round), 100_000 + round);
    }
    let moved = table.moved - before;
    assert!(moved < 100_000 * 30, "{moved} entries");
}
