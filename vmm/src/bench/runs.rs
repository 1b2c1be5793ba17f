//! CPU time for each page merged, by how many equal pages follow each other: runs lie at different
//! places in all VMs and never touch.

use std::time::Duration;

use anyhow::Result;
use samepage_sharing::engine::Settings;

use super::context::Bench;
use super::cpu::micros_each;
use super::ksm::Mode;
use super::layout::{Gap, Layout};
use super::memory::{Memory, verify};
use super::ours::Ours;
use super::report::{Goal, Measurement, Section};

/// Equal pages that follow each other.
const LENGTHS: [u32; 4] = [1, 8, 64, 512];
/// How long KSM may take for one measurement.
const LIMIT: Duration = Duration::from_secs(30);

pub(super) fn measure(bench: &mut Bench) -> Result<Vec<Section>> {
    let mut section = Section::new(
        "CPU time for each merged page, 4 VMs, by the number of equal pages in a run: first merge",
        "samepage",
        Mode::Fastest.name(),
    );
    for length in LENGTHS {
        // Each isolated page takes two mappings, of which a process has 65,530.
        let pages = if length == 1 { bench.size(4096, 1024) } else { bench.size(16_384, 2048) };
        let layout = Layout::runs(4, pages, length, Gap::Untouched);
        let (mut ours, mut other) = (Vec::new(), Vec::new());
        for round in 0..bench.rounds {
            bench.say(format_args!("runs of {length}, round {}", round + 1));
            // Who goes first alternates.
            for ksm in [round % 2 == 1, round % 2 == 0] {
                if ksm {
                    other.extend(kernels(bench, &layout)?);
                } else {
                    ours.push(engines(bench, &layout)?);
                }
            }
        }
        let goal = match length {
            1 => Some(Goal::RatioAtMost(0.75)),
            64.. => Some(Goal::RatioAtMost(0.1)),
            _ => None,
        };
        let measurement = Measurement::new(format!("runs of {length}"), "µs/page", &ours, &other);
        section.push(match goal {
            Some(goal) => measurement.goal(goal),
            None => measurement,
        });
    }
    Ok(vec![section])
}

fn engines(bench: &Bench, layout: &Layout) -> Result<f64> {
    let memory = Memory::filled(layout)?;
    let pages = layout.duplicates();
    let mut engine = Ours::new(&Settings::default(), &memory)?;
    let used = engine.work_until(bench, |now| now.pages_shared + now.pages_sharing >= pages)?;
    verify(layout, &memory)?;
    Ok(micros_each(used, pages))
}

fn kernels(bench: &Bench, layout: &Layout) -> Result<Option<f64>> {
    let Ok(ksm) = &bench.ksm else { return Ok(None) };
    ksm.set(Mode::Fastest)?;
    let memory = Memory::filled(layout)?;
    memory.iter().try_for_each(Memory::mergeable)?;
    let pages = layout.duplicates();
    let work = ksm.work(bench, LIMIT, |counts, _| counts.merged >= pages)?;
    verify(layout, &memory)?;
    drop(memory);
    ksm.forget()?;
    Ok(work.finished.then(|| micros_each(work.cpu, pages)))
}
