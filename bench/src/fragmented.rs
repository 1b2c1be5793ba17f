//! The cost of lookahead where it cannot help: duplicates whose neighbours match nothing.

use anyhow::Result;
use samepage_sharing::engine::Settings;

use super::context::Bench;
use super::cpu::micros_each;
use super::layout::{Gap, Layout};
use super::memory::{Memory, verify};
use super::ours::Ours;
use super::report::{Goal, Measurement, Section};

/// Pairs for each round: many, because the difference is small.
const PAIRS: u32 = 3;

pub(super) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let title = "CPU time for each merged page where lookahead finds nothing";
    let mut section = Section::new(title, "lookahead", "without");
    let pages = bench.size(4096, 1024);
    let cases = [
        ("neighbours differ at once", Layout::runs(4, pages, 1, Gap::Own), 0),
        ("neighbours differ in their last word", Layout::nearly_alike(5, pages), 2),
    ];
    for (name, layout, before) in &cases {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..PAIRS {
            let pairs = bench.in_turns(
                name,
                || engines(bench, layout, *before, true).map(Some),
                || engines(bench, layout, *before, false).map(Some),
            )?;
            with.extend(pairs.0);
            without.extend(pairs.1);
        }
        let measurement = Measurement::new(*name, "µs/page", &with, &without);
        section.push(measurement.goal(Goal::RatioAtMost(1.02)));
    }
    Ok(vec![section])
}

/// Returns the CPU time for each merged page, for all VMs except the first `before`, which are merged
/// earlier.
fn engines(bench: &Bench, layout: &Layout, before: usize, lookahead: bool) -> Result<f64> {
    let memory = Memory::filled(layout)?;
    let already = Layout { vms: layout.vms[..before].to_vec() }.duplicates();
    let pages = layout.duplicates();
    let (first, others) = memory.split_at(before);
    let mut engine = Ours::new(&Settings { lookahead, ..Settings::default() }, first)?;
    engine.merge(bench, already, already)?;
    engine.add(others)?;
    let used = engine.merge(bench, pages, layout.touched())?;
    verify(layout, &memory)?;
    Ok(micros_each(used, pages - already))
}
