//! The effect of lookahead on data with runs of 16 pages: the number of merges without a search, and the
//! effort of searches for each merge, with and without lookahead, in both orders of the indexes.

use std::time::Duration;

use anyhow::Result;
use samepage_sharing::engine::{Order, Settings};
use samepage_sharing::statistics::EngineStatistics;

use super::context::Bench;
use super::cpu::micros_each;
use super::layout::{Gap, Layout};
use super::memory::{Memory, verify};
use super::ours::Ours;
use super::report::{Goal, Measurement, Section};

const LENGTH: u32 = 16;

/// Number of VMs, and how many of them are merged before the others are added.
const VMS: u32 = 5;
const EARLIER: usize = 2;

pub(super) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let layout = Layout::runs(VMS, bench.size(16_384, 2048), LENGTH, Gap::Own);
    let orders = [(Order::Digest, "by digest"), (Order::Content, "by content, as KSM's trees are")];
    orders.into_iter().map(|(order, name)| compare(bench, &layout, order, name)).collect()
}

/// The results of one round.
struct Round {
    /// The first VMs. Half of their pages are searched in vain before they can be found.
    early: Effort,
    /// The VMs that are added later.
    late: Effort,
}

/// A part of a round.
struct Phase {
    name: &'static str,
    effort: fn(&Round) -> &Effort,
}

/// The effort of merging.
struct Effort {
    merges: u64,
    lookahead: u64,
    steps: u64,
    comparisons: u64,
    digests: u64,
    micros: f64,
}

impl Effort {
    fn new(before: &EngineStatistics, now: &EngineStatistics, used: Duration) -> Self {
        let merges = now.merges - before.merges;
        Self {
            merges,
            lookahead: now.merges_lookahead - before.merges_lookahead,
            steps: now.search_steps - before.search_steps,
            comparisons: now.comparisons - before.comparisons,
            digests: now.digests - before.digests,
            micros: micros_each(used, merges),
        }
    }

    fn per_merge(&self, figure: u64) -> f64 {
        figure as f64 / self.merges.max(1) as f64
    }
}

fn compare(bench: &Bench, layout: &Layout, order: Order, name: &str) -> Result<Section> {
    let (with, without) = bench.in_turns(
        name,
        || engines(bench, layout, order, true).map(Some),
        || engines(bench, layout, order, false).map(Some),
    )?;
    let title = format!("Lookahead, runs of 16 with a page of its own after each, order {name}");
    let mut section = Section::new(title, "lookahead", "without");
    section.note(format!(
        "first VMs: {EARLIER}, of which one must be searched in vain; later: {} more",
        VMS as usize - EARLIER
    ));
    let phases = [
        Phase { name: "first", effort: |round| &round.early },
        Phase { name: "later", effort: |round| &round.late },
    ];
    for Phase { name: phase, effort } in phases {
        let mut add = |what: &str, unit, figure: fn(&Effort) -> f64, goal| {
            let of = |rounds: &[Round]| rounds.iter().map(|round| figure(effort(round))).collect::<Vec<_>>();
            let measurement =
                Measurement::new(format!("{phase} VMs: {what}"), unit, &of(&with), &of(&without));
            section.push(match goal {
                Some(goal) => measurement.goal(goal),
                None => measurement,
            });
        };
        let goal = Some(Goal::AtLeast(90.0));
        add("merged without a search", "%", |effort| 100.0 * effort.per_merge(effort.lookahead), goal);
        let goal = Some(Goal::RatioAtMost(0.2));
        add("steps of searches", "per merge", |effort| effort.per_merge(effort.steps), goal);
        add("comparisons", "per merge", |effort| effort.per_merge(effort.comparisons), None);
        add("digests", "per merge", |effort| effort.per_merge(effort.digests), None);
        add("CPU time", "µs/merge", |effort| effort.micros, None);
    }
    Ok(section)
}

fn engines(bench: &Bench, layout: &Layout, order: Order, lookahead: bool) -> Result<Round> {
    let memory = Memory::filled(layout)?;
    let first = Layout { vms: layout.vms[..EARLIER].to_vec() };
    let (earlier, later) = memory.split_at(EARLIER);
    let mut engine = Ours::new(&Settings { lookahead, order, ..Settings::default() }, earlier)?;
    let before = engine.statistics();
    let used = engine.merge(bench, first.duplicates(), first.touched())?;
    let between = engine.statistics();
    let early = Effort::new(&before, &between, used);
    engine.add(later)?;
    let used = engine.merge(bench, layout.duplicates(), layout.touched())?;
    let late = Effort::new(&between, &engine.statistics(), used);
    verify(layout, &memory)?;
    Ok(Round { early, late })
}
