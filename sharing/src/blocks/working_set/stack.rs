//! The blocks that a VM gave up and did not read again, the latest on top; of them, those whose hashes are
//! below a threshold.
//!
//! The threshold falls when there are too many of them, and rises when there are few, since much was
//! forgotten or read again. Blocks that a rise brings in are followed at once, but count only when they were
//! followed as long as anything is remembered: until then, some of them are missing from the stack.

use crate::index::table::Table;

/// A place that is not in use. Hashes are odd.
const EMPTY: u64 = 0;

#[derive(Debug)]
pub(super) struct Stack {
    /// Hashes of blocks, from the bottom, with holes.
    hashes: Vec<u64>,
    /// When they were pushed.
    times: Vec<u32>,
    /// Fenwick's tree of the places that hold a block that counts ("A new data structure for cumulative
    /// frequency tables", 1994). Its length is the number of places.
    tree: Vec<u16>,
    /// Places by hash.
    table: Table,
    /// The lowest place that may be in use.
    bottom: usize,
    used: usize,
    /// Blocks that count.
    counted: u32,
    most: usize,
    /// Age at which blocks are forgotten.
    memory: u32,
    now: u32,
    /// Blocks with lesser hashes are followed.
    followed: u64,
    /// Others are not told of.
    limit: u64,
    /// Blocks with lesser hashes count.
    threshold: u64,
    /// When the first of these rose last.
    rose: u32,
}

impl Stack {
    /// A stack of so many blocks at most, which it remembers for so many reads.
    pub(super) fn new(most: usize, memory: u32) -> Self {
        debug_assert!(most * 2 <= usize::from(u16::MAX));
        Self {
            hashes: Vec::new(),
            times: Vec::new(),
            tree: Vec::new(),
            table: Table::default(),
            bottom: 0,
            used: 0,
            counted: 0,
            most,
            memory,
            now: 0,
            followed: u64::MAX,
            limit: u64::MAX,
            threshold: u64::MAX,
            rose: 0,
        }
    }

    /// Whether a block counts.
    pub(super) fn counts(&self, hash: u64) -> bool {
        hash < self.threshold
    }

    /// The part of all blocks that counts.
    pub(super) fn rate(&self) -> f64 {
        self.threshold as f64 / u64::MAX as f64
    }

    /// Time passes: forgets what is old.
    pub(super) fn pass(&mut self, now: u32) {
        self.now = now;
        while let Some(&hash) = self.hashes.get(self.bottom) {
            if hash != EMPTY {
                if now.wrapping_sub(self.times[self.bottom]) <= self.memory {
                    break;
                }
                self.clear(self.bottom);
            }
            self.bottom += 1;
        }
        let settled = now.wrapping_sub(self.rose) > self.memory;
        if settled && self.threshold < self.followed {
            self.threshold = self.followed;
            self.rebuild();
        } else if settled && self.followed < self.limit && self.used < self.most / 4 {
            self.followed = self.followed.saturating_mul(2).min(self.limit);
            self.rose = now;
        }
    }

    /// Blocks whose hashes are not below `limit` are not told of from now on; all others are.
    pub(super) fn limit(&mut self, limit: u64) {
        let before = std::mem::replace(&mut self.limit, limit);
        if limit < self.followed {
            self.followed = limit;
            self.threshold = self.threshold.min(limit);
            self.rebuild();
        } else if before < limit && self.followed == before {
            self.followed = limit;
            self.rose = self.now;
        }
    }

    /// Takes a block out; says how many that count lay above it.
    pub(super) fn take(&mut self, hash: u64) -> Option<u32> {
        if hash >= self.followed {
            return None;
        }
        let place = self.table.find(hash as u32, |place| self.hashes[place as usize] == hash)? as usize;
        let above = self.counted - self.count_to(place);
        self.clear(place);
        Some(above)
    }

    /// Puts a block on top that is not in the stack.
    pub(super) fn push(&mut self, hash: u64, now: u32) {
        if hash >= self.followed {
            return;
        }
        if self.hashes.len() == self.tree.len() {
            self.rebuild();
        }
        let place = self.hashes.len();
        let counts = self.counts(hash);
        self.hashes.push(hash);
        self.times.push(now);
        self.table.insert(hash as u32, place as u32);
        self.used += 1;
        if counts {
            self.counted += 1;
            self.update(place, |count| count + 1);
        }
        if self.used > self.most {
            self.thin();
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.hashes.capacity() * size_of::<u64>()
            + self.times.capacity() * size_of::<u32>()
            + self.tree.capacity() * size_of::<u16>()
            + self.table.bytes()
    }

    fn clear(&mut self, place: usize) {
        let hash = std::mem::replace(&mut self.hashes[place], EMPTY);
        self.table.remove(hash as u32, place as u32);
        self.used -= 1;
        if self.counts(hash) {
            self.counted -= 1;
            self.update(place, |count| count - 1);
        }
    }

    /// Lowers the threshold so that a sixteenth of the blocks goes.
    fn thin(&mut self) {
        let mut hashes: Vec<u64> = self.hashes.iter().copied().filter(|&hash| hash != EMPTY).collect();
        let keep = self.most - self.most / 16;
        let (_, &mut limit, _) = hashes.select_nth_unstable(keep);
        self.followed = limit;
        self.threshold = self.threshold.min(self.followed);
        self.rebuild();
    }

    /// Closes the holes, drops what is not followed, and makes room for as many blocks again.
    fn rebuild(&mut self) {
        let mut kept = 0;
        for place in 0..self.hashes.len() {
            let hash = self.hashes[place];
            if hash != EMPTY && hash < self.followed {
                (self.hashes[kept], self.times[kept]) = (hash, self.times[place]);
                kept += 1;
            }
        }
        self.hashes.truncate(kept);
        self.times.truncate(kept);
        let places = (kept * 2).clamp(256, self.most * 2);
        self.hashes.shrink_to(places);
        self.hashes.reserve_exact(places - kept);
        self.times.shrink_to(places);
        self.times.reserve_exact(places - kept);
        (self.tree, self.table) = (vec![0; places], Table::default());
        (self.bottom, self.used, self.counted) = (0, kept, 0);
        for place in 0..kept {
            let hash = self.hashes[place];
            self.table.insert(hash as u32, place as u32);
            if self.counts(hash) {
                self.counted += 1;
                self.update(place, |count| count + 1);
            }
        }
    }

    /// Blocks that count, in the places up to this one.
    fn count_to(&self, place: usize) -> u32 {
        let mut node = place + 1;
        let mut count = 0;
        while node > 0 {
            count += u32::from(self.tree[node - 1]);
            node &= node - 1;
        }
        count
    }

    fn update(&mut self, place: usize, change: impl Fn(u16) -> u16) {
        let mut node = place + 1;
        while node <= self.tree.len() {
            self.tree[node - 1] = change(self.tree[node - 1]);
            node += node & node.wrapping_neg();
        }
    }
}
