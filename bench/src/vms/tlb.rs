//! A guest whose work is the translation of addresses: it reads single words at random places of a memory
//! that is far larger than the translation caches cover. With sharing, guest memory is in pages of 4 KiB, and
//! its changes are followed. This benchmark shows the cost of that if nothing changes and nothing is
//! identical. It depends on the processor's way of translating guests' addresses.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use samepage_machine::Hypervisor;
use samepage_resources::demo::plan::Plan;
use samepage_resources::demo::report::Report;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;

use super::guests::{Guest, finish, resting};
use super::kvm;
use crate::context::Bench;
use crate::report::{Goal, Measurement, Section};

const TITLE: &str =
    "A guest that reads single words all over its memory, of which nothing is alike or changes";

pub(crate) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    super::on_vms(bench, TITLE, on)
}

fn on(bench: &Bench, hypervisor: &Hypervisor) -> Result<Vec<Section>> {
    let memory = bench.size(512 << 20, 64 << 20);
    let title = format!("{TITLE}: {} MiB", memory >> 20);
    let mut section = Section::new(title, "followed", "not shared");
    let (ours, others) = bench.in_turns(
        "a guest at work",
        || {
            let sharing = Arc::new(Sharing::start(Settings::default())?);
            walk(bench, hypervisor, memory, Some(&sharing)).map(Some)
        },
        || walk(bench, hypervisor, memory, None).map(Some),
    )?;
    section.push(Measurement::new("time for each word", "ns", &ours, &others).goal(Goal::RatioAtMost(1.02)));
    section.note(format!("measured on {}", kvm::kind()));
    section.note(
        "without sharing the host may back guests' memory with huge pages, where it is set to always do so",
    );
    Ok(vec![section])
}

/// Returns the time for each word, in nanoseconds.
fn walk(bench: &Bench, hypervisor: &Hypervisor, memory: u64, sharing: Option<&Arc<Sharing>>) -> Result<f64> {
    let plan = Plan { alike: 0, own: 100, walk: bench.size(4 << 20, 1 << 20), every_ms: 0, ..resting() };
    let guest = Guest::start(hypervisor, &plan, memory, sharing)?;
    // All pages have been read once, and have been idle.
    guest.wait_verified(bench)?;
    bench.rest(Duration::from_millis(bench.size(3000, 1000)))?;
    guest.take_reports()?;
    let (mut words, mut micros) = (0, 0);
    for _ in 0..bench.size(3, 1) {
        let (steps, us) = guest.wait_for(bench, "the end of a walk", |report| match report {
            Report::Walk { steps, us } => Some((*steps, *us)),
            _ => None,
        })?;
        (words, micros) = (words + steps, micros + us);
    }
    ensure!(words > 0, "the guest read nothing");
    finish(bench, vec![guest])?;
    Ok(micros as f64 * 1000.0 / words as f64)
}
