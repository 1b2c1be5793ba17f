//! How much slower guests work while their memory is shared: a guest reads all of its memory over and over
//! and rewrites a tenth of it each second, beside another VM that is at rest and half like it. Its work
//! is measured with sharing and without, in turns.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use samepage::Hypervisor;
use samepage_resources::demo::plan::{Plan, Rate};
use samepage_resources::demo::report::Report;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;

use super::guests::{Guest, MEMORY, finish, resting};
use super::kvm;
use crate::bench::context::Bench;
use crate::bench::report::{Goal, Measurement, Section};

/// So much of its memory the guest rewrites in a second, as a divisor.
const CHANGING: u64 = 10;
const TITLE: &str = "A guest that reads its memory while a tenth of it changes each second";

pub(in crate::bench) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    super::on_vms(bench, TITLE, on)
}

fn on(bench: &Bench, hypervisor: &Hypervisor) -> Result<Vec<Section>> {
    let mut section = Section::new(TITLE, "shared", "not shared");
    let mut told = Vec::new();
    let (ours, others) = bench.in_turns(
        "a guest at work",
        || {
            let sharing = Arc::new(Sharing::start(Settings::default())?);
            let time = work(bench, hypervisor, Some(&sharing))?;
            let now = sharing.statistics();
            told.push(format!(
                "{} pages merged and {} broken up again, with {:.2} s of CPU time of another core",
                now.merges, now.breaks, now.cpu_seconds
            ));
            Ok(Some(time))
        },
        || work(bench, hypervisor, None).map(Some),
    )?;
    section.push(Measurement::new("time for each page", "µs", &ours, &others).goal(Goal::RatioAtMost(1.02)));
    section.notes.extend(told.pop());
    section.note(format!("measured on {}", kvm::kind()));
    Ok(vec![section])
}

/// The time that the guest takes to read and check a page, the writes meanwhile included, in microseconds.
fn work(bench: &Bench, hypervisor: &Hypervisor, sharing: Option<&Arc<Sharing>>) -> Result<f64> {
    let memory = bench.size(MEMORY, MEMORY / 4);
    let settle = Duration::from_millis(bench.size(4000, 1000));
    let stretch = Duration::from_millis(bench.size(4000, 1000));
    let rate = memory / PAGE_SIZE as u64 / CHANGING;
    let partner = Plan { vm: 1, ..resting() };
    let plan = Plan { every_ms: 0, rate: Rate::PerSecond(rate as u32), restore: 50, ..resting() };
    let guests = [partner, plan].map(|plan| Guest::start(hypervisor, &plan, memory, sharing));
    let guests = guests.into_iter().collect::<Result<Vec<_>>>()?;
    guests.iter().try_for_each(|guest| guest.wait_verified(bench))?;
    bench.rest(settle)?;
    guests[1].take_reports()?;
    bench.rest(stretch)?;
    let (mut pages, mut micros) = (0, 0);
    for report in guests[1].take_reports()? {
        if let Report::Round { verified, us, .. } = report {
            (pages, micros) = (pages + verified, micros + us);
        }
    }
    ensure!(pages > 0, "the guest did nothing within {stretch:?}");
    finish(bench, guests)?;
    Ok(micros as f64 / pages as f64)
}
