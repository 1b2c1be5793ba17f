//! Measures the effect of page types. Two Linux guests boot, read files, write files as a build does, and use and free
//! memory: without agents, with agents, and with agents while only some types are shared. The question is whether
//! sharing the content of files is worth its cost, because that content is overwritten.
//!
//! Each scenario gets its own guests, which do the same work, one pair after the other. With several rounds, the order
//! is reversed each time, and figures are medians.

mod report;
mod run;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use samepage_machine::Hypervisor;

use super::LinuxGuest;
use crate::chart::Chart;
use crate::host::Host;
use crate::program;
pub(crate) use report::TypesReport;
use run::{Round, Scenario};

/// The arguments of `samepage bench types`.
#[derive(Args, Debug)]
pub(crate) struct TypesArgs {
    #[command(flatten)]
    guest: LinuxGuest,

    /// Rounds
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,

    /// Limit of CPU time for sharing, in percent of a core
    #[arg(long, value_name = "PERCENT", default_value_t = 10.0)]
    pub(crate) cpu: f64,

    /// Print the results as JSON, and nothing else
    #[arg(long)]
    pub(crate) json: bool,

    /// Draw shared pages over time into this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

/// The scenarios, the baseline first.
const SCENARIOS: [Scenario; 4] = [
    Scenario { name: "no agent, all is shared", has_agent: false, engine: "" },
    Scenario { name: "with agents, all is shared", has_agent: true, engine: "" },
    Scenario { name: "all but content of files", has_agent: true, engine: "types=not-file" },
    Scenario { name: "content of files alone", has_agent: true, engine: "types=file" },
];

/// Measures all scenarios, and draws the result if the arguments ask for a picture.
pub(crate) fn measure(args: &TypesArgs) -> Result<TypesReport> {
    Hypervisor::open()?;
    let samepage = program::path()?;
    let mut host = Host::look()?;
    let mut rounds: Vec<Vec<Round>> = SCENARIOS.iter().map(|_| Vec::new()).collect();
    for round in 0..args.runs {
        let mut order: Vec<_> = (0..SCENARIOS.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let scenario = SCENARIOS[index];
            eprintln!("round {} of {}: {}", round + 1, args.runs, scenario.name);
            rounds[index].push(run::run(&samepage, &args.guest, scenario, args.cpu)?);
        }
    }
    host.look_again()?;
    let report = TypesReport::new(host, SCENARIOS.into_iter().zip(rounds).collect())?;
    if let Some(path) = &args.svg {
        fs::write(path, draw(&report)?).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(report)
}

fn draw(report: &TypesReport) -> Result<String> {
    let title =
        format!("Pages saved by sharing, by what is shared: two Linux guests of {} MiB", report.guest_mib);
    let curve = |row: &report::Row| Some(row.rounds.last()?.moments.curve(row.scenario.name));
    Chart::over_time(&title, "pages", report.rows.iter().filter_map(curve).collect()).draw()
}
