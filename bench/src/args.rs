//! The arguments of `samepage bench`.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};

use super::WORKLOADS;
use super::api::ApiArgs;
use super::block::BlockArgs;
use super::cache::CacheArgs;
use super::linux::lookahead::LookaheadArgs;
use super::linux::requests::RequestsArgs;
use super::linux::types::TypesArgs;
use super::replay::ReplayArgs;
use super::startup::StartupArgs;
use super::unpack::UnpackArgs;
use super::workers::WorkerArgs;

const EXAMPLES: &str = "\
Examples:
  Everything, in some minutes; KSM is measured where this runs as root:
    samepage bench sharing

  A first impression:
    samepage bench sharing --quick

  Snapshots of two VMs over time, through KSM and through samepage:
    samepage bench sharing --only series --series a-0.raw,a-1.raw --series b-0.raw,b-1.raw";

/// Compares samepage with other solutions for the same tasks.
#[derive(Debug, Parser)]
#[command(name = "samepage-bench", bin_name = "samepage bench", version, max_term_width = 100)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(super) benchmark: Benchmark,
}

/// The benchmarks.
#[derive(Debug, Subcommand)]
pub(super) enum Benchmark {
    /// Compare memory sharing with the kernel's KSM, alternately in one run, as ratios
    #[command(after_help = EXAMPLES)]
    Sharing(SharingArgs),
    /// Simulate reads of disk blocks through a guest's cache and the host's. Shows which policy keeps blocks
    /// that are read again, and the gain if the host does not keep blocks that guests hold
    CacheSimulation(ReplayArgs),
    /// Compare the policies for disk blocks in host memory. Guests read a disk through their own page caches,
    /// with each policy in turn, at equal memory
    Cache(CacheArgs),
    /// Measure how fast guests read and write disks, with several policies and compared with QEMU
    Block(BlockArgs),
    /// Measure requests per second at the control socket, and the time until a VM's first output, compared
    /// with `samepage run`
    Api(ApiArgs),
    /// Compare start-up time and memory of samepage and QEMU's microvm, with the same guests
    Startup(StartupArgs),
    /// Compare engines with and without lookahead on Linux guests that boot and work
    Lookahead(LookaheadArgs),
    /// Compare sharing with and without the page types that Linux guests publish, and by type
    Types(TypesArgs),
    /// Count exits and interrupts for each request to a disk and each frame, over MMIO and over PCI
    Requests(RequestsArgs),
    /// Compare the times to a kernel's first instruction by what the kernel is compressed by
    Unpack(UnpackArgs),
    /// Hold the memory of VMs for a benchmark of processes
    #[command(hide = true)]
    Worker(WorkerArgs),
}

/// The arguments of `samepage bench sharing`.
#[derive(Debug, Args)]
pub(super) struct SharingArgs {
    /// Measure only this workload; may be repeated
    #[arg(long = "only", value_name = "NAME", value_parser = PossibleValuesParser::new(WORKLOADS.iter().map(|w| w.name)))]
    pub(super) only: Vec<String>,

    /// Use small sizes and one round, for a first impression within seconds
    #[arg(long)]
    pub(super) quick: bool,

    /// Rounds of each measurement; medians are printed [default: 5, or 1 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) runs: Option<u32>,

    /// Raw memory images of one VM, in order of time; repeated for each VM. They replace the synthetic ones
    /// in the workload `series`
    #[arg(long = "series", value_name = "FILE,FILE...", value_parser = parse_series)]
    pub(super) series: Vec<Series>,

    /// CPU time of each side for each image in the workload `series`, in milliseconds [default: 0.3 µs for
    /// each page of memory]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) series_cpu_ms: Option<u64>,

    /// Draw the results of the workload `series` over time into this file, as SVG
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
