//! The duration of page faults elsewhere in the process while the engine merges at its limit. Guests rewrite
//! and restore pages continuously, so there is always something to merge. The engine changes mappings, for
//! which it needs the same locks as page faults.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use samepage_machine::Hypervisor;
use samepage_resources::demo::plan::{Plan, Rate};
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;

use super::guests::{Guest, MEMORY, finish, resting, until_steady};
use super::mapping::Mapping;
use crate::context::Bench;
use crate::report::{Goal, Measurement, Section};

const VMS: u32 = 2;
/// Divisor for the part of its memory that each guest rewrites in a second. Half of the pages are restored.
const CHANGING: u64 = 8;
/// Pages of fresh memory to touch between two readings of the clock.
const PAGES: usize = 4096;
/// Time for the engine to reach a steady state.
const SETTLE: Duration = Duration::from_millis(500);
const TITLE: &str =
    "A page fault elsewhere in the process while the engine merges at its ceiling of 10 % of a core";

/// Latencies of one measurement, in microseconds.
#[derive(Clone, Copy, Debug)]
struct Latencies {
    half: f64,
    percent99: f64,
    permille999: f64,
}

pub(crate) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    super::on_vms(bench, TITLE, on)
}

fn on(bench: &Bench, hypervisor: &Hypervisor) -> Result<Vec<Section>> {
    let stretch = Duration::from_millis(bench.size(2000, 500));
    let memory = bench.size(MEMORY, MEMORY / 4);
    let rate = (memory / PAGE_SIZE as u64 / CHANGING) as u32;
    let plan = Plan { rate: Rate::PerSecond(rate), restore: 50, ..resting() };
    let sharing = Arc::new(Sharing::start(Settings::default())?);
    let guests = Guest::start_all(hypervisor, &plan, VMS, memory, Some(&sharing))?;
    guests.iter().try_for_each(|guest| guest.wait_verified(bench))?;
    until_steady(bench, &sharing)?;

    let (mut cpu, mut merges, mut time) = (0.0, 0, 0.0);
    let (ours, idle) = bench.in_turns(
        "page faults",
        || {
            sharing.resume();
            bench.rest(SETTLE)?;
            let (before, started) = (sharing.statistics(), Instant::now());
            let latencies = latencies(bench, stretch)?;
            let after = sharing.statistics();
            cpu += after.cpu_seconds - before.cpu_seconds;
            merges += after.merges - before.merges;
            time += started.elapsed().as_secs_f64();
            Ok(Some(latencies))
        },
        || {
            sharing.pause();
            bench.rest(SETTLE)?;
            let latencies = latencies(bench, stretch)?;
            sharing.resume();
            Ok(Some(latencies))
        },
    )?;
    sharing.resume();
    finish(bench, guests)?;

    let mut section = Section::new(TITLE, "merging", "idle engine");
    for (name, figure) in [
        ("p50", (|l: &Latencies| l.half) as fn(&Latencies) -> f64),
        ("p99", |l| l.percent99),
        ("p99.9", |l| l.permille999),
    ] {
        let [ours, idle] = [&ours, &idle].map(|side| side.iter().map(figure).collect::<Vec<_>>());
        let measurement = Measurement::new(name, "µs", &ours, &idle);
        section.push(if name == "p99" { measurement.goal(Goal::RatioAtMost(2.0)) } else { measurement });
    }
    section.note(format!(
        "merging took {:.1} % of a core for {:.0} pages a second; {VMS} guests rewrite {rate} pages a second each \
         on both sides",
        cpu * 100.0 / time,
        merges as f64 / time
    ));
    Ok(vec![section])
}

/// Touches fresh memory for a while.
fn latencies(bench: &Bench, stretch: Duration) -> Result<Latencies> {
    let mut nanoseconds = Vec::with_capacity(1 << 20);
    let end = Instant::now() + stretch;
    while Instant::now() < end {
        bench.check()?;
        let mut mapping = Mapping::anonymous(PAGES).context("map memory")?;
        for page in 0..mapping.pages() {
            let before = Instant::now();
            mapping.write(page);
            nanoseconds.push(before.elapsed().as_nanos() as u32);
        }
    }
    nanoseconds.sort_unstable();
    let at = |part: f64| f64::from(nanoseconds[((nanoseconds.len() - 1) as f64 * part) as usize]) / 1000.0;
    Ok(Latencies { half: at(0.5), percent99: at(0.99), permille999: at(0.999) })
}
