//! What it brings to know what pages are for: two Linux guests that boot, read files, write files as a build
//! does, and use and free memory. Once no agent says what pages are for; once agents do; and once agents do
//! and only some types are shared: is it worth sharing content of files, which is overwritten?
//!
//! Each gets guests of its own, which do the same, one pair after the other. With several rounds the order
//! is turned around each time, and figures are medians.

mod report;
mod run;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use samepage_machine::Hypervisor;

use super::LinuxGuest;
use crate::curves::{self, Curve};
use crate::host::Host;
use crate::program;
pub(crate) use report::TypesReport;
use run::{Scenario, Told};

/// What of types to measure.
#[derive(Args, Debug)]
pub(crate) struct TypesArgs {
    #[command(flatten)]
    guest: LinuxGuest,

    /// Rounds
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,

    /// Ceiling of CPU time for sharing, in percent of a core
    #[arg(long, value_name = "PERCENT", default_value_t = 10.0)]
    pub(crate) cpu: f64,

    /// Print the results as JSON, and nothing else
    #[arg(long)]
    pub(crate) json: bool,

    /// Draw shared pages over time into this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

/// What is compared, the baseline first.
const SCENARIOS: [Scenario; 4] = [
    Scenario { name: "no agent, all is shared", told: false, engine: "" },
    Scenario { name: "with agents, all is shared", told: true, engine: "" },
    Scenario { name: "all but content of files", told: true, engine: "types=not-file" },
    Scenario { name: "content of files alone", told: true, engine: "types=file" },
];

/// Measures all of it, and draws it where that is asked for.
pub(crate) fn measure(args: &TypesArgs) -> Result<TypesReport> {
    Hypervisor::open()?;
    let samepage = program::path()?;
    let mut host = Host::look()?;
    let mut rounds: Vec<Vec<Told>> = SCENARIOS.iter().map(|_| Vec::new()).collect();
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
        fs::write(path, draw(&report)).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(report)
}

fn draw(report: &TypesReport) -> String {
    let title =
        format!("Pages saved by sharing, by what is shared: two Linux guests of {} MiB", report.guest_mib);
    let curve = |row: &report::Row| {
        let moments = row.rounds.last().map(|told| &told.moments);
        let points = moments.into_iter().flatten();
        Curve {
            name: row.scenario.name,
            points: points.map(|moment| (moment.seconds, moment.pages_sharing as f64)).collect(),
        }
    };
    curves::draw(&title, &report.rows.iter().map(curve).collect::<Vec<_>>())
}
