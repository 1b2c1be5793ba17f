//! Which reads of a disk go through the cache, and which go past it since nothing ever hits.
//!
//! To have a block in the cache costs: a frame of its own to read it into, metadata, and a page fault of the
//! guest's where it is mapped. Where no block is read again that buys nothing. So each disk begins with
//! *credit*: blocks that go through the cache without a hit use it up, hits bring it back. When it is used up,
//! only a *sample* of the disk goes on to be cached, one stretch of [`STRETCH`] blocks in [`RATE`], chosen by a
//! keyed hash, and all else goes past as if there were no cache. As soon as the sample has hits enough, everything goes
//! through the cache again.
//!
//! The sample is spatial, as in SHARDS (see [`working_set`](super::working_set)): all reads of a block that is
//! in it are seen, so reuse shows in it at any distance, and the estimate of the working set is made from it.
//!
//! Its size is fixed rather than its rate, as in SHARDS too. A read that meets the sample takes several times as
//! long as one that goes past, so the sample gets thinner while it shows nothing: once [`FRESH`] stretches of it
//! were read, and had no hits, half of it goes. Of a loop some stretches are left, whatever its length, since a
//! stretch counts once. A set of blocks that is small beside all that is read may miss a thin sample altogether, so
//! the sample is thick again after a while, and as soon as it has a hit.
//!
//! A cache that holds the sample alone has more room for it than it would have for its share of everything. So a
//! hit is no evidence where more was read since the block was read last than guest and cache hold together. A
//! trial may still find less than the sample has promised: after each that failed, twice the evidence is asked for.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use hashbrown::HashMap;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use twox_hash::xxhash3_64;

/// Blocks of a stretch, a power of two.
const STRETCH: u64 = 8;
/// One of so many stretches that follow each other is in the sample.
const RATE: u64 = 256;
/// The estimator's hashes of blocks that are in the thickest sample are below this, and all others are not.
pub(crate) const SAMPLED: u64 = u64::MAX / RATE + 1;

/// Different stretches without a hit after which half of the sample goes.
const FRESH: u32 = 4;
/// How often it is halved at most. One request of 32 blocks in 2,048 meets a sample as thin as this.
const THINNEST: u32 = 5;
/// A thin sample is thick again after so many times the blocks that lie between two of its stretches.
const WAIT: u64 = 16;

/// Blocks that a hit is worth: with fewer hits than one in so many reads credit runs out.
const WORTH: i64 = 32;
/// What the sample has to bring before all is let in again.
const EVIDENCE: i64 = 3 * WORTH;
/// Evidence is doubled so many times at most.
const MOST_FAILURES: u32 = 10;
/// Blocks of the sample whose last reads are remembered: a sample of 16 GiB.
const MOST_SEEN: usize = 1 << 14;
/// Credit for a disk that one VM has to itself: 1 MiB. What it reads once is nobody else's.
const OWN_CREDIT: i64 = 1 << 8;
/// Credit for a disk that others may read as well: 64 MiB. What the first VM reads, a second one is given.
const COMMON_CREDIT: i64 = 1 << 14;

/// Chooses the stretches of a sample under a random key, so that no guest can tell them. Hashes blocks so that
/// those of these stretches have the smallest hashes. Another process with the same key chooses the same stretches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sampler {
    key: [u64; 2],
}

impl Default for Sampler {
    /// A random key.
    fn default() -> Self {
        let random = RandomState::new();
        Self { key: [0_u64, 1].map(|word| random.hash_one(word)) }
    }
}

impl Sampler {
    /// The hash of two numbers.
    fn hash(&self, numbers: [u64; 2]) -> u64 {
        let [seed, word] = self.key;
        hash(seed, &[word, numbers[0], numbers[1]].map(u64::to_le_bytes).concat())
    }

    /// Whether a block is in the thickest sample.
    #[must_use]
    pub fn takes(&self, block: u64) -> bool {
        let stretch = block / STRETCH;
        self.hash([stretch / RATE, 0]) % RATE == stretch % RATE
    }

    /// Whether a block is in the sample of those whose hashes are below a limit.
    fn takes_below(&self, block: u64, limit: u64) -> bool {
        self.takes(block) && self.stretch(block) < limit
    }

