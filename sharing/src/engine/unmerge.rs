//! Taking pages off their frames: merges of low value for better ones when mappings run out, and all
//! merges of a VM that is not to share any more ([`modes`](crate::engine::modes)).
//!
//! The *value* of a run is the pages that it saves for the mappings that it needs. Runs that guests
//! have written to since have lost theirs and go first. Pages that are taken off their frames are
//! anonymous memory again, in one mapping with what is around them.

use std::ops::Range;
use std::time::Instant;

use crate::collections::sets::PageSet;
use crate::engine::Engine;
use crate::engine::members::Mode;
use crate::frames::backing::joined;
use crate::frames::space::{Space, SpaceError};
use crate::memory::guest::Source;
use crate::numbers::Slot;
use crate::policy::pressure::{CLASSES, Work, after_counting, class, value};

/// Pages taken off at once: a writer waits for less than 0.1 ms.
pub(crate) const BATCH_PAGES: u32 = 64;

/// Batches taken off in one step: about a millisecond of work.
const STEP_BATCHES: u32 = 16;

/// Pages on frames that are valued together at most. Longer ranges are worth more than anything that is unmerged,
/// and so are their parts.
const PART_PAGES: u32 = 512;

/// Pages on frames that one step values: some hundred microseconds.
const STEP_VALUED: u32 = 8192;

impl Engine {
    /// Takes the next pages off their frames, where any are to be: about a millisecond of work. Returns
    /// whether there were.
    pub fn unmerge_step(&mut self, now: Instant) -> bool {
        self.unshare(now) || self.unmerge_for_better_runs()
    }

    pub(crate) fn unmerge_for_better_runs(&mut self) -> bool {
        match std::mem::take(&mut self.pressure.work) {
            Work::None => self.pressure.begin(self.members.mappings()),
            Work::Counting { slot, page, below, classes } => {
                self.pressure.work = self.count_classes(slot, page, below, classes);
                true
            }
            Work::Unmerging { slot, page, below } => {
                self.pressure.work = self.unmerge_below(slot, page, below);
                true
            }
        }
    }

    fn count_classes(&self, slot: Slot, page: u32, below: u32, mut classes: [i64; CLASSES]) -> Work {
        let Some(next) = self.members.next_from(slot) else { return self.end_counting(below, &classes) };
        let page = if next == slot { page } else { 0 };
        let space = &self.members.at(next).space;
        let mut valued = 0;
        for cluster in Clusters::new(space, page) {
            if valued >= STEP_VALUED {
                return Work::Counting { slot: next, page: cluster.start, below, classes };
            }
            valued += cluster.end - cluster.start;
            let (lost, gain) = worth(space, &cluster);
            if lost < below {
                classes[class(lost).min(CLASSES - 1)] += gain;
                continue;
            }
            for run in runs(space, cluster) {
                let (lost, gain) = worth(space, &run);
                if gain > 0 && lost < below {
                    classes[class(lost).min(CLASSES - 1)] += gain;
                }
            }
        }
        Work::Counting { slot: next.next(), page: 0, below, classes }
    }

    fn end_counting(&self, limit: u32, classes: &[i64; CLASSES]) -> Work {
        let budget = self.budgets.own();
        after_counting(limit, classes, (2 * budget.ample() - budget.room()).max(1))
    }

    fn unmerge_below(&mut self, slot: Slot, page: u32, below: u32) -> Work {
        self.pressure.unmerging_below(below);
        let budget = self.budgets.own();
        let enough = budget.room() >= 2 * budget.ample();
        let Some(next) = self.members.next_from(slot).filter(|_| !enough) else { return Work::None };
        let mut page = if next == slot { page } else { 0 };
        let (mut unmerged, mut valued) = (0, 0);
        while unmerged < STEP_BATCHES && valued < STEP_VALUED {
            let space = &self.members.at(next).space;
            let Some(cluster) = Clusters::new(space, page).next().filter(|_| !space.lost()) else {
                return Work::Unmerging { slot: next.next(), page: 0, below };
            };
            page = cluster.end;
            valued += cluster.end - cluster.start;
            if worth(space, &cluster).0 < below {
                unmerged += self.unmerge(next, cluster);
                continue;
            }
            for run in runs(space, cluster).collect::<Vec<_>>() {
                let (lost, gain) = worth(&self.members.at(next).space, &run);
                if gain > 0 && lost < below {
                    unmerged += self.unmerge(next, run.clone());
                }
                if unmerged >= STEP_BATCHES {
                    page = run.end;
                    break;
                }
            }
        }
        self.report_mappings();
        Work::Unmerging { slot: next, page, below }
    }

