//! The slowdown of guests while their memory is shared. A guest reads all of its memory repeatedly and
//! rewrites a tenth of it each second, beside an idle VM. It is measured with and without sharing,
//! alternately.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use samepage_machine::Hypervisor;
use samepage_resources::demo::plan::{Plan, Rate};
use samepage_resources::demo::report::Report;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;

use super::guests::{Guest, MEMORY, finish, resting, until_steady};
use super::kvm;
use crate::context::Bench;
use crate::cpu::micros_each;
use crate::report::{Goal, Measurement, Section};

/// Divisor for the part of its memory that the guest rewrites in a second.
const CHANGING: u64 = 10;
const TITLE: &str = "A guest that reads its memory while a tenth of it changes each second";

pub(crate) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    super::on_vms(bench, TITLE, on)
}

fn on(bench: &Bench, hypervisor: &Hypervisor) -> Result<Vec<Section>> {
    let mut section = Section::new(TITLE, "shared", "not shared");
    // Without identical pages, changes are followed without any result.
    let plans = [
        ("half alike", Plan { restore: 50, ..resting() }),
        ("nothing alike", Plan { alike: 0, own: 100, ..resting() }),
    ];
    for (name, plan) in plans {
        let (ours, others) = bench.in_turns(
            name,
            || {
                let sharing = Arc::new(Sharing::start(Settings::default())?);
                work(bench, hypervisor, &plan, Some(&sharing)).map(Some)
            },
            || work(bench, hypervisor, &plan, None).map(Some),
        )?;
        let figures = |figure: fn(&Work) -> f64| -> [Vec<f64>; 2] {
            [ours.iter().map(figure).collect(), others.iter().map(figure).collect()]
        };
        let [ours, others] = figures(|work| work.time);
        section.push(
            Measurement::new(format!("time, {name}"), "µs/page", &ours, &others)
                .goal(Goal::RatioAtMost(1.02)),
        );
        let [ours, others] = figures(|work| work.cpu);
        section.push(Measurement::new(format!("CPU time, {name}"), "µs/page", &ours, &others));
    }
    section.note("CPU time is that of the vCPU's thread: waiting for a processor is not in it");
    section.note(format!("measured on {}", kvm::kind()));
    Ok(vec![section])
}

/// The guest's time to read and check a page, including the writes meanwhile, in microseconds.
#[derive(Clone, Copy, Debug)]
struct Work {
    /// Time by the guest's clock.
    time: f64,
    /// CPU time of its vCPU.
    cpu: f64,
}

fn work(bench: &Bench, hypervisor: &Hypervisor, plan: &Plan, sharing: Option<&Arc<Sharing>>) -> Result<Work> {
    let memory = bench.size(MEMORY, MEMORY / 4);
    let stretch = Duration::from_millis(bench.size(3000, 1000));
    let rate = memory / PAGE_SIZE as u64 / CHANGING;
    let worker = Plan { every_ms: 0, rate: Rate::PerSecond(rate as u32), ..plan.clone() };
    let partner = Plan { vm: 1, ..plan.clone() };
    let guests = [worker, partner].map(|plan| Guest::start(hypervisor, &plan, memory, sharing));
    let guests = guests.into_iter().collect::<Result<Vec<_>>>()?;
    guests.iter().try_for_each(|guest| guest.wait_verified(bench))?;
    bench.rest(Duration::from_millis(bench.size(2000, 500)))?;
    sharing.map_or(Ok(()), |sharing| until_steady(bench, sharing))?;

    let worker = &guests[0];
    worker.take_reports()?;
    worker.wait_verified(bench)?;
    let (started, cpu) = (Instant::now(), worker.cpu()?);
    let (mut pages, mut micros) = (0, 0);
    while started.elapsed() < stretch {
        let (verified, us) = worker.wait_for(bench, "the end of a verification", |report| match report {
            Report::Round { verified, us, .. } => Some((*verified, *us)),
            _ => None,
        })?;
        (pages, micros) = (pages + verified, micros + us);
    }
    let cpu = worker.cpu()?.saturating_sub(cpu);
    ensure!(pages > 0, "the guest has nothing to verify");
    finish(bench, guests)?;
    Ok(Work { time: micros as f64 / pages as f64, cpu: micros_each(cpu, pages) })
}
