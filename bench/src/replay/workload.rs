//! Reads, synthetic or from a file.

use std::fmt;
use std::fs;
use std::num::NonZeroU32;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use hashbrown::HashMap;

use super::Sizes;

/// Synthetic reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Workload {
    /// Independent reads. The probability of the block with rank r is proportional to r to the power of minus
    /// this.
    Zipf(f64),
    /// Zipf 0.9. At every tenth read, two blocks exchange their ranks, so the most popular blocks change.
    MovingZipf,
    /// All blocks with equal probability.
    Uniform,
    /// All blocks in a repeated order.
    Loop,
    /// Nine tenths as many blocks as both caches hold, in a repeated order.
    FittingLoop,
    /// Zipf 0.9 over one half of the data. Every fourth read continues a scan of the other half.
    ScanOverZipf,
}

impl Workload {
    pub(super) const ALL: [Self; 8] = [
        Self::Zipf(0.6),
        Self::Zipf(0.9),
        Self::Zipf(1.2),
        Self::MovingZipf,
        Self::Uniform,
        Self::Loop,
        Self::FittingLoop,
        Self::ScanOverZipf,
    ];

    /// Returns this number of reads.
    pub(super) fn reads(self, sizes: Sizes, count: u32, seed: NonZeroU32) -> Vec<u32> {
        let mut numbers = Numbers(u64::from(seed.get()));
        let data = sizes.data;
        match self {
            Self::Zipf(exponent) => {
                let zipf = Zipf::new(data, exponent);
                (0..count).map(|_| zipf.next(&mut numbers)).collect()
            }
            Self::MovingZipf => {
                let zipf = Zipf::new(data, 0.9);
                let mut blocks: Vec<u32> = (0..data).collect();
                let read = |read: u32| {
                    if read.is_multiple_of(10) {
                        let [one, other] = [(); 2].map(|()| numbers.below(data) as usize);
                        blocks.swap(one, other);
                    }
                    blocks[zipf.next(&mut numbers) as usize]
                };
                (0..count).map(read).collect()
            }
            Self::Uniform => (0..count).map(|_| numbers.below(data)).collect(),
            Self::Loop => (0..count).map(|read| read % data).collect(),
            Self::FittingLoop => {
                let blocks = ((u64::from(sizes.guest) + u64::from(sizes.host)) * 9 / 10) as u32;
                (0..count).map(|read| read % blocks.max(1)).collect()
            }
            Self::ScanOverZipf => {
                let zipf = Zipf::new(data / 2, 0.9);
                let scanned = data - data / 2;
                let read = |read: u32| match read % 4 {
                    0 => data / 2 + read / 4 % scanned,
                    _ => zipf.next(&mut numbers),
                };
                (0..count).map(read).collect()
            }
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zipf(exponent) => write!(f, "Zipf {exponent}"),
            Self::MovingZipf => f.write_str("moving Zipf 0.9"),
            Self::Uniform => f.write_str("uniform"),
            Self::Loop => f.write_str("loop"),
            Self::FittingLoop => f.write_str("loop of 0.9 (guest + host)"),
            Self::ScanOverZipf => f.write_str("scan over Zipf 0.9"),
        }
    }
}

/// Reads from a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Trace {
    /// Blocks, numbered in the order of their first reads.
    pub(super) reads: Vec<u32>,
    /// Number of distinct blocks.
    pub(super) blocks: u32,
}

/// Reads a file of block numbers: text, or 8 bytes each if its name ends in `.u64`.
pub(super) fn read_trace(path: &Path) -> Result<Trace> {
    let bytes = fs::read(path).with_context(|| format!("the trace {} cannot be read", path.display()))?;
    let blocks: Vec<u64> = if path.extension().is_some_and(|extension| extension == "u64") {
        let (numbers, rest) = bytes.as_chunks::<8>();
        ensure!(
            rest.is_empty(),
            "the trace {} ends within a number: its length is no multiple of 8",
            path.display()
        );
        numbers.iter().map(|&number| u64::from_le_bytes(number)).collect()
    } else {
        let text = String::from_utf8(bytes).with_context(|| {
            format!("the trace {} is no text; name it .u64 if its numbers are binary", path.display())
        })?;
        let number = |(index, line): (usize, &str)| {
            line.trim().parse().with_context(|| {
                format!("line {} of the trace {} is no block number: {line:?}", index + 1, path.display())
            })
        };
        text.lines().enumerate().map(number).collect::<Result<_>>()?
    };
    let mut known = HashMap::new();
    let mut reads = Vec::with_capacity(blocks.len());
    for block in blocks {
        let next = known.len() as u32;
        ensure!(next < u32::MAX, "the trace {} reads too many different blocks", path.display());
        reads.push(*known.entry(block).or_insert(next));
    }
    Ok(Trace { reads, blocks: known.len() as u32 })
}

/// Ranks by Zipf's law.
struct Zipf {
    /// For each rank, the probability of this or a lower rank.
    chances: Vec<f64>,
}

impl Zipf {
    fn new(blocks: u32, exponent: f64) -> Self {
        let weights = (1..=blocks).map(|rank| f64::from(rank).powf(-exponent));
        let sums = weights.scan(0.0, |sum, weight| {
            *sum += weight;
            Some(*sum)
        });
        let mut chances: Vec<_> = sums.collect();
        let all = chances.last().copied().unwrap_or(1.0);
        chances.iter_mut().for_each(|chance| *chance /= all);
        Self { chances }
    }

    fn next(&self, numbers: &mut Numbers) -> u32 {
        let chance = (numbers.next() >> 11) as f64 / (1_u64 << 53) as f64;
        let rank = self.chances.partition_point(|&sum| sum <= chance);
        rank.min(self.chances.len() - 1) as u32
    }
}

/// Pseudorandom numbers: SplitMix64 of Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators" (OOPSLA 2014).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    fn below(&mut self, limit: u32) -> u32 {
        (((self.next() >> 32) * u64::from(limit)) >> 32) as u32
    }
}

/// Returns a number that depends on every bit of another.
pub(super) fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zipf_law_holds() {
        let zipf = Zipf::new(1000, 1.0);
        let mut numbers = Numbers(1);
        let mut counts = vec![0_u32; 1000];
        (0..200_000).for_each(|_| counts[zipf.next(&mut numbers) as usize] += 1);
        let ratio = f64::from(counts[0]) / f64::from(counts[9]);
        assert!((8.0..12.0).contains(&ratio), "{ratio}");
        assert!(counts[900..].iter().any(|&count| count > 0));
    }

    #[test]
    fn a_trace_is_text_or_binary_and_its_faults_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let (text, binary) = (folder.path().join("a.txt"), folder.path().join("a.u64"));
        fs::write(&text, "7\n900000000000\n7\n").expect("write");
        let numbers = [7_u64, 900_000_000_000, 7].map(u64::to_le_bytes).concat();
        fs::write(&binary, &numbers).expect("write");
        let trace = Trace { reads: vec![0, 1, 0], blocks: 2 };
        assert_eq!(read_trace(&text).expect("text"), trace);
        assert_eq!(read_trace(&binary).expect("binary"), trace);
        fs::write(&binary, &numbers[1..]).expect("write");
        assert!(read_trace(&binary).expect_err("cut").to_string().contains("no multiple of 8"));
        fs::write(&text, "7\nx\n").expect("write");
        assert!(read_trace(&text).expect_err("a letter").to_string().contains("line 2"));
    }
}