    /// The hash of a block's stretch.
    fn stretch(&self, block: u64) -> u64 {
        let hash = self.hash([block / STRETCH, RATE]);
        if self.takes(block) { hash / RATE } else { hash.max(hash / RATE + SAMPLED) }
    }
}

impl BuildHasher for Sampler {
    type Hasher = StretchHasher;

    fn build_hasher(&self) -> StretchHasher {
        StretchHasher { sampler: self.clone(), all: self.key[1], last: 0 }
    }
}

/// XXH3 under a seed.
fn hash(seed: u64, bytes: &[u8]) -> u64 {
    xxhash3_64::Hasher::oneshot_with_seed(seed, bytes)
}

/// The upper half of a hash is that of the stretch, by the last number that was hashed; the lower half that of
/// everything.
#[derive(Debug)]
pub struct StretchHasher {
    sampler: Sampler,
    all: u64,
    last: u64,
}

impl Hasher for StretchHasher {
    fn finish(&self) -> u64 {
        let upper = self.sampler.stretch(self.last);
        upper & !u64::from(u32::MAX) | self.all & u64::from(u32::MAX)
    }

    fn write(&mut self, bytes: &[u8]) {
        self.all = hash(self.all, bytes);
    }

    fn write_u32(&mut self, number: u32) {
        self.write(&number.to_le_bytes());
        self.last = number.into();
    }
}

/// Who can read a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// One VM: it may write to it.
    One,
    /// Any number of VMs, now or later.
    Many,
}

/// What the engine is told of the sample of a disk with each read of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Which of the VM's disks it is.
    pub disk: usize,
    /// Blocks that went past the cache since the last time.
    pub passed: u64,
    /// The estimator's hashes of blocks in the sample are below this.
    pub limit: u64,
}

/// What is let in of one disk.
#[derive(Debug)]
pub struct Admission {
    sampler: Sampler,
    /// Which of the VM's disks it is.
    disk: usize,
    credit: i64,
    sampling: AtomicBool,
    /// How often the sample was halved. Changes under the lock of the state.
    halvings: AtomicU32,
    /// Blocks that went past since that was last told.
    passed: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// While all is let in, the credit that is left; while a sample is, the evidence.
    balance: i64,
    /// Hits since all is let in.
    hits: u64,
    /// Trials that failed one after the other.
    failures: u32,
    /// Blocks read, and how many those were when a block of the sample was read last.
    read: u64,
    seen: HashMap<u64, u64>,
    /// Blocks read when the sample became thinner or thicker, and stretches of it read since then.
    changed: u64,
    fresh: u32,
}

impl Admission {
    /// All is let in of a VM's disk, known by its number, until the credit is used up.
    #[must_use]
    pub fn new(sampler: Sampler, readers: Readers, disk: usize) -> Self {
        let credit = match readers {
            Readers::One => OWN_CREDIT,
            Readers::Many => COMMON_CREDIT,
        };
        let (seen, changed, fresh) = (HashMap::new(), 0, 0);
        let state = State { balance: credit, hits: 0, failures: 0, read: 0, seen, changed, fresh };
        Self {
            sampler,
            disk,
            credit,
            sampling: AtomicBool::new(false),
            halvings: AtomicU32::new(0),
            passed: AtomicU64::new(0),
            state: Mutex::new(state),
        }
    }

    /// Whether only a sample is let in.
    #[must_use]
    pub fn samples(&self) -> bool {
        self.sampling.load(Ordering::Relaxed)
    }

    /// Whether any of so many blocks from `first` on is to be asked of the cache. If not, they count as gone
    /// past.
    #[must_use]
    pub fn admits(&self, first: u64, blocks: u64) -> bool {
        if !self.samples() {
            return true;
        }
        let last = first.saturating_add(blocks.max(1) - 1);
        let mut stretches = first / STRETCH..=last / STRETCH;
        let limit = self.limit();
        let any = stretches.any(|stretch| self.sampler.takes_below(stretch * STRETCH, limit));
        if !any {
            self.pass(blocks);
        }
        any
    }

