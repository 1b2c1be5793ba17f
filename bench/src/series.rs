//! A replay of VMs' memory over time, with equal CPU time for each image. It compares KSM with the engine:
//! with and without lookahead, in both orders, and with full passes as in KSM.
//!
//! The saved pages are counted in the kernel's page map after each image, in the same way for all contenders.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use samepage_sharing::engine::{Order, Settings};

use super::context::Bench;
use super::frames;
use super::images::Images;
use super::kernels::Kernels;
use super::ksm::Mode;
use super::memory::Memory;
use super::ours::Ours;
use super::report::{Curves, Measurement, Section};

/// The engine's time from one image to the next.
const PERIOD: Duration = Duration::from_secs(1);
/// Default CPU time from one image to the next, for each page of memory.
const CPU_A_PAGE: Duration = Duration::from_nanos(300);
/// Time limit for KSM to use up its CPU time.
const LIMIT: Duration = Duration::from_secs(30);
/// Index of KSM.
const KSM: usize = 0;
/// Index of the engine with its defaults.
const SAMEPAGE: usize = 1;

/// Names of the contenders.
mod names {
    pub(super) const SAMEPAGE: &str = "samepage";
    pub(super) const PLAIN: &str = "no lookahead";
    pub(super) const PASSES: &str = "full passes";
    pub(super) const LOOKAHEAD_PASSES: &str = "passes, lookahead";
}

/// A contender.
struct Contender {
    name: &'static str,
    /// The engine's settings; `None` for KSM.
    settings: Option<Settings>,
}

/// The results of one contender.
struct Outcome {
    name: &'static str,
    /// Pages saved after each image.
    saved: Vec<f64>,
    /// CPU time for each image, in milliseconds.
    cpu: Vec<f64>,
}

pub(super) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let made_up;
    let images = match &bench.images {
        Some(images) => images,
        None => {
            made_up = Images::make_up(2, bench.size(32_768, 4096), bench.size(30, 8));
            &made_up
        }
    };
    let pages: u32 = images.memory()?.iter().map(Memory::pages).sum();
    let budget = bench.series_cpu.unwrap_or(CPU_A_PAGE * pages);
    let possible = possible(bench, images)?;
    let mut outcomes = Vec::new();
    for Contender { name, settings } in contenders() {
        bench.say(name);
        let outcome = match settings {
            Some(settings) => Some(engines(bench, images, name, &settings, budget)?),
            None => kernels(bench, images, name, budget)?,
        };
        outcomes.push(outcome);
    }
    let origin = if bench.images.is_none() { "made up" } else { "from files" };
    let title = format!(
        "Memory of VMs over {} images ({origin}), {:.0} ms of CPU time for each: pages saved, on average",
        images.count(),
        budget.as_secs_f64() * 1000.0
    );
    let (mut section, lookahead) = (compare(title, &outcomes), lookahead(&outcomes));
    section.curves = Some(curves(&outcomes, possible));
    Ok(vec![section, lookahead])
}

fn contenders() -> [Contender; 6] {
    let settings = Settings::default();
    let full = Settings { follow: false, order: Order::Content, ..settings.clone() };
    let contender = |name, settings| Contender { name, settings };
    [
        contender(Mode::Fastest.name(), None),
        contender(names::SAMEPAGE, Some(settings.clone())),
        contender(names::PLAIN, Some(Settings { lookahead: false, ..settings.clone() })),
        contender("by content", Some(Settings { order: Order::Content, ..settings })),
        contender(names::PASSES, Some(Settings { lookahead: false, ..full.clone() })),
        contender(names::LOOKAHEAD_PASSES, Some(full)),
    ]
}

/// Returns the number of saved pages, on average over the images.
fn average(outcome: Option<&Outcome>) -> Vec<f64> {
    let average = |outcome: &Outcome| outcome.saved.iter().sum::<f64>() / outcome.saved.len() as f64;
    outcome.map(average).into_iter().collect()
}

fn compare(title: String, outcomes: &[Option<Outcome>]) -> Section {
    let mut section = Section::new(title, "pages saved", Mode::Fastest.name());
    let ksm = average(outcomes[KSM].as_ref());
    for outcome in outcomes.iter().skip(SAMEPAGE).flatten() {
        section.push(Measurement::new(outcome.name, "pages", &average(Some(outcome)), &ksm));
    }
    let cpu = |outcome: &Option<Outcome>| {
        outcome.iter().flat_map(|outcome| outcome.cpu.clone()).collect::<Vec<_>>()
    };
    let (ours, others) = (cpu(&outcomes[SAMEPAGE]), cpu(&outcomes[KSM]));
    section.push(Measurement::new("samepage: CPU time", "ms/image", &ours, &others));
    section.note("replayed once");
    section.note("full passes: by content, as KSM works; passes, lookahead: the same with lookahead");
    section
}

