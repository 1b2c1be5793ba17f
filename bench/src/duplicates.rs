//! CPU time for each page of memory, by the percentage of duplicates: the cost of scanning pages that cannot
//! be merged.

use std::time::Duration;

use anyhow::Result;
use samepage_sharing::engine::Settings;

use super::context::Bench;
use super::cpu::micros_each;
use super::kernels::Kernels;
use super::ksm::Mode;
use super::layout::Layout;
use super::memory::{Memory, verify};
use super::ours::Ours;
use super::report::{Measurement, Section};

const LIMIT: Duration = Duration::from_secs(60);
/// Number of consecutive duplicate pages.
const LENGTH: u32 = 16;
/// Passes after which KSM has scanned every page twice. KSM needs the second pass to recognise a page as
/// unchanged.
const KSM_PASSES: u64 = 2;

pub(super) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let title = "CPU time for each page of memory until all is merged, 4 VMs, runs of 16, by duplicates";
    let mut section = Section::new(title, "samepage", Mode::Fastest.name());
    for percent in [0, 25, 50, 75, 100] {
        let layout = Layout::mixed(4, bench.size(8192, 1024), percent, LENGTH);
        let name = format!("{percent} % duplicates");
        let (ours, others) =
            bench.in_turns(&name, || engines(bench, &layout).map(Some), || kernels(bench, &layout))?;
        section.push(Measurement::new(&name, "µs/page", &ours, &others));
    }
    Ok(vec![section])
}

fn engines(bench: &Bench, layout: &Layout) -> Result<f64> {
    let memory = Memory::filled(layout)?;
    let pages = layout.duplicates();
    let mut engine = Ours::new(&Settings::default(), &memory)?;
    let used = engine.merge(bench, pages, layout.touched())?;
    verify(layout, &memory)?;
    Ok(micros_each(used, layout.touched()))
}

fn kernels(bench: &Bench, layout: &Layout) -> Result<Option<f64>> {
    let Some(kernels) = Kernels::new(bench, Mode::Fastest, Memory::filled(layout)?)? else { return Ok(None) };
    let pages = layout.duplicates();
    let work =
        kernels.work(bench, LIMIT, |counts, _| counts.merged >= pages && counts.full_scans >= KSM_PASSES)?;
    verify(layout, kernels.vms())?;
    Ok(work.finished.then(|| micros_each(work.cpu, layout.touched())))
}