    /// Whether a block is to be asked of the cache.
    #[must_use]
    pub fn takes(&self, block: u64) -> bool {
        !self.samples() || self.sampler.takes_below(block, self.limit())
    }

    /// Hashes of blocks that are in the sample are below this.
    fn limit(&self) -> u64 {
        SAMPLED >> self.halvings.load(Ordering::Relaxed)
    }

    /// Blocks that may be read before a thin sample is thick again.
    fn wait(&self) -> u64 {
        WAIT * STRETCH * (RATE << self.halvings.load(Ordering::Relaxed))
    }

    /// So many blocks go past the cache.
    pub fn pass(&self, blocks: u64) {
        let before = self.passed.fetch_add(blocks, Ordering::Relaxed);
        // Nothing may ever be read again that is in the sample.
        if before > self.wait() && self.halvings.load(Ordering::Relaxed) > 0 {
            let mut state = self.state.lock();
            self.halve(&mut state, 0);
        }
    }

    /// What the engine is told with a read of the sample. It starts to count anew what goes past.
    pub fn sample(&self) -> Sample {
        Sample { disk: self.disk, passed: self.passed.swap(0, Ordering::Relaxed), limit: self.limit() }
    }

    /// Which of the VM's disks this is about.
    #[must_use]
    pub fn disk(&self) -> usize {
        self.disk
    }

    /// Halves the thickest sample so many times.
    fn halve(&self, state: &mut State, times: u32) {
        self.halvings.store(times, Ordering::Relaxed);
        (state.fresh, state.changed) = (0, state.read);
    }

    /// What a read came to while all is let in: `hits` of `blocks` blocks from `first` on were held.
    pub fn note(&self, first: u64, blocks: u64, hits: u64) {
        let mut state = self.state.lock();
        state.read += blocks;
        let limit = self.limit();
        for block in (first..first + blocks).filter(|&block| self.sampler.takes_below(block, limit)) {
            state.see(block);
        }
        let balance = state.balance_after(hits, blocks - hits);
        state.hits += hits;
        state.balance = balance.min(self.credit);
        if state.hits * 8 >= self.credit.unsigned_abs() {
            state.failures = 0;
        }
        if balance < 0 && !self.samples() {
            state.balance = 0;
            state.failures = (state.failures + 1).min(MOST_FAILURES);
            self.sampling.store(true, Ordering::Relaxed);
        }
    }

    /// What a read of the sample came to: `hits` of `blocks` blocks from `first` on. Guest and cache hold `room`
    /// blocks together. Returns whether all is let in from now on.
    pub fn note_sampled(&self, first: u64, blocks: u64, hits: u64, sample: Sample, room: u64) -> bool {
        let mut state = self.state.lock();
        state.read += sample.passed + blocks;
        state.fresh += state.fresh_stretches(first, blocks);
        // What this disk has not read was read by another.
        let is_near = |&block: &u64| state.see(block).is_none_or(|distance| distance <= room);
        let near = (first..first + blocks).filter(is_near).count() as u64;
        let hits = hits.min(near);
        state.balance = state.balance_after(hits, blocks - hits).max(0);
        // Before the first trial nothing was promised that did not come.
        let proven = self.samples() && state.balance >= EVIDENCE << state.failures.saturating_sub(1);
        if proven {
            (state.balance, state.hits) = (self.credit, 0);
            self.sampling.store(false, Ordering::Relaxed);
        }
        let halvings = self.halvings.load(Ordering::Relaxed);
        if state.balance > 0 {
            // More of the disk may bring more.
            if halvings > 0 {
                self.halve(&mut state, 0);
            }
            return proven;
        }
        if state.fresh >= FRESH && halvings < THINNEST {
            self.halve(&mut state, halvings + 1);
        } else if halvings > 0 && state.read - state.changed > self.wait() {
            self.halve(&mut state, 0);
        }
        proven
    }
}

impl State {
    /// A block of the sample is read. Returns how many were since it was last, if it was.
    fn see(&mut self, block: u64) -> Option<u64> {
        if self.seen.len() >= MOST_SEEN {
            self.seen.clear();
        }
        let then = self.seen.insert(block, self.read)?;
        Some(self.read - then)
    }

