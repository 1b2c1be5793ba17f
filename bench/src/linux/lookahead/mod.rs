//! What lookahead brings: two Linux VMs that boot and then work, shared by engines that differ in how they
//! find what is alike, under the same ceiling of CPU time. Shared pages over time, and what finding them
//! took.
//!
//! Each engine gets guests of its own, one pair after the other: what guests do takes as long each time,
//! to within a second or so.

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
pub(crate) use report::LookaheadReport;
use run::Engine;

/// What of lookahead to measure.
#[derive(Args, Debug)]
pub(crate) struct LookaheadArgs {
    #[command(flatten)]
    guest: LinuxGuest,

    /// Ceiling of CPU time for sharing, in percent of a core; where it is ample all engines keep up
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

/// Measures all engines, and draws them where that is asked for.
pub(crate) fn measure(args: &LookaheadArgs) -> Result<LookaheadReport> {
    Hypervisor::open()?;
    let samepage = program::path()?;
    let mut host = Host::look()?;
    let curves = ENGINES.map(|engine| {
        eprintln!("lookahead: {}", engine.name);
        run::run(&samepage, &args.guest, engine, args.cpu)
    });
    let curves = curves.into_iter().collect::<Result<_>>()?;
    host.look_again()?;
    let report = LookaheadReport::new(host, args.cpu, curves)?;
    if let Some(path) = &args.svg {
        fs::write(path, draw(&report)).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(report)
}

fn draw(report: &LookaheadReport) -> String {
    let title = format!(
        "Pages saved by sharing: two Linux guests of {} MiB, {} % of a core for sharing",
        report.guest_mib, report.cpu_percent
    );
    let curves: Vec<_> = report
        .curves
        .iter()
        .map(|curve| Curve {
            name: curve.engine.name,
            points: curve.points.iter().map(|point| (point.seconds, point.pages_sharing as f64)).collect(),
        })
        .collect();
    curves::draw(&title, &curves)
}
