//! The size of the engine's metadata for each page of guest memory.

use anyhow::Result;
use samepage_sharing::engine::Settings;

use super::context::Bench;
use super::layout::{Gap, Layout};
use super::memory::Memory;
use super::ours::Ours;
use super::report::{Goal, Measurement, Section};

/// KSM's state for each page that it scans: a `struct ksm_rmap_item`.
const KSM_BYTES: f64 = 64.0;

pub(super) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let title = "Bytes of the books for each page of guests' memory, frames and indexes included";
    let mut section = Section::new(title, "samepage", "KSM");
    section.note("KSM: 64 bytes for each page that it scans, and a node of a tree for each frame");
    let pages = bench.size(16_384, 4096);
    let untouched = Layout { vms: vec![vec![None; pages as usize]; 4] };
    let cases = [
        ("nothing touched", untouched),
        ("all pages unique", Layout::mixed(4, pages, 0, 16)),
        ("half in runs of 16", Layout::mixed(4, pages, 50, 16)),
        ("all in runs of 64", Layout::runs(4, pages, 64, Gap::Own)),
        ("isolated pages", Layout::runs(4, pages / 4, 1, Gap::Own)),
    ];
    for (name, layout) in &cases {
        bench.say(name);
        let memory = Memory::filled(layout)?;
        let mut engine = Ours::new(&Settings::default(), &memory)?;
        engine.merge(bench, layout.duplicates(), layout.touched())?;
        let bytes = engine.statistics().metadata_bytes as f64 / layout.pages() as f64;
        let ksm = if layout.touched() > 0 { KSM_BYTES } else { 0.0 };
        section.push(Measurement::new(*name, "bytes", &[bytes], &[ksm]).goal(Goal::AtMost(16.0)));
    }
    Ok(vec![section])
}
