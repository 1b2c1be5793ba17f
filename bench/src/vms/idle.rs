//! The cost of an idle host: idle VMs whose memory has been merged. Also the time until a page is merged that
//! becomes identical to another one meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use samepage_machine::Hypervisor;
use samepage_resources::demo::content::{Class, mix};
use samepage_resources::demo::layout::Arena;
use samepage_resources::demo::plan::Plan;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;

use super::guests::{Guest, MEMORY, halting, until_still};
use crate::context::Bench;
use crate::cpu;
use crate::kernels::Kernels;
use crate::ksm::Mode;
use crate::report::{Goal, Measurement, Section};

/// Time limit for merging everything.
const LIMIT: Duration = Duration::from_secs(120);
/// Interval of reading the engine's statistics while a page is waiting to be merged.
const POLL: Duration = Duration::from_millis(1);

/// An idle host.
struct Host {
    vms: u32,
    memory: u64,
    plan: Plan,
    /// Duration of the measurement of CPU time.
    stretch: Duration,
    /// Time limit for a page that was made identical.
    time_limit: Duration,
    /// Number of pages that are made identical, one after the other.
    pages: u64,
}

/// The results of one side.
#[derive(Debug, Default)]
struct Outcome {
    /// CPU time of the search for identical pages, in percent of a core.
    cpu: f64,
    /// CPU time of samepage's process, in percent of a core.
    process: f64,
    /// Time from the write that made a page identical until it was merged, in milliseconds.
    latencies: Vec<f64>,
}

pub(crate) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let host = Host {
        vms: bench.size(16, 4),
        memory: bench.size(MEMORY, MEMORY / 8),
        plan: halting(),
        stretch: Duration::from_secs(bench.size(10, 1)),
        time_limit: Duration::from_secs(bench.size(10, 2)),
        pages: bench.size(20, 3),
    };
    let title = format!("An idle host: {} VMs of {} MiB at rest, half alike", host.vms, host.memory >> 20);
    super::on_vms(bench, &title, |bench, hypervisor| {
        bench.say("samepage");
        let ours = engine(bench, hypervisor, &host)?;
        let others = kernels(bench, hypervisor, &host)?;
        Ok(Mode::ALL
            .iter()
            .zip(others)
            .map(|(mode, other)| section(&title, &host, &ours, *mode, other))
            .collect())
    })
}

fn section(title: &str, host: &Host, ours: &Outcome, mode: Mode, other: Option<Outcome>) -> Section {
    let mut section = Section::new(title, "samepage", mode.name());
    let of = |figure: fn(&Outcome) -> f64| other.as_ref().map(figure).into_iter().collect::<Vec<_>>();
    section.push(
        Measurement::new("CPU time for sharing", "% of a core", &[ours.cpu], &of(|other| other.cpu))
            .goal(Goal::AtMost(0.5)),
    );
    // With KSM, it would be the CPU time of reading KSM's counters.
    section.push(Measurement::new("CPU time of the process", "% of a core", &[ours.process], &[]));
    let others = other.as_ref().map_or(&[][..], |other| &other.latencies);
    section.push(Measurement::new("a page made equal is merged after", "ms", &ours.latencies, others));
    let slowest =
        |latencies: &[f64]| latencies.iter().copied().reduce(f64::max).into_iter().collect::<Vec<_>>();
    section.push(
        Measurement::new("the slowest of these", "ms", &slowest(&ours.latencies), &slowest(others))
            .goal(Goal::AtMost(1000.0)),
    );
    section.note(format!(
        "measured for {:.0?} with everything merged; then {} pages of two VMs were made equal, one after the \
         other, by the host's writes, as a device makes them",
        host.stretch, host.pages
    ));
    if other.as_ref().is_some_and(|other| other.latencies.is_empty()) {
        section.note(format!("{} merged no such page within {:.0?}", mode.name(), host.time_limit));
    }
    section
}

impl Host {
    fn guests(
        &self,
        bench: &Bench,
        hypervisor: &Hypervisor,
        sharing: Option<&Arc<Sharing>>,
    ) -> Result<Vec<Guest>> {
        let guests = Guest::start_all(hypervisor, &self.plan, self.vms, self.memory, sharing)?;
        guests.iter().try_for_each(|guest| guest.wait_filled(bench))?;
        Ok(guests)
    }

