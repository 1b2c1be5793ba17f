//! A hash table of numbers under digests, for indexes with as many entries as there are pages: an entry takes
//! 9.6 bytes at most while the table grows, and 10.5 after entries have left.
//!
//! It consists of small [segments], each a vector with linear probing over places in the order
//! of digests. A segment grows by a sixteenth, and is split when there are many entries. Whatever is done, a
//! bounded number of entries is moved: nobody has to wait for a table of millions.

use crate::collections::segments::{self, SEGMENT, segment_of, split_off};

/// An entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    digest: u32,
    key: u32,
}

/// No entry. No page and no frame has this number.
const NONE: Entry = Entry { digest: 0, key: u32::MAX };

/// Some of the entries.
#[derive(Debug, Default)]
struct Segment {
    places: Box<[Entry]>,
    used: usize,
}

/// The table, whose segments are split when they have so many entries on average.
#[derive(Debug)]
pub(crate) struct Table<const SIZE: usize = SEGMENT> {
    segments: Vec<Segment>,
    used: usize,
    /// Of all segments.
    places: usize,
    /// Entries that were moved.
    #[cfg(test)]
    moved: usize,
}

impl<const SIZE: usize> Default for Table<SIZE> {
    fn default() -> Self {
        Self {
            segments: Vec::new(),
            used: 0,
            places: 0,
            #[cfg(test)]
            moved: 0,
        }
    }
}

impl<const SIZE: usize> Table<SIZE> {
    /// Adds a number that is not in the table.
    pub(crate) fn insert(&mut self, digest: u32, key: u32) {
        debug_assert_ne!(key, NONE.key);
        if self.segments.is_empty() {
            self.segments.push(Segment::default());
        }
        let at = self.segment(digest);
        if self.segments[at].is_full() {
            let places = self.segments[at].places.len();
            self.resize(at, places + places / 16 + 2);
        }
        self.segments[at].put(Entry { digest, key });
        self.used += 1;
        if segments::crowded(self.used, self.segments.len(), SIZE) {
            self.split();
        }
    }

    /// Adds a number that is not in the table, unless there are `most` under this digest. Returns whether it was
    /// added. So what many entries with equal digests cost each other is bounded.
    pub(crate) fn insert_few(&mut self, digest: u32, key: u32, most: usize) -> bool {
        let mut found = 0;
        self.find(digest, |_| {
            found += 1;
            found == most
        });
        let few = found < most;
        if few {
            self.insert(digest, key);
        }
        few
    }

    /// Takes a number out that was entered under this digest, if it is there.
    pub(crate) fn remove(&mut self, digest: u32, key: u32) {
        if self.segments.is_empty() {
            return;
        }
        let at = self.segment(digest);
        if !self.segments[at].remove(Entry { digest, key }) {
            return;
        }
        self.used -= 1;
        if self.segments[at].is_sparse() {
            let places = roomy(self.segments[at].used);
            self.resize(at, places);
        }
        if segments::deserted(self.used, self.segments.len(), SIZE) {
            self.join();
        }
        if self.used == 0 {
            *self = Self::default();
        }
    }

    /// A number entered under this digest for which `same` holds.
    pub(crate) fn find(&self, digest: u32, mut same: impl FnMut(u32) -> bool) -> Option<u32> {
        if self.segments.is_empty() {
            return None;
        }
        let segment = &self.segments[self.segment(digest)];
        let place = segment.find_place(digest, |entry| entry.digest == digest && same(entry.key))?;
        Some(segment.places[place].key)
    }

    /// Bytes that the table takes.
    pub(crate) fn bytes(&self) -> usize {
        self.places * size_of::<Entry>() + self.segments.capacity() * size_of::<Segment>()
    }

    fn segment(&self, digest: u32) -> usize {
        segment_of(digest.into(), self.segments.len())
    }

    /// Gives a segment so many places.
    fn resize(&mut self, at: usize, places: usize) {
        let old = std::mem::take(&mut self.segments[at]);
        self.places -= old.places.len();
        self.fill(at, places, old.entries());
    }

    /// Puts entries into a segment without places, which gets so many.
    fn fill(&mut self, at: usize, places: usize, entries: impl Iterator<Item = Entry>) {
        let segment = &mut self.segments[at];
        segment.places = vec![NONE; places].into();
        self.places += places;
        entries.for_each(|entry| segment.put(entry));
        #[cfg(test)]
        {
            self.moved += segment.used;
        }
    }

    /// Splits the next segment.
    fn split(&mut self) {
        let last = self.segments.len();
        let at = split_off(last);
        let old = std::mem::take(&mut self.segments[at]);
        if last == self.segments.capacity() {
            // Doubling would waste half of it at worst, and there is one for some hundred entries.
            self.segments.reserve_exact(last / 4 + 1);
        }
        self.segments.push(Segment::default());
        self.places -= old.places.len();
        for part in [at, last] {
            let count = last + 1;
            let its = |entry: &Entry| segment_of(entry.digest.into(), count) == part;
            let used = old.entries().filter(its).count();
            self.fill(part, roomy(used), old.entries().filter(its));
        }
    }

    /// Joins the last segment with the one that it was split off.
    fn join(&mut self) {
        let Some(last) = self.segments.pop() else { return };
        let at = split_off(self.segments.len());
        let other = std::mem::take(&mut self.segments[at]);
        self.places -= last.places.len() + other.places.len();
        self.fill(at, roomy(last.used + other.used), last.entries().chain(other.entries()));
        if self.segments.len() * 2 < self.segments.capacity() {
            self.segments.shrink_to_fit();
        }
    }
}

/// Places for so many entries, such that there is some room for more and few are free.
fn roomy(used: usize) -> usize {
    if used == 0 { 0 } else { used * 8 / 7 + 1 }
}

impl Segment {
    /// Whether one more entry would leave less than a tenth of the places free.
    fn is_full(&self) -> bool {
        (self.used + 1) * 10 > self.places.len() * 9
    }

    /// Whether more than a fifth of the places is free, and some are to spare.
    fn is_sparse(&self) -> bool {
        self.used * 5 + 40 < self.places.len() * 4 || self.used == 0
    }

    fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.places.iter().copied().filter(|&entry| entry != NONE)
    }

    /// Takes an entry out. Returns whether it was there.
    fn remove(&mut self, entry: Entry) -> bool {
        let Some(mut hole) = self.find_place(entry.digest, |other| other == entry) else { return false };
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
        true
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
mod tests;
