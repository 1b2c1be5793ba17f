//! CPU time for each merged page, by the length of runs of duplicates. Runs are at different places in all
//! VMs and are never adjacent. The first part is merging. The second is the cost of a guest's first read of
//! each page afterwards.

use std::time::Duration;

use anyhow::Result;
use samepage_sharing::engine::Settings;

use super::context::Bench;
use super::cpu::{self, micros_each};
use super::kernels::Kernels;
use super::ksm::Mode;
use super::layout::{Gap, Layout};
use super::memory::{Memory, verify};
use super::ours::Ours;
use super::report::{Goal, Measurement, Section};

/// Number of consecutive duplicate pages.
const LENGTHS: [u32; 4] = [1, 8, 64, 512];
/// Time limit for KSM at its fastest.
const LIMIT: Duration = Duration::from_secs(60);
const UNIT: &str = "µs/page";

/// The results of one round.
#[derive(Clone, Copy, Debug)]
struct Round {
    /// CPU time for each merged page, in microseconds.
    merge: f64,
    /// CPU time of the guest for the first read of each page afterwards, in microseconds.
    read: f64,
}

pub(super) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let title = "CPU time for each merged page, by VMs and equal pages in a run";
    let mut merges = Section::new(title, "samepage", Mode::Fastest.name());
    merges.note("runs never touch: between them lies a page that was never written");
    let title = "CPU time of a guest for its first read of a page after the merge";
    let mut reads = Section::new(title, "samepage", Mode::Fastest.name());
    let mut slow = [Mode::Advisor, Mode::Defaults].map(|mode| {
        (mode, Section::new("CPU time for each merged page, KSM as hosts have it", "samepage", mode.name()))
    });
    for (vms, length) in LENGTHS.map(|length| (4, length)).into_iter().chain([(2, 1), (2, 64)]) {
        // Each isolated page takes two of the 65,530 mappings of a process.
        let pages = if length == 1 { bench.size(4096, 1024) } else { bench.size(16_384, 2048) };
        let layout = Layout::runs(vms, pages, length, Gap::Untouched);
        let name = format!("{vms} VMs, runs of {length}");
        let (ours, others) = bench.in_turns(
            &name,
            || engines(bench, &layout).map(Some),
            || kernels(bench, &layout, Mode::Fastest, LIMIT).map(|(round, _)| round),
        )?;
        let (ours_read, others_read) = (pick(&ours, |round| round.read), pick(&others, |round| round.read));
        let (ours, others) = (pick(&ours, |round| round.merge), pick(&others, |round| round.merge));
        let measurement = Measurement::new(&name, UNIT, &ours, &others);
        merges.push(match length {
            1 => measurement.goal(Goal::RatioAtMost(0.75)),
            64.. => measurement.goal(Goal::RatioAtMost(0.1)),
            _ => measurement,
        });
        reads.push(Measurement::new(&name, UNIT, &ours_read, &others_read));
        if vms == 4 && [1, 64].contains(&length) {
            for (mode, section) in &mut slow {
                bench.say(format_args!("{name}, {}", mode.name()));
                let limit = Duration::from_secs(bench.size(20, 1));
                let (round, told) = kernels(bench, &layout, *mode, limit)?;
                let others: Vec<_> = round.iter().map(|round| round.merge).collect();
                let measurement = Measurement::new(&name, UNIT, &ours, &others);
                section.push(if told.is_empty() { measurement } else { measurement.note(told) });
            }
        }
    }
    let slow = slow.map(|(_, section)| section);
    Ok([merges, reads].into_iter().chain(slow).collect())
}

fn pick(rounds: &[Round], figure: impl Fn(&Round) -> f64) -> Vec<f64> {
    rounds.iter().map(figure).collect()
}

fn engines(bench: &Bench, layout: &Layout) -> Result<Round> {
    let memory = Memory::filled(layout)?;
    let pages = layout.duplicates();
    let mut engine = Ours::new(&Settings::default(), &memory)?;
    let used = engine.merge(bench, pages, pages)?;
    let read = reading(layout, &memory)?;
    Ok(Round { merge: micros_each(used, pages), read })
}

/// Returns KSM's round, and the part that it merged within the time.
fn kernels(bench: &Bench, layout: &Layout, mode: Mode, limit: Duration) -> Result<(Option<Round>, String)> {
    let Some(kernels) = Kernels::new(bench, mode, Memory::filled(layout)?)? else {
        return Ok((None, String::new()));
    };
    let pages = layout.duplicates();
    let work = kernels.work(bench, limit, |counts, _| counts.merged >= pages)?;
    let merged = work.counts.merged.min(pages);
    let told = format!(
        "{} merged {:.0} % within {:.1} s, with {:.2} s of CPU time",
        mode.name(),
        merged as f64 * 100.0 / pages as f64,
        work.wall.as_secs_f64(),
        work.cpu.as_secs_f64()
    );
    let read = reading(layout, kernels.vms())?;
    // If little was merged, the time was not spent on merging.
    let round = (merged > pages / 2).then(|| Round { merge: micros_each(work.cpu, merged), read });
    Ok((round, told))
}

/// Reads every page, and checks its content.
fn reading(layout: &Layout, memory: &[Memory]) -> Result<f64> {
    let (good, time) = cpu::of(|| verify(layout, memory));
    good.map(|()| micros_each(time, layout.touched()))
}
