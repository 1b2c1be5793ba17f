//! `samepage bench`, a separate program, so that the product contains no benchmarks.
//!
//! `samepage bench sharing` compares the sharing engine with the kernel's KSM on the same memory, alternately
//! in one process and one run. It prints ratios, because these are stable where times are not. [`replay`]:
//! `samepage bench cache-simulation`, [`cache`]: `samepage bench cache`, [`block`]: `samepage bench block`,
//! [`startup`]: `samepage bench startup`, [`unpack`]: `samepage bench unpack`, [`linux`]: `samepage bench lookahead`,
//! `samepage bench types` and `samepage bench requests`.
//!
//! A benchmark fails if it cannot measure, never because of a poor figure. KSM's settings are restored in
//! every case. See `docs/bench-sharing.md`.

mod api;
mod args;
mod block;
mod cache;
mod changing;
mod chart;
mod context;
mod cpu;
mod delivery;
mod disk;
mod duplicates;
mod fragmented;
mod frames;
mod host;
mod images;
mod kernels;
mod ksm;
mod layout;
mod linux;
mod locks;
mod lookahead;
mod memory;
mod monitor;
mod ours;
mod program;
mod qemu;
mod replay;
mod report;
mod returns;
mod runs;
mod series;
mod sharers;
mod startup;
mod state;
mod table;
mod unpack;
mod vms;
mod workers;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use samepage_process::tell::{causes, tell};

use args::{BenchArgs, Benchmark, SharingArgs};
use chart::Chart;
use context::{Bench, Interrupted};
use report::{Failure, Report, Section};

/// A measurement, or several related ones.
struct Workload {
    /// The name for `--only`.
    name: &'static str,
    /// Measures. An error says what could not be measured. If this host cannot run a workload, or lacks KSM,
    /// the sections say so.
    measure: fn(&Bench) -> Result<Vec<Section>>,
}

/// The workload that measures over time.
const SERIES: &str = "series";

/// All workloads in the order of running.
const WORKLOADS: &[Workload] = &[
    Workload { name: "runs", measure: runs::measure },
    Workload { name: "returns", measure: returns::measure },
    Workload { name: "duplicates", measure: duplicates::measure },
    Workload { name: "fragmented", measure: fragmented::measure },
    Workload { name: "lookahead", measure: lookahead::measure },
    Workload { name: "changing", measure: changing::measure },
    Workload { name: SERIES, measure: series::measure },
    Workload { name: "sharers", measure: sharers::measure },
    Workload { name: "state", measure: state::measure },
    Workload { name: "delivery", measure: delivery::measure },
    Workload { name: "locks", measure: locks::measure },
    Workload { name: "found", measure: vms::found },
    Workload { name: "share", measure: vms::share },
    Workload { name: "idle", measure: vms::idle },
    Workload { name: "breaks", measure: vms::breaks },
    Workload { name: "faults", measure: vms::faults },
    Workload { name: "slowdown", measure: vms::slowdown },
    Workload { name: "tlb", measure: vms::tlb },
    Workload { name: "workers", measure: workers::measure },
];

fn main() -> ExitCode {
    // A wrong command line ends the process here, with status 2.
    run(&BenchArgs::parse()).unwrap_or_else(|error| {
        tell(causes(&error));
        ExitCode::from(1)
    })
}

/// Runs the command.
fn run(args: &BenchArgs) -> Result<ExitCode> {
    let result =
        match &args.benchmark {
            Benchmark::Worker(args) => workers::serve(*args).map(|()| ExitCode::SUCCESS),
            Benchmark::Sharing(args) => compare_sharing(args),
            Benchmark::CacheSimulation(args) => {
                replay::measure(args).and_then(|report| print(args.json, &report, replay::Report::format))
            }
            Benchmark::Cache(args) => {
                cache::measure(args).and_then(|report| print(args.json, &report, cache::Report::format))
            }
            Benchmark::Block(args) => {
                block::measure(args).and_then(|report| print(args.json, &report, block::Report::format))
            }
            Benchmark::Api(args) => {
                api::measure(args).and_then(|report| print(args.json, &report, api::Report::format))
            }
            Benchmark::Startup(args) => {
                startup::measure(args).and_then(|report| print(args.json, &report, ToString::to_string))
            }
            Benchmark::Lookahead(args) => linux::lookahead::measure(args)
                .and_then(|report| print(args.json, &report, ToString::to_string)),
            Benchmark::Types(args) => {
                linux::types::measure(args).and_then(|report| print(args.json, &report, ToString::to_string))
            }
            Benchmark::Requests(args) => linux::requests::measure(args)
                .and_then(|report| print(args.json, &report, ToString::to_string)),
            Benchmark::Unpack(args) => {
                unpack::measure(args).and_then(|report| print(args.json, &report, ToString::to_string))
            }
        };
    result.or_else(|error| match error.downcast_ref::<Interrupted>() {
        Some(interrupted) => {
            tell(interrupted);
            Ok(ExitCode::from(interrupted.status()))
        }
        None => Err(error),
    })
}

/// Prints results as JSON or as text.
fn print<R: serde::Serialize>(as_json: bool, report: &R, format: fn(&R) -> String) -> Result<ExitCode> {
    let text = if as_json { serde_json::to_string_pretty(report)? + "\n" } else { format(report) };
    io::stdout().lock().write_all(text.as_bytes()).context("print the results")?;
    Ok(ExitCode::SUCCESS)
}

fn compare_sharing(args: &SharingArgs) -> Result<ExitCode> {
    let report = sharing(args)?;
    print(args.json, &report, table::format)?;
    if let Some(path) = &args.svg {
        let drawn =
            report.sections.iter().find_map(|section| Some((&section.title, section.curves.as_ref()?)));
        let (title, curves) = drawn.context("there is nothing to draw")?;
        let title = title.split(':').next().unwrap_or(title);
        std::fs::write(path, Chart::numbered(title, curves).draw()?)
            .with_context(|| format!("the picture cannot be written to {}", path.display()))?;
    }
    Ok(if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn sharing(args: &SharingArgs) -> Result<Report> {
    let started = Instant::now();
    let chosen: Vec<_> = WORKLOADS
        .iter()
        .filter(|workload| args.only.is_empty() || args.only.iter().any(|name| name == workload.name))
        .collect();
    let over_time = chosen.iter().any(|workload| workload.name == SERIES);
    ensure!(
        args.svg.is_none() || over_time,
        "--svg draws what the workload {SERIES} measures: give --only {SERIES} too"
    );
    let mut bench = Bench::new(args)?;
    let (mut sections, mut failures) = (Vec::new(), Vec::new());
    for (index, workload) in chosen.iter().enumerate() {
        bench.begin(format!("[{}/{}] {}", index + 1, chosen.len(), workload.name));
        match (workload.measure)(&bench) {
            Ok(measured) => sections.extend(measured.into_iter().map(|section| section.of(workload.name))),
            Err(error) if error.is::<Interrupted>() => return Err(error),
            // The results of the other workloads are useful nevertheless.
            Err(error) => failures.push(Failure::new(workload.name, &error)),
        }
        bench.end();
    }
    Ok(Report::new(&bench, sections, failures, started.elapsed()))
}
