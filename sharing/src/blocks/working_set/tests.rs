//! Curves against exact ones, of whole traces.

use std::collections::{BTreeMap, HashMap};

use super::*;

/// Hashes that are the same in each run.
#[derive(Debug)]
struct Fixed;

impl BuildHasher for Fixed {
    type Hasher = std::hash::DefaultHasher;

    fn build_hasher(&self) -> Self::Hasher {
        Self::Hasher::new()
    }
}

/// Blocks of the guest's own memory, and of its data.
const GUEST: u32 = 5000;
const DATA: u32 = 50_000;
const READS: u32 = 600_000;

/// A window beside which the traces are short, so that all of their reads count the same.
const LONG: u32 = 1 << 27;

fn numbers() -> impl FnMut() -> f64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn uniform() -> Vec<u32> {
    let mut number = numbers();
    (0..READS).map(|_| (number() * f64::from(DATA)) as u32).collect()
}

fn zipf(exponent: f64) -> Vec<u32> {
    let mut number = numbers();
    let sums: Vec<f64> = (1..=DATA)
        .scan(0.0, |sum, rank| {
            *sum += f64::from(rank).powf(-exponent);
            Some(*sum)
        })
        .collect();
    let all = sums[sums.len() - 1];
    let mut read = || {
        let chance = number() * all;
        sums.partition_point(|&sum| sum <= chance) as u32
    };
    (0..READS).map(|_| read()).collect()
}

/// Zipf 0.9, with every third read going round a loop of other blocks.
fn loop_and_zipf() -> Vec<u32> {
    let mut reads = zipf(0.9);
    for (turn, read) in reads.iter_mut().step_by(3).enumerate() {
        *read = DATA + turn as u32 % 20_000;
    }
    reads
}

/// For each read, how many others were read since that block was; all of them are kept.
fn depths(reads: &[u32]) -> Vec<Option<usize>> {
    // A one for each block, at its latest read; sums of them by halves of the trace.
    let size = reads.len().next_power_of_two();
    let mut ones = vec![0_u32; size * 2];
    let mut set = |place: usize, one: bool| {
        let mut node = size + place;
        while node > 0 {
            if one {
                ones[node] += 1
            } else {
                ones[node] -= 1
            };
            node /= 2;
        }
        // Ones after the place.
        let mut after = 0;
        let mut node = size + place;
        while node > 1 {
            after += if node.is_multiple_of(2) { ones[node + 1] } else { 0 };
            node /= 2;
        }
        after as usize
    };
    let mut last = HashMap::new();
    let mut depth = |(turn, &read)| {
        let depth = last.insert(read, turn).map(|last| set(last, false));
        set(turn, true);
        depth
    };
    reads.iter().enumerate().map(&mut depth).collect()
}

/// The estimator after a trace, and the depths of its misses beyond the guest's memory.
fn above_guest(reads: &[u32], settings: Settings) -> (WorkingSet<Fixed>, Vec<Option<usize>>) {
    let mut estimator = WorkingSet::with_hashes(settings, Fixed);
    let (mut times, mut order) = (HashMap::new(), BTreeMap::new());
    for (turn, &read) in reads.iter().enumerate() {
        match times.insert(read, turn) {
            Some(last) => {
                order.remove(&last);
            }
            None => {
                estimator.missed(read);
                if order.len() == GUEST as usize {
                    let (_, victim) = order.pop_first().expect("the guest's memory is full");
                    times.remove(&victim);
                    estimator.evicted(victim);
                }
            }
        }
        order.insert(turn, read);
    }
    let depths = depths(reads).into_iter();
    let beyond = depths.filter(|depth| depth.is_none_or(|depth| depth >= GUEST as usize));
    (estimator, beyond.map(|depth| Some(depth? - GUEST as usize)).collect())
}

