//! Benchmarks: what is promised of samepage, measured beside what others need for the same.
//!
//! A benchmark runs both sides in turns on the same machine and prints ratios, which hold where times
//! would not. It fails when it can't measure, never because a figure is poor.

mod curves;
mod guest;
mod host;
mod lookahead;
mod measure;
mod monitor;
mod report;
mod rounds;
mod smaps;
mod types;

use std::fmt::Display;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::{process, setup};

pub use lookahead::{LookaheadArgs, LookaheadReport};
pub use report::StartupReport;
pub use types::{TypesArgs, TypesReport};

/// The benchmarks.
#[derive(Subcommand, Debug)]
pub enum Benchmark {
    /// Compare start-up time and memory of samepage and QEMU's microvm, with the same guests
    Startup(StartupArgs),
    /// Compare engines with and without lookahead on Linux guests that boot and work
    Lookahead(LookaheadArgs),
    /// Compare what is shared with and without what Linux guests say of their pages, and by type of pages
    Types(TypesArgs),
}

/// What of start-up to measure.
#[derive(Args, Debug)]
pub struct StartupArgs {
    /// Starts of each monitor and guest
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,

    /// Numbers of VMs at which memory is measured
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_value = "1,2,16,64",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub vms: Vec<u32>,

    /// Rounds of 32 VMs that come, share and go, before what the process keeps is measured
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,

    /// Print the results as JSON, and nothing else
    #[arg(long)]
    pub json: bool,
}

/// Runs a benchmark and prints its results.
///
/// # Errors
/// Something that it needs is missing, or a monitor doesn't start its guest.
pub fn run(benchmark: &Benchmark) -> Result<()> {
    match benchmark {
        Benchmark::Startup(args) => print(&startup(args)?, args.json),
        Benchmark::Lookahead(args) => print(&lookahead::measure(args)?, args.json),
        Benchmark::Types(args) => print(&types::measure(args)?, args.json),
    }
}

fn print<R: Display + Serialize>(report: &R, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

fn startup(args: &StartupArgs) -> Result<StartupReport> {
    if !process::succeeds(Command::new(monitor::QEMU).arg("--version")) {
        setup::install_packages(&["qemu-system-x86"])?;
    }
    host::check_kvm()?;
    let samepage = build_samepage()?;
    let guests = guest::Files::write()?;
    measure::startup(args, &samepage, &guests)
}

/// Builds samepage as it is released and returns the path of the program.
fn build_samepage() -> Result<PathBuf> {
    let build = ["build", "--release", "--package", "samepage", "--bin", "samepage"];
    let messages = process::build(&build)?;
    match process::executable(&messages) {
        Some(path) => Ok(path),
        None => bail!("cargo {} built no program; run it by hand to see why", build.join(" ")),
    }
}

/// The median, and the quartiles around it, of measurements that are sorted for it.
fn quartiles(mut samples: Vec<f64>) -> Result<[f64; 3]> {
    samples.sort_by(f64::total_cmp);
    let last = samples.len().checked_sub(1).context("nothing was measured")?;
    Ok([1, 2, 3].map(|quarter| {
        let place = last as f64 * f64::from(quarter) / 4.0;
        let (below, above) = (samples[place.floor() as usize], samples[place.ceil() as usize]);
        below + (above - below) * place.fract()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_samples() {
        assert_eq!(quartiles(vec![5.0, 1.0, 3.0, 2.0, 4.0]).unwrap(), [2.0, 3.0, 4.0]);
        assert_eq!(quartiles(vec![2.0, 1.0]).unwrap(), [1.25, 1.5, 1.75]);
        assert_eq!(quartiles(vec![7.0]).unwrap(), [7.0; 3]);
        assert!(quartiles(Vec::new()).is_err());
    }
}
