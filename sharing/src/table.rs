//! A hash table of numbers under digests, for indexes with as many entries as there are pages: it is
//! never less than five sixths full, so that an entry takes 9.6 bytes at most.
//!
//! Linear probing over places in the order of digests, which are as good as random. It grows by a
//! sixteenth, from the front of memory to its end, since entries keep their order.

/// An entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    digest: u32,
    key: u32,
}

/// No entry. No page and no frame has this number.
const NONE: Entry = Entry { digest: 0, key: u32::MAX };

/// The table.
#[derive(Debug, Default)]
pub(crate) struct Table {
    places: Vec<Entry>,
    used: usize,
}

impl Table {
    /// Adds a number that is not in the table.
    pub(crate) fn insert(&mut self, digest: u32, key: u32) {
        debug_assert_ne!(key, NONE.key);
        // Nine tenths full.
        if (self.used + 1) * 10 > self.places.len() * 9 {
            self.resize(self.places.len() + self.places.len() / 16 + 16);
        }
        self.put(Entry { digest, key });
    }

    /// Takes a number out that was entered under this digest, if it is there.
    pub(crate) fn remove(&mut self, digest: u32, key: u32) {
        let Some(mut hole) = self.find_place(digest, |entry| entry == Entry { digest, key }) else { return };
        self.used -= 1;
        // Entries that had to go further because of this one come back.
        let mut next = hole;
        loop {
            next = self.after(next);
            let entry = self.places[next];
            if entry == NONE {
                break;
            }
            let home = self.home(entry.digest);
            // Whether the hole lies on the way from where the entry belongs to where it is.
            if self.distance(home, hole) <= self.distance(home, next) {
                self.places[hole] = entry;
                hole = next;
            }
        }
        self.places[hole] = NONE;
    }

    /// A number entered under this digest for which `same` holds.
    pub(crate) fn find(&self, digest: u32, mut same: impl FnMut(u32) -> bool) -> Option<u32> {
        let place = self.find_place(digest, |entry| entry.digest == digest && same(entry.key))?;
        Some(self.places[place].key)
    }

    /// Gives unused memory back.
    pub(crate) fn shrink(&mut self) {
        let wanted = if self.used == 0 { 0 } else { self.used * 10 / 9 + 16 };
        if wanted + wanted / 16 < self.places.len() {
            self.resize(wanted);
        }
    }

    /// Bytes that the table takes.
    pub(crate) fn bytes(&self) -> usize {
        self.places.capacity() * size_of::<Entry>()
    }

    fn find_place(&self, digest: u32, mut found: impl FnMut(Entry) -> bool) -> Option<usize> {
        if self.used == 0 {
            return None;
        }
        let mut place = self.home(digest);
        loop {
            let entry = self.places[place];
            if entry == NONE {
                return None;
            }
            if found(entry) {
                return Some(place);
            }
            place = self.after(place);
        }
    }

    fn put(&mut self, entry: Entry) {
        let mut place = self.home(entry.digest);
        while self.places[place] != NONE {
            place = self.after(place);
        }
        self.places[place] = entry;
        self.used += 1;
    }

    fn resize(&mut self, places: usize) {
        let mut new = Vec::new();
        new.reserve_exact(places);
        new.resize(places, NONE);
        let old = std::mem::replace(&mut self.places, new);
        self.used = 0;
        old.into_iter().filter(|&entry| entry != NONE).for_each(|entry| self.put(entry));
    }

    /// Where an entry belongs.
    fn home(&self, digest: u32) -> usize {
        ((u64::from(digest) * self.places.len() as u64) >> 32) as usize
    }

    fn after(&self, place: usize) -> usize {
        if place + 1 == self.places.len() { 0 } else { place + 1 }
    }

    /// Steps from one place to another.
    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.places.len() - from }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Digests of which some are equal, and some are close to each other and to the end.
    fn digest() -> impl Strategy<Value = u32> {
        prop_oneof![any::<u32>(), 0..4_u32, (u32::MAX - 3)..=u32::MAX]
    }

    proptest! {
        #[test]
        fn a_table_is_a_set(changes in prop::collection::vec((0..3_u8, digest(), 0..30_u32), 0..400)) {
            let mut table = Table::default();
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
                prop_assert_eq!(table.used, model.len());
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
            prop_assert!(table.places.iter().all(|&entry| entry == NONE));
            table.shrink();
            prop_assert_eq!(table.bytes(), 0);
        }
    }

    #[test]
    fn an_entry_takes_little_more_than_its_eight_bytes() {
        let mut table = Table::default();
        let mut most = 0.0_f64;
        for key in 0..200_000_u32 {
            table.insert(key.wrapping_mul(0x9e37_79b9), key);
            if key > 10_000 {
                most = most.max(table.bytes() as f64 / f64::from(key + 1));
            }
        }
        assert!(most <= 9.6, "{most} bytes");
    }
}