/// The mean distance of a curve from that of these depths.
fn error(curve: &Curve, depths: &[Option<usize>]) -> f64 {
    let sizes = (0..100).map(|part| part * DATA as usize * 2 / 100);
    let difference = |size: usize| {
        let missed = depths.iter().filter(|depth| depth.is_none_or(|depth| depth >= size)).count();
        (curve.miss_ratio(size as u64) - missed as f64 / depths.len() as f64).abs()
    };
    sizes.map(difference).sum::<f64>() / 100.0
}

fn traces() -> [(&'static str, Vec<u32>); 5] {
    let zipfs = [("Zipf 0.6", 0.6), ("Zipf 0.9", 0.9), ("Zipf 1.2", 1.2)];
    let [a, b, c] = zipfs.map(|(name, exponent)| (name, zipf(exponent)));
    [a, b, c, ("uniform", uniform()), ("loop and Zipf 0.9", loop_and_zipf())]
}

#[test]
fn curves_above_a_guests_memory_are_right() {
    for (name, reads) in traces() {
        let settings = Settings { sight: Sight::Evictions, window: LONG };
        let (estimator, depths) = above_guest(&reads, settings);
        let curve = estimator.curve();
        let error = error(&curve, &depths);
        assert!(error < 0.02, "{name}: {error}");
        assert!((estimator.misses() / depths.len() as f64 - 1.0).abs() < 0.01);
        assert!(estimator.bytes() <= 512 << 10, "{name}: {}", estimator.bytes());
    }
}

#[test]
fn curves_of_misses_alone_are_right() {
    for (name, reads) in traces() {
        let mut estimator = WorkingSet::with_hashes(Settings { sight: Sight::Misses, window: LONG }, Fixed);
        for &read in &reads {
            estimator.missed(read);
            estimator.evicted(read);
        }
        let error = error(&estimator.curve(), &depths(&reads));
        assert!(error < 0.02, "{name}: {error}");
        assert!(estimator.bytes() <= 512 << 10, "{name}: {}", estimator.bytes());
    }
}

#[test]
fn a_few_blocks_are_counted_exactly() {
    let mut estimator = WorkingSet::with_hashes(Settings { sight: Sight::Evictions, window: LONG }, Fixed);
    assert_eq!((estimator.curve().working_set(), estimator.curve().floor()), (0, 1.0));
    // A loop over 30 blocks in memory for 20: each is given up 10 blocks before it is read again.
    for turn in 0..30_000_u32 {
        estimator.missed(turn % 30);
        if turn >= 20 {
            estimator.evicted((turn - 20) % 30);
        }
    }
    let curve = estimator.curve();
    assert_eq!(estimator.sampling_rate(), 1.0);
    assert_eq!((curve.miss_ratio(9), curve.working_set()), (1.0, 10));
    assert!((curve.miss_ratio(10) - 0.001).abs() < 1e-4, "{}", curve.miss_ratio(10));
}

#[test]
fn a_working_set_that_moves_on_is_followed() {
    let window = 20_000;
    let mut estimator = WorkingSet::with_hashes(Settings { sight: Sight::Evictions, window }, Fixed);
    // All blocks of a loop are given up before they are read again.
    let mut run = |start: u32, blocks: u32, reads: u32| {
        for turn in 0..reads {
            estimator.missed(start + turn % blocks);
            estimator.evicted(start + turn % blocks);
        }
        (estimator.curve().working_set(), estimator.sampling_rate())
    };
    let (large, rate) = run(0, 40_000, 400_000);
    assert!((38_000..42_000).contains(&large) && rate < 0.3, "{large}, {rate}");
    let (small, rate) = run(1 << 20, 1000, 400_000);
    assert!((950..1050).contains(&small), "{small}");
    assert!(rate > 0.3, "as few are followed as before: {rate}");
    let (large, rate) = run(0, 40_000, 400_000);
    assert!((38_000..42_000).contains(&large) && rate < 0.3, "{large}, {rate}");
}

#[test]
fn a_sample_of_the_disk_tells_of_all_of_it() {
    use crate::blocks::admission::{SAMPLED, Sampler};
    // A loop of which each block is given up 200,000 blocks before it is read again.
    let (blocks, held) = (400_000_u32, 200_000_u32);
    let sampler = Sampler::default();
    let settings = Settings { sight: Sight::Evictions, window: LONG };
    let mut estimator = WorkingSet::with_hashes(settings, sampler.clone());
    estimator.follow_below(0, SAMPLED);
    let mut passed = 0;
    for turn in 0..5 * blocks {
        if sampler.takes((turn % blocks).into()) {
            estimator.passed(std::mem::take(&mut passed));
            estimator.missed(turn % blocks);
        } else {
            passed += 1;
        }
        if turn >= held && sampler.takes(((turn - held) % blocks).into()) {
            estimator.evicted((turn - held) % blocks);
        }
    }
    let curve = estimator.curve();
    // The blocks that were given up since are the other half of the loop.
    let wanted = curve.working_set();
    assert!((150_000..250_000).contains(&wanted), "{wanted}");
    assert!((curve.miss_ratio(300_000) - 0.2).abs() < 0.05, "{}", curve.miss_ratio(300_000));
    assert!((estimator.misses() / f64::from(5 * blocks) - 1.0).abs() < 0.02, "{}", estimator.misses());
    // When all is told again it is followed at once, and counts in time.
    estimator.follow_below(0, u64::MAX);
    assert!(estimator.sampling_rate() < 0.01);
}

#[test]
fn disks_with_samples_of_different_sizes_are_followed_alike() {
    use crate::blocks::admission::{SAMPLED, Sampler};
    // Two loops of which each block is given up half a loop before it is read again, the second on a disk with
    // a sample of half the size.
    let (blocks, held) = (400_000_u32, 200_000_u32);
    let sampler = Sampler::default();
    let settings = Settings { sight: Sight::Evictions, window: LONG };
    let mut estimator = WorkingSet::with_hashes(settings, sampler.clone());
    let key = |disk: usize, block: u32| (disk as u32, block);
    let limits = [SAMPLED, SAMPLED >> 1];
    let is_told = |disk: usize, block: u32| {
        sampler.takes(block.into()) && sampler.hash_one(key(disk, block)) < limits[disk]
    };
    let mut passed = [0, 0];
    for turn in 0..4 * blocks {
        for disk in 0..2 {
            let block = turn % blocks;
            if is_told(disk, block) {
                estimator.follow_below(disk, limits[disk]);
                estimator.passed(std::mem::take(&mut passed[disk]));
                estimator.missed(key(disk, block));
            } else {
                passed[disk] += 1;
            }
            if turn >= held && is_told(disk, (turn - held) % blocks) {
                estimator.evicted(key(disk, (turn - held) % blocks));
            }
        }
    }
    let rate = 1.0 / f64::from(256 << 1);
    assert!((estimator.sampling_rate() / rate - 1.0).abs() < 0.01, "{}", estimator.sampling_rate());
    let expected = f64::from(2 * 4 * blocks);
    assert!((estimator.misses() / expected - 1.0).abs() < 0.02, "{}", estimator.misses());
    // What was given up since is half of either loop. The sample has a hundred stretches of each.
    let wanted = estimator.curve().working_set();
    assert!((250_000..550_000).contains(&wanted), "{wanted}");
    // Once the thin one is all let in, the other's limit holds.
    estimator.follow_below(1, u64::MAX);
    assert!(estimator.sampling_rate() < 1.0 / 255.0);
}

#[test]
fn memory_is_bounded_whatever_is_read() {
    let mut estimator = WorkingSet::with_hashes(Settings::default(), Fixed);
    assert!(estimator.bytes() < 16 << 10, "{}", estimator.bytes());
    let mut most = 0;
    for block in 0..1_500_000_u32 {
        estimator.missed(block);
        estimator.evicted(block);
        if block % 1024 == 0 {
            most = most.max(estimator.bytes());
        }
    }
    assert!(most <= 512 << 10, "{most}");
    let curve = estimator.curve();
    assert!(curve.floor() > 0.99 && curve.working_set() == 0 && curve.points().len() < 10);
}