/// Returns the effect of lookahead on the engine, and on KSM's way of working.
fn lookahead(outcomes: &[Option<Outcome>]) -> Section {
    let mut section = Section::new("The same images: what lookahead gives", "lookahead", "without");
    let of = |name: &str| average(outcomes.iter().flatten().find(|outcome| outcome.name == name));
    for (with, without) in [(names::SAMEPAGE, names::PLAIN), (names::LOOKAHEAD_PASSES, names::PASSES)] {
        section.push(Measurement::new(with, "pages", &of(with), &of(without)));
    }
    section
}

fn curves(outcomes: &[Option<Outcome>], possible: Vec<f64>) -> Curves {
    let mut curves = Curves { unit: "pages saved", of: "image", names: Vec::new(), points: Vec::new() };
    for outcome in outcomes.iter().flatten() {
        curves.names.push(outcome.name.to_owned());
        curves.points.push(outcome.saved.clone());
    }
    curves.names.push("possible".to_owned());
    curves.points.push(possible);
    curves
}

/// Returns the number of pages that could be saved after each image.
fn possible(bench: &Bench, images: &Images) -> Result<Vec<f64>> {
    let memory = images.memory()?;
    let mut possible = Vec::new();
    for time in 0..images.count() {
        bench.say(format_args!("what can be saved, image {}", time + 1));
        bench.check()?;
        images.apply(time, &memory)?;
        possible.push(frames::could_be_saved(&memory) as f64);
    }
    Ok(possible)
}

/// The remaining CPU time for one image, minus the excess of earlier images.
struct Allowance {
    each: Duration,
    debt: Duration,
}

impl Allowance {
    fn new(each: Duration) -> Self {
        Self { each, debt: Duration::ZERO }
    }

    fn next(&self) -> Duration {
        self.each.saturating_sub(self.debt)
    }

    fn used(&mut self, time: Duration) {
        self.debt = (self.debt + time).saturating_sub(self.each);
    }
}

fn engines(
    bench: &Bench,
    images: &Images,
    name: &'static str,
    settings: &Settings,
    budget: Duration,
) -> Result<Outcome> {
    let memory = images.memory()?;
    let mut engine = Ours::new(settings, &memory)?;
    let mut allowance = Allowance::new(budget);
    let mut outcome = Outcome { name, saved: Vec::new(), cpu: Vec::new() };
    for time in 0..images.count() {
        bench.say(format_args!("{name}, image {}", time + 1));
        images.apply(time, &memory)?;
        let used = engine.work_for(bench, PERIOD, allowance.next())?;
        allowance.used(used);
        let counted = || {
            let now = engine.statistics();
            now.pages_sharing + now.zero_pages
        };
        outcome.saved.push(frames::saved(&memory)?.unwrap_or_else(counted) as f64);
        outcome.cpu.push(used.as_secs_f64() * 1000.0);
    }
    Ok(outcome)
}

fn kernels(bench: &Bench, images: &Images, name: &'static str, budget: Duration) -> Result<Option<Outcome>> {
    let Some(kernels) = Kernels::new(bench, Mode::Fastest, images.memory()?)? else { return Ok(None) };
    // The engine also frees pages of zeros.
    kernels.use_zero_pages()?;
    let mut allowance = Allowance::new(budget);
    let mut outcome = Outcome { name, saved: Vec::new(), cpu: Vec::new() };
    for time in 0..images.count() {
        bench.say(format_args!("{name}, image {}", time + 1));
        images.apply(time, kernels.vms())?;
        let most = allowance.next();
        let mut used = Duration::ZERO;
        if !most.is_zero() {
            let work = kernels.work(bench, LIMIT, |_, used| used >= most)?;
            ensure!(work.finished, "KSM got too little of the processor");
            used = work.cpu;
        }
        allowance.used(used);
        let saved = frames::saved(kernels.vms())?;
        outcome.saved.push(saved.context("the page map tells no frames: run as root")? as f64);
        outcome.cpu.push(used.as_secs_f64() * 1000.0);
    }
    Ok(Some(outcome))
}
