//! Pages that leave their frame and return to it: they are written with other content, and later with the
//! original content. The pages are isolated, so their address still refers to the frame that they left.

use std::time::Duration;

use anyhow::Result;
use samepage_sharing::engine::Settings;

use super::context::Bench;
use super::cpu::micros_each;
use super::kernels::Kernels;
use super::ksm::Mode;
use super::layout::{Content, Gap, Layout, own};
use super::memory::{Memory, verify};
use super::ours::Ours;
use super::report::{Goal, Measurement, Section};

const LIMIT: Duration = Duration::from_secs(60);

/// The results of one round, in microseconds of CPU time for each page.
#[derive(Clone, Copy, Debug)]
struct Round {
    left: f64,
    returned: f64,
}

pub(super) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let layout = Layout::runs(4, bench.size(4096, 1024), 1, Gap::Untouched);
    let (ours, others) =
        bench.in_turns("isolated pages", || engines(bench, &layout).map(Some), || kernels(bench, &layout))?;
    let title = "CPU time for each page that leaves its frame, and that returns to it; 4 VMs, isolated pages";
    let mut section = Section::new(title, "samepage", Mode::Fastest.name());
    let figures = |pick: fn(&Round) -> f64| -> [Vec<f64>; 2] {
        [ours.iter().map(pick).collect(), others.iter().map(pick).collect()]
    };
    let [ours, others] = figures(|round| round.returned);
    section.push(Measurement::new("returned", "µs/page", &ours, &others).goal(Goal::RatioAtMost(1.0 / 3.0)));
    let [ours, others] = figures(|round| round.left);
    section.push(Measurement::new("left", "µs/page", &ours, &others));
    Ok(vec![section])
}

/// Returns how many pages of the first VM can be merged. They stay where they are.
fn staying(layout: &Layout) -> u64 {
    layout.vms[0].iter().flatten().count() as u64
}

/// Writes to all pages except the first VM's.
fn write(layout: &Layout, memory: &[Memory], content: impl Fn(usize, u32, Content) -> Content) {
    for (vm, (contents, memory)) in layout.vms.iter().zip(memory).enumerate().skip(1) {
        for (page, before) in (0..).zip(contents) {
            before.iter().for_each(|&before| memory.write(page, content(vm, page, before)));
        }
    }
}

fn leave(layout: &Layout, memory: &[Memory]) {
    write(layout, memory, |vm, page, _| own(vm as u64, page.into()));
}

fn come_back(layout: &Layout, memory: &[Memory]) {
    write(layout, memory, |_, _, before| before);
}

fn engines(bench: &Bench, layout: &Layout) -> Result<Round> {
    let memory = Memory::filled(layout)?;
    let pages = layout.duplicates();
    let returning = pages - staying(layout);
    let mut engine = Ours::new(&Settings::default(), &memory)?;
    engine.merge(bench, pages, pages)?;
    leave(layout, &memory);
    let left = engine.work_until(bench, |now| {
        now.pages_shared + now.pages_sharing == 0 && now.pages_unshared >= returning
    })?;
    come_back(layout, &memory);
    let returned = engine.merge(bench, pages, pages)?;
    verify(layout, &memory)?;
    Ok(Round { left: micros_each(left, returning), returned: micros_each(returned, returning) })
}

fn kernels(bench: &Bench, layout: &Layout) -> Result<Option<Round>> {
    let Some(kernels) = Kernels::new(bench, Mode::Fastest, Memory::filled(layout)?)? else { return Ok(None) };
    let pages = layout.duplicates();
    let returning = pages - staying(layout);
    let first = kernels.work(bench, LIMIT, |counts, _| counts.merged >= pages)?;
    leave(layout, kernels.vms());
    let left = kernels.work(bench, LIMIT, |counts, _| counts.merged <= pages - returning)?;
    come_back(layout, kernels.vms());
    let back = kernels.work(bench, LIMIT, |counts, _| counts.merged >= pages)?;
    verify(layout, kernels.vms())?;
    let finished = first.finished && left.finished && back.finished;
    let round = Round { left: micros_each(left.cpu, returning), returned: micros_each(back.cpu, returning) };
    Ok(finished.then_some(round))
}
