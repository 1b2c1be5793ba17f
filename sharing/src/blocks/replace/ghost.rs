//! Blocks that were evicted lately, by their digests: 10.7 bytes for each that is remembered.
//!
//! Buckets of eight notes, a cache line each. A note is worth nothing once as many blocks as are to be
//! remembered were evicted after it; a bucket with too many forgets its oldest sooner. Of n blocks that were
//! never evicted, one in 2³²/n is taken for one that was: it is kept longer than it deserves.

use crate::collections::segments::{self, segment_of, split_off};

/// Notes in a bucket.
const WAYS: usize = 8;
/// Notes in a bucket that are worth something, on average: with six of eight, one in twenty is lost to a
/// bucket with too many.
const LOAD: usize = 6;

#[derive(Clone, Copy, Debug)]
struct Note {
    digest: u32,
    /// Number of the eviction.
    time: u32,
}

/// Notes of some evictions.
type Bucket = [Note; WAYS];

/// Notes of evictions, in [segments] of buckets: no eviction has to wait for all of them.
#[derive(Debug)]
pub(super) struct Ghosts {
    segments: Vec<Box<[Bucket]>>,
    /// Evictions until now; wraps.
    now: u32,
    /// Notes that were moved.
    #[cfg(test)]
    moved: usize,
}

/// Buckets of a segment that is about to be split.
const SEGMENT: usize = 128;
/// Segments that one eviction splits at most.
const SPLITS: usize = 2;

/// Older than any.
const EMPTY: Note = Note { digest: 0, time: 0 };
const START: u32 = 1 << 31;

impl Ghosts {
    pub(super) fn new() -> Self {
        Self {
            segments: Vec::new(),
            now: START,
            #[cfg(test)]
            moved: 0,
        }
    }

    /// Notes an eviction, one of the last `span` of which are to be remembered.
    pub(super) fn add(&mut self, digest: u32, span: usize) {
        let wanted = span.div_ceil(LOAD);
        if self.segments.is_empty() {
            self.segments.push(Box::default());
        }
        for _ in 0..SPLITS {
            if segments::crowded(wanted, self.segments.len(), SEGMENT) {
                self.split();
            }
        }
        let at = self.segment(digest);
        let part = self.part(at, wanted);
        if part > self.segments[at].len() {
            // Room for some growth.
            self.resize(at, part + part / 16 + 1);
        }
        self.now = self.now.wrapping_add(1);
        let note = Note { digest, time: self.now };
        self.put(note);
    }

    /// Forgets an eviction that is among the last `span`; returns whether there was one.
    pub(super) fn take(&mut self, digest: u32, span: usize) -> bool {
        let now = self.now;
        let Some(bucket) = self.bucket(digest) else { return false };
        let found = bucket
            .iter_mut()
            .find(|note| note.digest == digest && (now.wrapping_sub(note.time) as usize) < span);
        let Some(note) = found else { return false };
        note.time = now.wrapping_sub(START);
        true
    }

    /// Evictions that are remembered, of the last `span`. Counts them all.
    pub(super) fn count(&self, span: usize) -> usize {
        let live = |note: &&Note| (self.now.wrapping_sub(note.time) as usize) < span;
        self.segments.iter().flatten().flatten().filter(live).count()
    }

    pub(super) fn bytes(&self) -> usize {
        let buckets: usize = self.segments.iter().map(|segment| segment.len()).sum();
        buckets * size_of::<Bucket>() + self.segments.capacity() * size_of::<Box<[Bucket]>>()
    }

    /// Gives memory back that is not needed to remember the last `span`.
    pub(super) fn shrink(&mut self, span: usize) {
        let wanted = span.div_ceil(LOAD);
        while segments::deserted(wanted, self.segments.len(), SEGMENT) {
            self.join();
        }
        for at in 0..self.segments.len() {
            let part = self.part(at, wanted);
            if part < self.segments[at].len() {
                self.resize(at, part);
            }
        }
        if wanted == 0 {
            self.segments.clear();
        }
        self.segments.shrink_to_fit();
    }

    fn segment(&self, digest: u32) -> usize {
        segment_of(digest.into(), self.segments.len())
    }

    /// How many of the buckets are a segment's: one that was not split yet has twice as many as others.
    fn part(&self, at: usize, buckets: usize) -> usize {
        let count = self.segments.len();
        let unsplit = 1 << count.ilog2();
        let halved = at < count - unsplit || at >= unsplit;
        buckets.div_ceil(unsplit << usize::from(halved))
    }

    fn resize(&mut self, at: usize, buckets: usize) {
        let old = std::mem::take(&mut self.segments[at]);
        self.segments[at] = self.empty(buckets);
        self.put_all(&old);
    }

