//! Blocks in queues, from the newest to the oldest, each block in one of them.
//!
//! Blocks are linked by their places in one vector, which grows by the piece, and found by a table of places: 17 bytes for a block with
//! a key of 8 bytes, and at most 9.6 in the table. Places of blocks that left are used again.

use std::fmt;
use std::hash::BuildHasher;

use super::Key;
use crate::collections::pieces::Pieces;
use crate::index::table::Table;

/// No place.
const NONE: u32 = u32::MAX;
/// Bits of a block's mark that name its queue; the two above count.
const QUEUE: u8 = 3;

/// A block's place, valid until the block is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(u32);

#[derive(Clone, Copy)]
struct Entry<K> {
    key: K,
    newer: u32,
    /// Of a place that is free: the next that is.
    older: u32,
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    newest: u32,
    oldest: u32,
    len: u32,
}

const EMPTY: Ends = Ends { newest: NONE, oldest: NONE, len: 0 };

/// Up to four queues.
pub struct Queues<K, S, const N: usize> {
    entries: Pieces<Entry<K>>,
    /// For each entry, its queue and a count.
    marks: Pieces<u8>,
    ends: [Ends; N],
    free: u32,
    table: Table,
    hashes: S,
}

impl<K: Key, S: BuildHasher, const N: usize> Queues<K, S, N> {
    /// No block is in any of them.
    #[must_use]
    pub fn new(hashes: S) -> Self {
        const { assert!(N <= QUEUE as usize + 1) };
        let table = Table::default();
        Self {
            entries: Pieces::default(),
            marks: Pieces::default(),
            ends: [EMPTY; N],
            free: NONE,
            table,
            hashes,
        }
    }

    /// The hash of a key by which it is found here.
    #[must_use]
    pub fn digest(&self, key: K) -> u32 {
        (self.hashes.hash_one(key) >> 32) as u32
    }

    /// Where a block is.
    #[must_use]
    pub fn find(&self, key: K) -> Option<Place> {
        self.find_digest(self.digest(key), key)
    }

    /// The same by its [digest](Self::digest).
    #[must_use]
    pub fn find_digest(&self, digest: u32, key: K) -> Option<Place> {
        self.table.find(digest, |place| self.entries[place as usize].key == key).map(Place)
    }

    /// Adds a block that is in no queue, as the newest of one.
    pub fn push(&mut self, queue: usize, key: K, count: u8) {
        let digest = self.digest(key);
        debug_assert!(self.find_digest(digest, key).is_none());
        let entry = Entry { key, newer: NONE, older: NONE };
        let place = match self.free {
            NONE => self.add(entry),
            place => {
                self.free = self.entries[place as usize].older;
                self.entries[place as usize] = entry;
                place
            }
        };
        self.marks[place as usize] = count << 2;
        self.link(queue, place);
        self.table.insert(digest, place);
    }

    /// Takes a block out of its queue and forgets it.
    pub fn remove(&mut self, place: Place) -> K {
        let Place(place) = place;
        self.unlink(place);
        let key = self.entries[place as usize].key;
        self.table.remove(self.digest(key), place);
        self.entries[place as usize].older = self.free;
        self.free = place;
        key
    }

    /// Makes a block the newest of a queue.
    pub fn refresh(&mut self, queue: usize, place: Place) {
        self.unlink(place.0);
        self.link(queue, place.0);
    }

    /// The oldest block of a queue.
    #[must_use]
    pub fn oldest(&self, queue: usize) -> Option<Place> {
        let oldest = self.ends[queue].oldest;
        (oldest != NONE).then_some(Place(oldest))
    }

    /// Takes the oldest block of a queue out and forgets it.
    pub fn pop(&mut self, queue: usize) -> Option<K> {
        let place = self.oldest(queue)?;
        Some(self.remove(place))
    }

    /// Which block it is.
    #[must_use]
    pub fn key(&self, place: Place) -> K {
        self.entries[place.0 as usize].key
    }

    /// The queue that it is in.
    #[must_use]
    pub fn queue(&self, place: Place) -> usize {
        usize::from(self.marks[place.0 as usize] & QUEUE)
    }

    /// A number from 0 to 3 that is kept with a block.
    #[must_use]
    pub fn count(&self, place: Place) -> u8 {
        self.marks[place.0 as usize] >> 2
    }

    /// Keeps another number with a block.
    pub fn set_count(&mut self, place: Place, count: u8) {
        debug_assert!(count <= 3);
        let mark = &mut self.marks[place.0 as usize];
        *mark = (*mark & QUEUE) | (count << 2);
    }

    /// How many blocks a queue has.
    #[must_use]
    pub fn len(&self, queue: usize) -> usize {
        self.ends[queue].len as usize
    }

    /// Bytes that all of them take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.entries.bytes() + self.marks.bytes() + self.table.bytes()
    }

    /// Gives unused memory back.
    pub fn shrink(&mut self) {
        let (mut entries, mut marks, mut table) = (Pieces::default(), Pieces::default(), Table::default());
        for ends in &mut self.ends {
            let mut from = ends.oldest;
            (ends.oldest, ends.newest) = (NONE, NONE);
            while from != NONE {
                let Entry { key, newer: next, .. } = self.entries[from as usize];
                let place = entries.len() as u32;
                entries.push(Entry { key, newer: NONE, older: ends.newest });
                marks.push(self.marks[from as usize]);
                match ends.newest {
                    NONE => ends.oldest = place,
                    newest => entries[newest as usize].newer = place,
                }
                ends.newest = place;
                table.insert((self.hashes.hash_one(key) >> 32) as u32, place);
                from = next;
            }
        }
        (self.entries, self.marks, self.table, self.free) = (entries, marks, table, NONE);
    }

    fn add(&mut self, entry: Entry<K>) -> u32 {
        let place = self.entries.len() as u32;
        assert!(place < NONE, "four thousand million blocks are cached");
        self.entries.push(entry);
        self.marks.push(0);
        place
    }

    fn link(&mut self, queue: usize, place: u32) {
        let ends = &mut self.ends[queue];
        let entry = &mut self.entries[place as usize];
        (entry.newer, entry.older) = (NONE, ends.newest);
        match ends.newest {
            NONE => ends.oldest = place,
            newest => self.entries[newest as usize].newer = place,
        }
        ends.newest = place;
        ends.len += 1;
        let mark = &mut self.marks[place as usize];
        *mark = (*mark & !QUEUE) | queue as u8;
    }

    fn unlink(&mut self, place: u32) {
        let Entry { newer, older, .. } = self.entries[place as usize];
        let ends = &mut self.ends[usize::from(self.marks[place as usize] & QUEUE)];
        match newer {
            NONE => ends.newest = older,
            newer => self.entries[newer as usize].older = older,
        }
        match older {
            NONE => ends.oldest = newer,
            older => self.entries[older as usize].newer = newer,
        }
        ends.len -= 1;
    }
}

impl<K, S, const N: usize> fmt::Debug for Queues<K, S, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queues").field("lengths", &self.ends.map(|ends| ends.len)).finish_non_exhaustive()
    }
}
