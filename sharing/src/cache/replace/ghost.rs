//! Blocks that were evicted lately, by their digests: 10.7 bytes for each that is remembered.
//!
//! Buckets of eight notes, a cache line each. A note is worth nothing once as many blocks as are to be
//! remembered were evicted after it; a bucket with too many forgets its oldest sooner. Of n blocks that were
//! never evicted, one in 2³²/n is taken for one that was: it is kept longer than it deserves.

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

/// Notes of evictions.
#[derive(Debug)]
pub(super) struct Ghosts {
    buckets: Vec<[Note; WAYS]>,
    /// Evictions until now; wraps.
    now: u32,
}

/// Older than any.
const EMPTY: Note = Note { digest: 0, time: 0 };
const START: u32 = 1 << 31;

impl Ghosts {
    pub(super) fn new() -> Self {
        Self { buckets: Vec::new(), now: START }
    }

    /// Notes an eviction, one of the last `span` of which are to be remembered.
    pub(super) fn add(&mut self, digest: u32, span: usize) {
        let wanted = span.div_ceil(LOAD);
        if wanted > self.buckets.len() {
            // Room for some growth.
            self.resize(wanted + wanted / 16 + 1);
        }
        self.now = self.now.wrapping_add(1);
        let note = Note { digest, time: self.now };
        self.put(note);
    }

    /// Forgets an eviction that is among the last `span`; returns whether there was one.
    pub(super) fn take(&mut self, digest: u32, span: usize) -> bool {
        if self.buckets.is_empty() {
            return false;
        }
        let (now, home) = (self.now, self.home(digest));
        let found = self.buckets[home]
            .iter_mut()
            .find(|note| note.digest == digest && (now.wrapping_sub(note.time) as usize) < span);
        let Some(note) = found else { return false };
        note.time = now.wrapping_sub(START);
        true
    }

    /// Evictions that are remembered, of the last `span`. Counts them all.
    pub(super) fn count(&self, span: usize) -> usize {
        let live = |note: &&Note| (self.now.wrapping_sub(note.time) as usize) < span;
        self.buckets.iter().flatten().filter(live).count()
    }

    pub(super) fn bytes(&self) -> usize {
        self.buckets.capacity() * size_of::<[Note; WAYS]>()
    }

    /// Gives memory back that is not needed to remember the last `span`.
    pub(super) fn shrink(&mut self, span: usize) {
        let wanted = span.div_ceil(LOAD);
        if wanted < self.buckets.len() {
            self.resize(wanted);
        }
    }

    fn resize(&mut self, buckets: usize) {
        let mut new = Vec::new();
        new.reserve_exact(buckets);
        new.resize(buckets, [Note { time: self.now.wrapping_sub(START), ..EMPTY }; WAYS]);
        let old = std::mem::replace(&mut self.buckets, new);
        if buckets > 0 {
            old.into_iter().flatten().for_each(|note| self.put(note));
        }
    }

    /// Writes a note over the oldest in its bucket, unless it is older itself.
    fn put(&mut self, note: Note) {
        let (now, home) = (self.now, self.home(note.digest));
        let age = |note: &Note| now.wrapping_sub(note.time);
        let oldest = self.buckets[home].iter_mut().max_by_key(|note| age(note)).expect("a bucket has notes");
        if age(&note) <= age(oldest) {
            *oldest = note;
        }
    }

    fn home(&self, digest: u32) -> usize {
        ((u64::from(digest) * self.buckets.len() as u64) >> 32) as usize
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
}