    /// Buckets without notes.
    fn empty(&self, buckets: usize) -> Box<[Bucket]> {
        vec![[Note { time: self.now.wrapping_sub(START), ..EMPTY }; WAYS]; buckets].into()
    }

    fn split(&mut self) {
        let last = self.segments.len();
        let at = split_off(last);
        let old = std::mem::take(&mut self.segments[at]);
        let half = old.len().div_ceil(2);
        self.segments[at] = self.empty(half);
        let other = self.empty(half);
        self.segments.push(other);
        self.put_all(&old);
    }

    fn join(&mut self) {
        let Some(last) = self.segments.pop() else { return };
        let at = split_off(self.segments.len());
        let other = std::mem::take(&mut self.segments[at]);
        self.segments[at] = self.empty(last.len() + other.len());
        self.put_all(&last);
        self.put_all(&other);
    }

    fn put_all(&mut self, buckets: &[Bucket]) {
        buckets.iter().flatten().for_each(|&note| self.put(note));
        #[cfg(test)]
        {
            self.moved += buckets.len() * WAYS;
        }
    }

    /// Writes a note over the oldest in its bucket, unless it is older itself.
    fn put(&mut self, note: Note) {
        let now = self.now;
        let age = |note: &Note| now.wrapping_sub(note.time);
        let oldest =
            self.bucket(note.digest).and_then(|bucket| bucket.iter_mut().max_by_key(|note| age(note)));
        if let Some(oldest) = oldest.filter(|oldest| age(&note) <= age(oldest)) {
            *oldest = note;
        }
    }

    /// Where a digest is noted.
    fn bucket(&mut self, digest: u32) -> Option<&mut Bucket> {
        if self.segments.is_empty() {
            return None;
        }
        let at = self.segment(digest);
        let segment = &mut self.segments[at];
        let home = (u64::from(digest) * segment.len() as u64) >> 32;
        segment.get_mut(home as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_evictions_are_remembered_and_no_others() {
        let digest = |key: u32| key.wrapping_mul(0x9e37_79b9).rotate_left(16).wrapping_mul(0x85eb_ca6b);
        let mut ghosts = Ghosts::new();
        (0..10_000_u32).for_each(|key| ghosts.add(digest(key), 1000));
        assert!(ghosts.count(1000) > 900, "{}", ghosts.count(1000));
        assert!(ghosts.bytes() <= 12 * 1000, "{}", ghosts.bytes());
        let remembered = (9000..10_000_u32).filter(|&key| ghosts.take(digest(key), 1000)).count();
        assert!(remembered > 900, "{remembered}");
        assert_eq!((0..10_000_u32).filter(|&key| ghosts.take(digest(key), 1000)).count(), 0);
        assert_eq!(ghosts.count(1000), 0);
    }

    #[test]
    fn notes_survive_a_change_of_size() {
        let mut ghosts = Ghosts::new();
        let digest = |key: u32| key.wrapping_mul(0x9e37_79b9);
        (0..2000_u32).for_each(|key| ghosts.add(digest(key), 1 + key as usize));
        let all = ghosts.count(2000);
        assert!(all > 1800, "{all}");
        ghosts.shrink(100);
        assert!(ghosts.count(100) > 80 && ghosts.bytes() <= 12 * 100, "{}", ghosts.count(100));
        assert!(ghosts.take(digest(1999), 100));
        ghosts.shrink(0);
        assert!(!ghosts.take(digest(1998), 100) && ghosts.bytes() == 0);
    }

    #[test]
    fn no_eviction_moves_more_than_some_notes_however_many_there_are() {
        let digest = |key: u32| key.wrapping_mul(0x9e37_79b9).rotate_left(16).wrapping_mul(0x85eb_ca6b);
        let mut ghosts = Ghosts::new();
        let mut most = 0;
        const KEYS: u32 = 300_000;
        for key in 0..KEYS {
            let before = ghosts.moved;
            ghosts.add(digest(key), 1 + key as usize);
            most = most.max(ghosts.moved - before);
        }
        assert!(most <= 8 * SEGMENT * WAYS, "{most} notes at once");
        let (all, span) = (ghosts.count(KEYS as usize), KEYS as usize);
        assert!(all > span * 9 / 10, "{all}");
        assert!(ghosts.bytes() <= 12 * span, "{}", ghosts.bytes());
        let remembered = (0..KEYS).filter(|&key| ghosts.take(digest(key), span)).count();
        assert!(remembered > span * 9 / 10, "{remembered}");
        // What comes back at once is noted in few segments at first.
        ghosts.shrink(1000);
        assert!(ghosts.bytes() <= 13 * 1000, "{}", ghosts.bytes());
    }
}