    fn arena(&self) -> Result<Arena> {
        Arena::on_map(&self.plan, std::iter::once(0..self.memory)).context("lay out the guests' memory")
    }

    /// Writes the same unique content to one page of the first VM and one of the second.
    fn make_equal(&self, guests: &[Guest], number: u64) -> Result<()> {
        let arena = self.arena()?;
        let mut own = (0..arena.pages()).filter(|&page| arena.class(page) == Class::Own);
        // The pages are far from each other.
        let place = own.nth(number as usize * 71).context("there are few pages")?;
        let address = arena.address(place).context("the page has no address")?;
        let words =
            (0..PAGE_SIZE as u64 / 8).flat_map(|word| mix(u64::MAX - (number << 9 | word)).to_le_bytes());
        let content: Vec<_> = words.collect();
        guests[..2].iter().try_for_each(|guest| guest.write(address, &content))
    }
}

fn engine(bench: &Bench, hypervisor: &Hypervisor, host: &Host) -> Result<Outcome> {
    let sharing = Arc::new(Sharing::start(Settings::default())?);
    let guests = host.guests(bench, hypervisor, Some(&sharing))?;
    let merged = until_still(bench, &sharing, LIMIT)?;
    let alike = host.arena()?.counts().alike * u64::from(host.vms);
    ensure!(merged.pages_shared + merged.pages_sharing >= alike, "not everything is merged: {merged:?}");

    let started = Instant::now();
    let (cpu, process) = (merged.cpu_seconds, cpu::of_this_process());
    bench.rest(host.stretch)?;
    let (cpu, process) =
        (sharing.statistics().cpu_seconds - cpu, cpu::of_this_process().saturating_sub(process));
    let percent = 100.0 / started.elapsed().as_secs_f64();
    let mut outcome =
        Outcome { cpu: cpu * percent, process: process.as_secs_f64() * percent, ..Outcome::default() };
    for number in 0..host.pages {
        // The previous page was merged at the end of an interval. This one is written at another point of an
        // interval.
        bench.rest(Duration::from_millis(number * 89 % Settings::default().rest_ms))?;
        let before = sharing.statistics().merges;
        let written = Instant::now();
        host.make_equal(&guests, number)?;
        while sharing.statistics().merges < before + 2 {
            bench.check()?;
            ensure!(
                written.elapsed() < host.time_limit,
                "a page made equal is not merged: {:?}",
                sharing.statistics()
            );
            std::thread::sleep(POLL);
        }
        outcome.latencies.push(written.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(outcome)
}

/// Returns the results of KSM in each of its modes, after it has merged everything at its fastest.
fn kernels(bench: &Bench, hypervisor: &Hypervisor, host: &Host) -> Result<Vec<Option<Outcome>>> {
    if bench.ksm.is_err() {
        return Ok(Mode::ALL.map(|_| None).into());
    }
    let guests = host.guests(bench, hypervisor, None)?;
    let Some(kernels) = Kernels::new(bench, Mode::Fastest, guests)? else { return Ok(Vec::new()) };
    bench.say("KSM merges everything");
    let alike = host.arena()?.counts().alike * u64::from(host.vms);
    kernels.work(bench, LIMIT, |counts, _| counts.merged >= alike)?;
    let mut outcomes = Vec::new();
    for (index, mode) in (0..).zip(Mode::ALL) {
        bench.say(mode.name());
        if !kernels.set(mode)? {
            outcomes.push(None);
            continue;
        }
        let work = kernels.work(bench, host.stretch, |_, _| false)?;
        let cpu = work.cpu.as_secs_f64() * 100.0 / work.wall.as_secs_f64();
        let mut outcome = Outcome { cpu, ..Outcome::default() };
        for number in 0..host.pages {
            let merged = work.counts.merged + 2 * outcome.latencies.len() as u64;
            host.make_equal(kernels.vms(), (index + 1) * host.pages + number)?;
            let found = kernels.work(bench, host.time_limit, |counts, _| counts.merged >= merged + 2)?;
            if !found.finished {
                break;
            }
            outcome.latencies.push(found.wall.as_secs_f64() * 1000.0);
        }
        outcomes.push(Some(outcome));
    }
    Ok(outcomes)
}
