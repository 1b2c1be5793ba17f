//! The part of the oracle's duplicates that is merged when VMs are idle, by the length of runs of identical
//! pages. It is measured with the kernel's limit on mappings and with lower ones. VMs come in pairs, one pair
//! for each length of runs.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use samepage_analyze::oracle::{CurvePoint, Report};
use samepage_machine::Hypervisor;
use samepage_resources::demo::plan::Plan;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use samepage_sharing::statistics::EngineStatistics;

use super::guests::{Guest, ask_oracle, finish, resting, until_still};
use crate::context::Bench;
use crate::report::{Goal, Measurement, Section};

/// Number of consecutive identical pages.
const LENGTHS: [u32; 4] = [1, 8, 64, 512];
/// VMs with the same seed.
const ALIKE: u32 = 2;
/// Limits on mappings below the kernel's.
const LIMITS: [u64; 2] = [16_384, 8192];
/// The reserve of mappings that the engine leaves free, and the reserve for each VM; see
/// `samepage_sharing::budget`.
const RESERVE: u64 = 4096;
const RESERVE_PER_VM: u64 = 64;
/// Time limit for merging everything.
const LIMIT: Duration = Duration::from_secs(120);
const TITLE: &str = "Share of the oracle's duplicate pages that is merged at rest";

pub(crate) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    super::on_vms(bench, TITLE, |bench, hypervisor| {
        let limits = [None].into_iter().chain(LIMITS.map(Some));
        limits.map(|limit| with_limit(bench, hypervisor, limit)).collect()
    })
}

fn with_limit(bench: &Bench, hypervisor: &Hypervisor, limit: Option<u64>) -> Result<Section> {
    bench.say(format_args!("limit on mappings: {limit:?}"));
    let settings = Settings { cpu_percent: 100.0, mappings_limit: limit, ..Settings::default() };
    let sharing = Arc::new(Sharing::start(settings)?);
    sharing.pause();
    let memory = bench.size(64 << 20, 24 << 20);
    let mut guests = Vec::new();
    for (number, run) in (0..).zip(LENGTHS) {
        let plan = Plan { run, seed: 1 + number, vm: number * ALIKE, ..resting() };
        guests.extend(Guest::start_all(hypervisor, &plan, ALIKE, memory, Some(&sharing))?);
    }
    guests.iter().try_for_each(|guest| guest.wait_verified(bench))?;
    let oracle = ask_oracle(&guests)?;
    sharing.resume();
    let now = until_still(bench, &sharing, LIMIT)?;

    let title =
        format!("{TITLE}: {} VMs of {} MiB, of {} mappings", guests.len(), memory >> 20, now.mappings_limit);
    let mut section = Section::new(title, "samepage", "best choice of runs");
    let capacity = capacity(&now, guests.len() as u64);
    let best = best_by_length(&oracle, capacity);
    for (index, (&length, best)) in LENGTHS.iter().zip(best).enumerate() {
        let pair = index * ALIKE as usize..(index + 1) * ALIKE as usize;
        let could: u64 =
            oracle.images[pair.clone()].iter().map(|i| i.classes.duplicated() + i.classes.zero).sum();
        let mut merged = 0;
        for guest in &guests[pair] {
            let member = guest.vm.membership().context("the VM shares its memory")?;
            let pages = member.statistics().context("read a VM's page map")?;
            merged += pages.pages_merged + pages.zero_pages;
        }
        let merged = merged as f64 * 100.0 / could as f64;
        section.push(Measurement::new(format!("runs of {length}"), "%", &[merged], &[best]));
    }
    let saved = (now.pages_sharing + now.zero_pages) as f64 * 100.0 / oracle.saved_pages as f64;
    let could = best_saving(&oracle, capacity) * 100.0 / oracle.saved_bytes as f64;
    let all = Measurement::new("saved, of all that could be", "%", &[saved], &[could]);
    section.push(if limit.is_none() { all.goal(Goal::AtLeast(99.0)) } else { all });
    section.note(format!(
        "{} mappings of {capacity} for merging are used; the engine keeps a reserve, and where mappings are \
         short, room for better runs to come",
        now.guest_mappings
    ));
    finish(bench, guests)?;
    Ok(section)
}

/// Returns the number of mappings that merging may use.
fn capacity(now: &EngineStatistics, vms: u64) -> u64 {
    let other = now.mappings.saturating_sub(now.guest_mappings);
    let reserve = RESERVE.min(now.mappings_limit / 2) + RESERVE_PER_VM * vms;
    now.mappings_limit.saturating_sub(reserve + other)
}

/// Returns the percentage of pages in runs of each length that are on frames if the longest runs are merged
/// first.
fn best_by_length(oracle: &Report, capacity: u64) -> [f64; LENGTHS.len()] {
    let mut left = capacity;
    let mut best = LENGTHS.map(|length| {
        let buckets = oracle.runs.buckets.iter();
        let here = buckets.filter(|bucket| {
            bucket.from_pages <= length.into() && bucket.to_pages.is_none_or(|to| to >= length.into())
        });
        here.map(|bucket| bucket.mappings).sum::<u64>() as f64
    });
    for mappings in best.iter_mut().rev() {
        let wanted = mappings.max(1.0);
        let used = wanted.min(left as f64);
        left -= used as u64;
        *mappings = used * 100.0 / wanted;
    }
    best
}

/// Returns the bytes that the best choice of runs saves with this number of mappings.
fn best_saving(oracle: &Report, capacity: u64) -> f64 {
    let mut before = CurvePoint { mappings: 0, saved_bytes: 0 };
    let zeros = (oracle.saved.zero * PAGE_SIZE as u64) as f64;
    for point in &oracle.curve {
        if point.mappings > capacity {
            // Between two points, runs have about the same length.
            let part = (capacity - before.mappings) as f64 / (point.mappings - before.mappings) as f64;
            return zeros
                + before.saved_bytes as f64
                + part * (point.saved_bytes - before.saved_bytes) as f64;
        }
        before = *point;
    }
    zeros + before.saved_bytes as f64
}
