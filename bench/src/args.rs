//! The arguments of `samepage bench`.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};

use super::WORKLOADS;
use super::api::ApiArgs;
use super::block::BlockArgs;
use super::cache::CacheArgs;
use super::linux::lookahead::LookaheadArgs;
use super::linux::types::TypesArgs;
use super::replay::ReplayArgs;
use super::startup::StartupArgs;

const EXAMPLES: &str = "\
Examples:
  Everything, in some minutes; KSM is measured where this runs as root:
    samepage bench sharing

  A first impression:
    samepage bench sharing --quick

  Snapshots of two VMs over time, through KSM and through samepage:
    samepage bench sharing --only series --series a-0.raw,a-1.raw --series b-0.raw,b-1.raw";

/// Measures samepage beside what others need for the same.
#[derive(Debug, Parser)]
#[command(name = "samepage-bench", bin_name = "samepage bench", version, max_term_width = 100)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(super) benchmark: Benchmark,
}

/// The benchmarks.
#[derive(Debug, Subcommand)]
pub(super) enum Benchmark {
    /// Compare memory sharing with the kernel's KSM: both in one run, in turns, as ratios
    #[command(after_help = EXAMPLES)]
    Sharing(SharingArgs),
    /// Replay reads of disk blocks through a guest's cache and the host's: which policy keeps what is read
    /// again, and what the host gains by not keeping what guests hold
    CacheSimulation(ReplayArgs),
    /// Compare what the host's memory does with disk blocks: guests read a disk through page caches of their
    /// own, with each policy in turn, at equal memory
    Cache(CacheArgs),
    /// Measure how fast guests read and write disks, with several policies and beside QEMU
    Block(BlockArgs),
    /// Measure how many requests the control socket answers, and how soon a VM that a client creates says
    /// something, beside `samepage run`
    Api(ApiArgs),
    /// Compare start-up time and memory of samepage and QEMU's microvm, with the same guests
    Startup(StartupArgs),
    /// Compare engines with and without lookahead on Linux guests that boot and work
    Lookahead(LookaheadArgs),
    /// Compare what is shared with and without what Linux guests say of their pages, and by type of pages
    Types(TypesArgs),
}

/// The arguments of `samepage bench sharing`.
#[derive(Debug, Args)]
pub(super) struct SharingArgs {
    /// Measure this workload alone; may be repeated
    #[arg(long = "only", value_name = "NAME", value_parser = PossibleValuesParser::new(WORKLOADS.iter().map(|w| w.name)))]
    pub(super) only: Vec<String>,

    /// Small sizes and one round: a first impression within some seconds
    #[arg(long)]
    pub(super) quick: bool,

    /// Rounds of each measurement; medians are printed [default: 5, or 1 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) runs: Option<u32>,

    /// Memory images of one VM, raw, in the order of time; repeated for each VM. They take the place of
    /// the made-up ones in the workload `series`
    #[arg(long = "series", value_name = "FILE,FILE...", value_parser = parse_series)]
    pub(super) series: Vec<Series>,

    /// CPU time that each side of the workload `series` has from one image to the next, in milliseconds
    /// [default: 0.3 µs for each page of memory]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) series_cpu_ms: Option<u64>,

    /// Draw what the workload `series` measures over time into this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub(super) svg: Option<PathBuf>,

    /// Print the results as JSON, and nothing else
    #[arg(long)]
    pub(super) json: bool,
}

/// The images of one VM.
#[derive(Clone, Debug)]
pub(super) struct Series(pub(super) Vec<PathBuf>);

fn parse_series(text: &str) -> Result<Series, String> {
    let files: Vec<PathBuf> = text.split(',').map(PathBuf::from).collect();
    if files.iter().any(|file| file.as_os_str().is_empty()) {
        return Err("give files separated by commas, as in vm-0.raw,vm-1.raw".to_owned());
    }
    Ok(Series(files))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        BenchArgs::command().debug_assert();
    }
}
