//! Measures the effect of lookahead. Two Linux VMs boot and then work, under engines that differ in how they find
//! identical pages, with the same limit of CPU time. The report shows shared pages over time, and the effort of
//! finding them.
//!
//! Each engine gets its own guests, one pair after the other. The guests' work takes the same time in each run, to
//! within a second or so.

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
pub(crate) use report::LookaheadReport;
use run::Engine;

/// The arguments of `samepage bench lookahead`.
#[derive(Args, Debug)]
pub(crate) struct LookaheadArgs {
    #[command(flatten)]
    guest: LinuxGuest,

    /// Limit of CPU time for sharing, in percent of a core. With ample time, all engines keep up
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0)]
    pub(crate) cpu: f64,

    /// Print the results as JSON, and nothing else
    #[arg(long)]
    pub(crate) json: bool,

    /// Draw shared pages over time into this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

/// The engines, in the order in which they run.
const ENGINES: [Engine; 4] = [
    Engine { name: "as it is", settings: "" },
    Engine { name: "without lookahead", settings: "lookahead=off" },
    Engine { name: "as KSM works, with lookahead", settings: "order=content,scan=full" },
    Engine { name: "as KSM works", settings: "lookahead=off,order=content,scan=full" },
];

/// Measures all engines, and draws the result if the arguments ask for a picture.
pub(crate) fn measure(args: &LookaheadArgs) -> Result<LookaheadReport> {
    Hypervisor::open()?;
    let samepage = program::path()?;
    let mut host = Host::look()?;
    let runs = ENGINES.map(|engine| {
        eprintln!("lookahead: {}", engine.name);
        run::run(&samepage, &args.guest, engine, args.cpu)
    });
    let runs = runs.into_iter().collect::<Result<_>>()?;
    host.look_again()?;
    let report = LookaheadReport::new(host, args.cpu, runs);
    if let Some(path) = &args.svg {
        fs::write(path, draw(&report)?).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(report)
}

fn draw(report: &LookaheadReport) -> Result<String> {
    let title = format!(
        "Pages saved by sharing: two Linux guests of {} MiB, {} % of a core for sharing",
        report.guest_mib, report.cpu_percent
    );
    let curves = report.runs.iter().map(|run| run.points.curve(run.engine.name));
    Chart::over_time(&title, "pages", curves.collect()).draw()
}