    /// Takes a run off its frames. Returns in how many batches.
    pub(crate) fn unmerge(&mut self, slot: Slot, run: Range<u32>) -> u32 {
        let mut batches = 0;
        let mut dead = Vec::new();
        for first in run.clone().step_by(BATCH_PAGES as usize) {
            batches += 1;
            let count = BATCH_PAGES.min(run.end - first);
            let Self { members, store, counters, .. } = self;
            let member = members.at_mut(slot);
            let attached = (first..first + count).filter(|&page| member.space.attached(page)).count();
            let outcome = member.space.restore(first, count, store, &mut dead);
            for frame in dead.drain(..) {
                self.stable.remove(frame, store);
            }
            if let Err(error) = outcome {
                counters.refusals += 1;
                if matches!(error, SpaceError::Lost { .. }) {
                    member.tell_lost(&error);
                }
                break;
            }
            counters.unmerged += attached as u64;
            if member.mode == Mode::Full {
                (first..first + count).for_each(|page| member.denied(page));
            }
        }
        self.store.reclaim(&*self.host.calls);
        batches
    }
}

/// What it costs in value to unmerge some pages, and what it brings in mappings.
fn worth(space: &Space, run: &Range<u32>) -> (u32, i64) {
    let gain = -space.mappings_added(run.start, run.end - run.start, Source::Zeros);
    let attached = run.clone().filter(|&page| space.attached(page)).count() as u32;
    (if attached == 0 && gain > 0 { 0 } else { value(attached, gain) }, gain)
}

/// Ranges of pages whose mappings refer to frames, between anonymous memory, in parts of a bounded length.
struct Clusters<'a> {
    on_frames: &'a PageSet,
    pages: Range<u32>,
}

impl<'a> Clusters<'a> {
    fn new(space: &'a Space, page: u32) -> Self {
        Self { on_frames: space.backing().on_frames(), pages: page..space.pages() }
    }
}

impl Iterator for Clusters<'_> {
    type Item = Range<u32>;

    fn next(&mut self) -> Option<Range<u32>> {
        let run = self.on_frames.runs_within(self.pages.clone()).next()?;
        let cluster = run.start..run.end.min(run.start + PART_PAGES);
        self.pages.start = cluster.end;
        Some(cluster)
    }
}

/// The mappings that a cluster is made of.
fn runs(space: &Space, cluster: Range<u32>) -> impl Iterator<Item = Range<u32>> + '_ {
    let mut start = cluster.start;
    std::iter::from_fn(move || {
        let first = start;
        let joins = |page: &u32| joined(space.refers(page - 1), space.refers(*page));
        start = (first + 1..cluster.end).find(|page| !joins(page)).unwrap_or(cluster.end);
        (first < cluster.end).then_some(first..start)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_valued_at_once_is_bounded() {
        const PAGES: u32 = 100_000;
        let mut on_frames = PageSet::new(PAGES);
        on_frames.insert_range(3..90_000);
        on_frames.insert_range(90_001..90_003);
        let clusters: Vec<_> = Clusters { on_frames: &on_frames, pages: 0..PAGES }.collect();
        assert!(clusters.iter().all(|cluster| (1..=PART_PAGES).contains(&(cluster.end - cluster.start))));
        assert!(clusters.into_iter().flatten().eq(on_frames.iter()));
    }
}
