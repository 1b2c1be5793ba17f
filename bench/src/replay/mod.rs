//! `samepage bench cache-simulation`: simulates reads of disk blocks through two caches, a guest's page cache
//! and the host's. The results are the hits of both, by the host's policy for eviction (all of [`policies`]).
//! The host keeps either all blocks (inclusive), or only blocks that guests evicted (exclusive).
//!
//! Sizes are in blocks. Everything depends only on the seed: two runs have the same results.

mod guest;
mod host;
mod policies;
mod report;
#[cfg(test)]
mod tests;
mod workload;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::thread;

use anyhow::{Result, bail};
use clap::Args;

pub(super) use report::Report;

use guest::Misses;
use host::Use;
use policies::Policy;
use report::{Cell, Row};
use workload::Workload;

/// Sizes of the host's cache, as multiples of the guest's.
const HOSTS: [f64; 3] = [0.5, 1.0, 2.0];
/// Size of the data, as a multiple of both caches.
const DATA: f64 = 2.0;
/// Precision of the inclusive cache's size with equal hits, as a part of the exclusive one's size.
const PRECISION: f64 = 0.02;

const EXAMPLES: &str = "\
Examples:
  Everything, in a minute or two:
    samepage bench cache-simulation

  Reads that were recorded, one block number on each line:
    samepage bench cache-simulation --trace reads.txt --json";

/// The arguments of `samepage bench cache-simulation`.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ReplayArgs {
    /// Reads to use in place of synthetic ones: block numbers, one on each line, or 8 bytes each,
    /// little-endian, if the name ends in .u64. May be repeated
    #[arg(long = "trace", value_name = "FILE")]
    pub(super) traces: Vec<PathBuf>,

    /// Size of the guest's cache for synthetic reads. With a trace, its distinct blocks are the data, and the
    /// caches depend on their number
    #[arg(long, value_name = "BLOCKS", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(16..=1 << 24))]
    pub(super) guest: u32,

    /// Synthetic reads of each workload; the first half fills the caches and is not counted
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1000..=1_000_000_000))]
    pub(super) reads: u32,

    /// Seed of the synthetic reads
    #[arg(long, value_name = "N", default_value = "1")]
    pub(super) seed: NonZeroU32,

    /// Print the results as JSON, and nothing else
    #[arg(long)]
    pub(super) json: bool,
}

/// Simulates everything.
///
/// # Errors
/// Fails if a trace cannot be read or is too short.
pub(super) fn measure(args: &ReplayArgs) -> Result<Report> {
    let mut rows = Vec::new();
    if args.traces.is_empty() {
        for workload in Workload::ALL {
            for host in HOSTS {
                let sizes = Sizes::of_guest(args.guest, host);
                let reads = workload.reads(sizes, args.reads, args.seed);
                rows.push(replay(workload.to_string(), &reads, sizes));
            }
        }
    }
    for path in &args.traces {
        let trace = workload::read_trace(path)?;
        for host in HOSTS {
            let sizes = Sizes::of_data(trace.blocks, host);
            if sizes.guest == 0 || sizes.host == 0 {
                bail!(
                    "{} reads {} different blocks, too few for two caches: record more reads",
                    path.display(),
                    trace.blocks
                );
            }
            rows.push(replay(path.display().to_string(), &trace.reads, sizes));
        }
    }
    Ok(Report { seed: args.seed.get(), rows })
}

/// Sizes, in blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sizes {
    guest: u32,
    host: u32,
    data: u32,
    /// The host's cache as a multiple of the guest's.
    ratio: f64,
}

impl Sizes {
    fn of_guest(guest: u32, ratio: f64) -> Self {
        let host = (f64::from(guest) * ratio).round();
        let data = ((f64::from(guest) + host) * DATA).round();
        Self { guest, host: host as u32, data: data as u32, ratio }
    }

    fn of_data(data: u32, ratio: f64) -> Self {
        let guest = (f64::from(data) / DATA / (1.0 + ratio)).round();
        Self { guest: guest as u32, host: (guest * ratio).round() as u32, data, ratio }
    }
}

/// Simulates reads with each policy, for both kinds of host caches.
fn replay(workload: String, reads: &[u32], sizes: Sizes) -> Row {
    let misses = Misses::of(reads, sizes.guest);
    let cell = &|policy| {
        let hits = |usage, blocks| host::hits(&misses, policy, usage, blocks, sizes.data);
        let [inclusive, exclusive] = [Use::Inclusive, Use::Exclusive].map(|usage| hits(usage, sizes.host));
        // Without hits, any size is equal.
        let equal =
            (exclusive > 0).then(|| least_for(exclusive, sizes, |blocks| hits(Use::Inclusive, blocks)));
        Cell::new(policy, &misses, sizes, [inclusive, exclusive], equal)
    };
    let cells = thread::scope(|scope| {
        let threads = Policy::ALL.map(|policy| scope.spawn(move || cell(policy)));
        threads.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    Row::new(workload, &misses, sizes, cells)
}

/// Returns the least size with which an inclusive cache has this many hits, given a function for the hits of
/// a size. A cache of all data has every possible hit.
fn least_for(wanted: u64, sizes: Sizes, hits: impl Fn(u32) -> u64) -> u32 {
    let (mut few, mut enough) = (0, sizes.data);
    let step = (f64::from(sizes.host) * PRECISION).max(1.0) as u32;
    while enough - few > step {
        let middle = few + (enough - few) / 2;
        if hits(middle) >= wanted {
            enough = middle;
        } else {
            few = middle;
        }
    }
    enough
}
