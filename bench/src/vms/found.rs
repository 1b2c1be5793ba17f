//! The time from the moment when VMs become idle until their identical pages are found and merged: half of
//! the memory of four VMs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use samepage_analyze::oracle;
use samepage_machine::Hypervisor;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use samepage_sharing::statistics::EngineStatistics;

use super::guests::{Guest, MEMORY, ask_oracle, finish, resting};
use crate::context::Bench;
use crate::kernels::Kernels;
use crate::ksm::Mode;
use crate::report::{Goal, Measurement, Section};

const VMS: u32 = 4;
/// The percentage of the possible savings at which the time is taken.
const FOUND: u64 = 90;
/// Interval of reading the engine's statistics.
const POLL: Duration = Duration::from_millis(2);
/// Time limit for both sides.
const LIMIT: Duration = Duration::from_secs(60);

/// Time limit for KSM with usual settings.
const SLOW_LIMIT: Duration = Duration::from_secs(30);

/// The results of one side.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    /// Time until nine tenths were merged, in seconds.
    wall: f64,
    /// CPU time until then, in seconds.
    cpu: f64,
}

pub(crate) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    super::on_vms(bench, &title(bench), on)
}

fn title(bench: &Bench) -> String {
    let mebibytes = memory(bench) >> 20;
    format!("From rest to {FOUND} % of what the oracle finds: {VMS} VMs of {mebibytes} MiB, half alike")
}

fn memory(bench: &Bench) -> u64 {
    bench.size(MEMORY, MEMORY / 8)
}

fn on(bench: &Bench, hypervisor: &Hypervisor) -> Result<Vec<Section>> {
    let settings = [
        ("as set by default", Settings::default()),
        ("without a ceiling", Settings { cpu_percent: 100.0, ..Settings::default() }),
    ];
    let mut section = Section::new(title(bench), "samepage", Mode::Fastest.name());
    section.note("by default a ceiling of 10 % of a core holds on average, with 1 s saved up at the start");
    let mut default = Vec::new();
    for (name, settings) in settings {
        let (ours, others) = bench.in_turns(
            name,
            || engines(bench, hypervisor, &settings).map(Some),
            || Ok(kernels(bench, hypervisor, Mode::Fastest, LIMIT)?.and_then(|(outcome, _)| outcome)),
        )?;
        let wall = |outcomes: &[Outcome]| outcomes.iter().map(|o| o.wall).collect::<Vec<_>>();
        let cpu = |outcomes: &[Outcome]| outcomes.iter().map(|o| o.cpu).collect::<Vec<_>>();
        section.push(
            Measurement::new(format!("time, {name}"), "s", &wall(&ours), &wall(&others))
                .goal(Goal::AtMost(1.0)),
        );
        section.push(
            Measurement::new(format!("CPU time, {name}"), "s", &cpu(&ours), &cpu(&others))
                .goal(Goal::AtMost(0.3)),
        );
        if default.is_empty() {
            default = wall(&ours);
        }
    }
    let mut sections = vec![section];
    let slow = [Mode::Advisor, Mode::Defaults];
    for mode in slow.into_iter().filter(|_| !bench.quick) {
        bench.say(mode.name());
        let Some((outcome, merged)) = kernels(bench, hypervisor, mode, SLOW_LIMIT)? else { continue };
        let mut section =
            Section::new(format!("{}, KSM as hosts have it", title(bench)), "samepage", mode.name());
        let others: Vec<_> = outcome.iter().map(|outcome| outcome.wall).collect();
        section.push(Measurement::new("time", "s", &default, &others).note(format!(
            "{} merged {merged:.1} % within {:.0?}",
            mode.name(),
            SLOW_LIMIT
        )));
        sections.push(section);
    }
    Ok(sections)
}

/// Returns guests that have become idle.
fn guests(bench: &Bench, hypervisor: &Hypervisor, sharing: Option<&Arc<Sharing>>) -> Result<Vec<Guest>> {
    let guests = Guest::start_all(hypervisor, &resting(), VMS, memory(bench), sharing)?;
    guests.iter().try_for_each(|guest| guest.wait_verified(bench))?;
    Ok(guests)
}

fn saved(now: &EngineStatistics) -> u64 {
    now.pages_sharing + now.zero_pages
}

fn engines(bench: &Bench, hypervisor: &Hypervisor, settings: &Settings) -> Result<Outcome> {
    let sharing = Arc::new(Sharing::start(settings.clone())?);
    sharing.pause();
    let guests = guests(bench, hypervisor, Some(&sharing))?;
    let wanted = ask_oracle(&guests)?.saved_pages * FOUND / 100;
    let cpu = sharing.statistics().cpu_seconds;
    let started = Instant::now();
    sharing.resume();
    let outcome = loop {
        std::thread::sleep(POLL);
        bench.check()?;
        let now = sharing.statistics();
        if saved(&now) >= wanted {
            break Outcome { wall: started.elapsed().as_secs_f64(), cpu: now.cpu_seconds - cpu };
        }
        anyhow::ensure!(started.elapsed() < LIMIT, "too little is merged within {LIMIT:?}: {now:?}");
    };
    finish(bench, guests)?;
    Ok(outcome)
}

/// Returns the results of KSM if it reached the goal, and the percentage that it merged within the time.
fn kernels(
    bench: &Bench,
    hypervisor: &Hypervisor,
    mode: Mode,
    limit: Duration,
) -> Result<Option<(Option<Outcome>, f64)>> {
    if bench.ksm.is_err() {
        return Ok(None);
    }
    let guests = guests(bench, hypervisor, None)?;
    let could = mergeable(&ask_oracle(&guests)?);
    let Some(kernels) = Kernels::new(bench, mode, guests)? else { return Ok(None) };
    let work = kernels.work(bench, limit, |counts, _| counts.merged >= could * FOUND / 100)?;
    kernels.finish(bench).context("verify what KSM has merged")?;
    let outcome = Outcome { wall: work.wall.as_secs_f64(), cpu: work.cpu.as_secs_f64() };
    let merged = work.counts.merged as f64 * 100.0 / could.max(1) as f64;
    Ok(Some((work.finished.then_some(outcome), merged)))
}

/// Returns the number of pages that KSM counts as merged after it has merged everything.
fn mergeable(report: &oracle::Report) -> u64 {
    report.total.duplicated() + report.total.zero
}