    /// How many of the stretches in which so many blocks from `first` on lie were not read since the sample
    /// changed.
    fn fresh_stretches(&self, first: u64, blocks: u64) -> u32 {
        let last = first.saturating_add(blocks.max(1) - 1);
        let was_read = |block| self.seen.get(&block).is_some_and(|&then| then > self.changed);
        let is_fresh = |stretch: &u64| !(stretch * STRETCH..=stretch * STRETCH + (STRETCH - 1)).any(was_read);
        let fresh = (first / STRETCH..=last / STRETCH).filter(is_fresh).count();
        u32::try_from(fresh).unwrap_or(u32::MAX)
    }

    fn balance_after(&self, hits: u64, misses: u64) -> i64 {
        let gain = i64::try_from(hits).unwrap_or(i64::MAX).saturating_mul(WORTH);
        self.balance.saturating_add(gain).saturating_sub_unsigned(misses)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::ops::Range;

    use super::*;

    const ROOM: u64 = 50_000;

    /// Reads blocks, of which those that are let in are all held, or none. Returns how many are let in.
    fn read(admission: &Admission, blocks: Range<u64>, hits: bool) -> u64 {
        read_from(admission, blocks, |_| hits)
    }

    fn read_from(admission: &Admission, blocks: Range<u64>, mut holds: impl FnMut(u64) -> bool) -> u64 {
        let mut admitted = 0;
        for block in blocks {
            if admission.admits(block, 1) && admission.takes(block) {
                admitted += 1;
                let hits = holds(block).into();
                if admission.samples() {
                    admission.note_sampled(block, 1, hits, admission.sample(), ROOM);
                } else {
                    admission.note(block, 1, hits);
                }
            }
        }
        admitted
    }

    #[test]
    fn where_nothing_hits_a_sample_is_left() {
        for (readers, credit) in [(Readers::One, OWN_CREDIT), (Readers::Many, COMMON_CREDIT)] {
            let admission = Admission::new(Sampler::default(), readers, 0);
            let credit = credit.unsigned_abs();
            assert_eq!(read(&admission, 0..credit, false), credit);
            let admitted = read(&admission, credit..1 << 20, false);
            assert!((1 << 20 >> 13..1 << 20 >> 9).contains(&admitted), "{admitted}");
            assert!(admission.samples());
            let left = admission.sample().passed;
            assert_eq!(admission.state.lock().read + left, 1 << 20);
        }
    }

    #[test]
    fn of_a_long_scan_little_is_let_in() {
        let admission = Admission::new(Sampler::default(), Readers::One, 0);
        let credit = OWN_CREDIT.unsigned_abs();
        let admitted = read(&admission, 0..1 << 22, false) - credit;
        // One block in 256 would be 16,384.
        assert!((1 << 8..1 << 12).contains(&admitted), "{admitted}");
    }

    /// An admission with as thin a sample as there is.
    fn thin() -> Admission {
        let admission = Admission::new(Sampler::default(), Readers::One, 0);
        let mut block = 0;
        while admission.halvings.load(Ordering::Relaxed) < THINNEST {
            read(&admission, block..block + STRETCH, false);
            block += STRETCH;
        }
        admission
    }

    #[test]
    fn blocks_that_the_thin_sample_lacks_are_found_when_they_are_read_again() {
        let admission = thin();
        // Four stretches of the thickest sample, next to none of the thinnest.
        let hot = 1 << 30..(1 << 30) + 4 * STRETCH * RATE;
        let most = 2 * WAIT * STRETCH * (RATE << THINNEST);
        let mut blocks = 0;
        while admission.samples() {
            read(&admission, hot.clone(), true);
            blocks += hot.end - hot.start;
            assert!(blocks < most, "{blocks} blocks of a small set were read, and it is not let in");
        }
    }

    #[test]
    fn blocks_that_the_thin_sample_lacks_are_found_beside_a_scan() {
        let admission = thin();
        let hot = 1 << 30..(1 << 30) + 4 * STRETCH * RATE;
        let most = 4 * WAIT * STRETCH * (RATE << THINNEST);
        let mut scanned = 1 << 31;
        while admission.samples() {
            for stretch in hot.clone().step_by(STRETCH as usize) {
                read(&admission, stretch..stretch + STRETCH, true);
                read(&admission, scanned..scanned + STRETCH, false);
                scanned += STRETCH;
            }
            assert!(scanned - (1 << 31) < most, "{} blocks were scanned", scanned - (1 << 31));
        }
    }

    #[test]
    fn loops_keep_some_stretches_in_the_sample() {
        for length in [40_000, 200_000, 600_000] {
            let admission = Admission::new(Sampler::default(), Readers::One, 0);
            // The sample alone always has room.
            let mut cached = HashSet::new();
            for _ in 0..100 {
                if read_from(&admission, 0..length, |block| !cached.insert(block)) == length {
                    break;
                }
            }
            // What guest and cache do not hold together gets nothing from more.
            assert_eq!(admission.samples(), length > ROOM, "{length}");
        }
    }

    #[test]
    fn hits_let_all_in_again_and_keep_it_in() {
        let admission = Admission::new(Sampler::default(), Readers::One, 0);
        read(&admission, 0..40_000, false);
        assert!(admission.samples());
        // The sample is thin, and may have nothing to show for most of the first pass.
        for _ in 0..20 {
            read(&admission, 0..40_000, true);
        }
        assert!(!admission.samples());
        // One hit in twenty reads is enough.
        for round in 0..20_000_u64 {
            let all = read(&admission, round * 20..round * 20 + 19, false);
            assert_eq!(all + read(&admission, 0..1, true), 20);
        }
    }

    #[test]
    fn promises_that_are_not_kept_are_asked_for_twice() {
        let admission = Admission::new(Sampler::default(), Readers::One, 0);
        read(&admission, 0..OWN_CREDIT.unsigned_abs() + 1, false);
        let mut asked = Vec::new();
        for _ in 0..15 {
            let mut hits = 0;
            while admission.samples() {
                admission.note_sampled(hits, 1, 1, admission.sample(), ROOM);
                hits += 1;
            }
            asked.push(hits);
            read(&admission, 0..2 * OWN_CREDIT.unsigned_abs(), false);
            assert!(admission.samples());
        }
        assert_eq!(asked[..4], [3, 6, 12, 24]);
        assert_eq!(asked[13..], [3 << 9, 3 << 9]);
    }

    #[test]
    fn what_the_whole_cache_would_not_have_kept_is_no_evidence() {
        let admission = Admission::new(Sampler::default(), Readers::One, 0);
        read(&admission, 0..2 * OWN_CREDIT.unsigned_abs(), false);
        // A loop that is longer than guest and cache, all of whose sample the cache still has.
        let mut cached = HashSet::new();
        for _ in 0..10 {
            read_from(&admission, 100_000..200_000, |block| !cached.insert(block));
        }
        assert!(admission.samples());
        // None of this part may be in the sample until that is thick again.
        for _ in 0..40 {
            read(&admission, 100_000..140_000, true);
        }
        assert!(!admission.samples());
    }

    #[test]
    fn another_process_chooses_the_same_stretches() {
        let sampler = Sampler::default();
        let mut room = [0; 64];
        let sent = postcard::to_slice(&sampler, &mut room).unwrap();
        let other: Sampler = postcard::from_bytes(sent).unwrap();
        assert!((0..1 << 20).all(|block| sampler.takes(block) == other.takes(block)));
        assert_eq!(sampler.hash_one((3_u32, 5_u32)), other.hash_one((3_u32, 5_u32)));
        let stranger = Sampler::default();
        assert!((0..1 << 20).any(|block| sampler.takes(block) != stranger.takes(block)));
    }

    #[test]
    fn hashes_of_the_sample_are_the_smallest() {
        #[derive(Hash)]
        struct Key(u32, u32);
        let sampler = Sampler::default();
        for block in 0..100_000 {
            let hash = sampler.hash_one(Key(3, block));
            assert_eq!(hash < SAMPLED, sampler.takes(block.into()));
            for limit in (0..=THINNEST).map(|halvings| SAMPLED >> halvings) {
                assert_eq!(hash < limit, sampler.takes_below(block.into(), limit));
            }
        }
        assert_ne!(sampler.hash_one(Key(1, 5)), sampler.hash_one(Key(2, 5)));
    }
}
