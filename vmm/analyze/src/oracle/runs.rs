//! Runs of pages on frames, and the savings for budgets of mappings.

use samepage_sharing::PAGE_SIZE;

use super::report::{Bucket, Budget, CurvePoint, Runs};

/// A run splits the mapping around it into three mappings.
const MAPPINGS_PER_RUN: u64 = 2;
/// Shortest length in each bucket, in pages.
const BUCKETS: [u32; 5] = [1, 2, 8, 64, 512];
/// Budgets of mappings. The last is about the kernel's default limit for a process (`vm.max_map_count`,
/// 65,530) minus a reserve.
const BUDGETS: [u64; 3] = [1_000, 8_000, 60_000];
/// Points of the curve for each doubling of mappings.
const POINTS_PER_DOUBLING: f64 = 8.0;

#[derive(Clone, Copy)]
struct Run {
    pages: u32,
    first_frame: u32,
}

/// Collects runs of pages in guest order.
#[derive(Default)]
pub(super) struct Collector {
    runs: Vec<Run>,
    open: bool,
}

impl Collector {
    /// Adds the next page, which is on this frame.
    pub(super) fn page(&mut self, frame: u32) {
        match self.runs.last_mut() {
            // There are fewer than 2^32 frames, so the sum does not overflow.
            Some(run) if self.open && run.first_frame + run.pages == frame => {
                run.pages += 1;
            }
            _ => self.runs.push(Run { pages: 1, first_frame: frame }),
        }
        self.open = true;
    }

    /// Ends the run: the next page is not adjacent, or is not on a frame.
    pub(super) fn end(&mut self) {
        self.open = false;
    }

    /// Counts the runs over `frames` frames.
    pub(super) fn summarise(self, frames: u32) -> (Runs, Vec<Budget>, Vec<CurvePoint>) {
        let mut runs = self.runs;
        // Longest first, and runs on the same frames together, because one of them alone saves nothing.
        runs.sort_unstable_by_key(|run| (std::cmp::Reverse(run.pages), run.first_frame));
        let pages = runs.iter().map(|run| u64::from(run.pages)).sum();
        let all = Runs {
            runs: runs.len() as u64,
            pages,
            mappings: runs.len() as u64 * MAPPINGS_PER_RUN,
            buckets: buckets(&runs),
        };
        let (budgets, curve) = spend(&runs, frames, pages);
        (all, budgets, curve)
    }
}

fn buckets(runs: &[Run]) -> Vec<Bucket> {
    let mut buckets: Vec<_> = BUCKETS
        .iter()
        .enumerate()
        .map(|(index, &from)| Bucket {
            from_pages: from.into(),
            to_pages: BUCKETS.get(index + 1).map(|&next| u64::from(next) - 1),
            runs: 0,
            pages: 0,
            mappings: 0,
        })
        .collect();
    for run in runs {
        let bucket = &mut buckets[BUCKETS.partition_point(|&from| from <= run.pages) - 1];
        bucket.runs += 1;
        bucket.pages += u64::from(run.pages);
        bucket.mappings += MAPPINGS_PER_RUN;
    }
    buckets
}

/// Merges run after run and records the savings at each budget.
fn spend(runs: &[Run], frames: u32, all_pages: u64) -> (Vec<Budget>, Vec<CurvePoint>) {
    let all_saved = all_pages - u64::from(frames);
    let mut used = vec![0_u64; frames.div_ceil(64) as usize];
    let (mut pages, mut saved, mut mappings) = (0_u64, 0_u64, 0_u64);
    let mut budgets = Vec::new();
    let mut limits =
        BUDGETS.iter().copied().filter(|&limit| limit < runs.len() as u64 * MAPPINGS_PER_RUN).peekable();
    let mut curve = vec![CurvePoint { mappings: 0, saved_bytes: 0 }];
    let mut next_point = MAPPINGS_PER_RUN as f64;

    let budget = |limit, mappings, pages, saved| Budget {
        limit,
        mappings,
        pages,
        pages_percent: percent(pages, all_pages),
        saved_pages: saved,
        saved_bytes: saved * PAGE_SIZE as u64,
        saved_percent: percent(saved, all_saved),
    };
    for (index, run) in runs.iter().enumerate() {
        while let Some(limit) = limits.next_if(|limit| mappings + MAPPINGS_PER_RUN > *limit) {
            budgets.push(budget(Some(limit), mappings, pages, saved));
        }
        for frame in run.first_frame..run.first_frame + run.pages {
            let (word, bit) = (&mut used[frame as usize / 64], 1 << (frame % 64));
            saved += u64::from(*word & bit != 0);
            *word |= bit;
        }
        pages += u64::from(run.pages);
        mappings += MAPPINGS_PER_RUN;
        if mappings as f64 >= next_point || index + 1 == runs.len() {
            curve.push(CurvePoint { mappings, saved_bytes: saved * PAGE_SIZE as u64 });
            next_point = mappings as f64 * (1.0 / POINTS_PER_DOUBLING).exp2();
        }
    }
    budgets.push(budget(None, mappings, pages, saved));
    (budgets, curve)
}

/// Returns `part` of `whole` in percent, and 100 if `whole` is 0.
fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 100.0 } else { part as f64 * 100.0 / whole as f64 }
}
