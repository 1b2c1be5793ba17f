//! The results, as JSON and as tables.

use std::fmt::Write;

use serde::Serialize;

use super::super::table::align;
use super::Sizes;
use super::guest::Misses;
use super::policies::Policy;

/// A run's results. Ratios are from 0 to 1, sizes in blocks.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The seed of the synthetic reads.
    pub(super) seed: u32,
    pub(super) rows: Vec<Row>,
}

/// One workload with caches of one size.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) workload: String,
    pub(super) guest_blocks: u32,
    pub(super) host_blocks: u32,
    /// Distinct blocks that may be read.
    pub(super) data_blocks: u32,
    /// The host's cache as a multiple of the guest's.
    pub(super) host_by_guest: f64,
    /// Counted reads.
    pub(super) reads: u64,
    /// Part of all reads that the guest's cache serves.
    pub(super) guest_hit_ratio: f64,
    pub(super) policies: Vec<Cell>,
}

impl Row {
    pub(super) fn new(workload: String, misses: &Misses, sizes: Sizes, policies: [Cell; 4]) -> Self {
        Self {
            workload,
            guest_blocks: sizes.guest,
            host_blocks: sizes.host,
            data_blocks: sizes.data,
            host_by_guest: sizes.ratio,
            reads: misses.reads,
            guest_hit_ratio: 1.0 - ratio(misses.len(), misses.reads),
            policies: policies.into(),
        }
    }
}

/// The results of one policy.
#[derive(Debug, Serialize)]
pub(super) struct Cell {
    pub(super) policy: String,
    pub(super) inclusive: Hits,
    pub(super) exclusive: Hits,
    /// Size of the inclusive cache with the same hits as the exclusive one; `None` if that has no hits.
    pub(super) equal_inclusive_blocks: Option<u32>,
    /// The same size, as a multiple of the exclusive one's.
    pub(super) equal_memory_ratio: Option<f64>,
}

/// Hits of an inclusive or an exclusive cache.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Hits {
    /// Part of the guest's misses that the host's cache serves.
    pub(super) host_hit_ratio: f64,
    /// Part of all reads that either cache serves.
    pub(super) hit_ratio: f64,
}

impl Cell {
    /// Returns the results from the hits of both caches and the size of the equal inclusive cache.
    pub(super) fn new(
        policy: Policy,
        misses: &Misses,
        sizes: Sizes,
        hits: [u64; 2],
        equal: Option<u32>,
    ) -> Self {
        let [inclusive, exclusive] = hits.map(|hits| Hits {
            host_hit_ratio: ratio(hits, misses.len()),
            hit_ratio: 1.0 - ratio(misses.len() - hits, misses.reads),
        });
        Self {
            policy: policy.to_string(),
            inclusive,
            exclusive,
            equal_inclusive_blocks: equal,
            equal_memory_ratio: equal.map(|equal| f64::from(equal) / f64::from(sizes.host)),
        }
    }
}

impl Report {
    /// Returns the results as text.
    pub(crate) fn format(&self) -> String {
        let mut text =
            format!("Reads of blocks through a guest's cache (LRU) and the host's; seed {}\n", self.seed);
        let pair = |hits: fn(&Hits) -> f64| {
            move |cell: &Cell| [percent(hits(&cell.inclusive)), percent(hits(&cell.exclusive))].to_vec()
        };
        let title = "Host: % of the guest's misses that its cache answers, inclusive and exclusive";
        self.add(&mut text, title, &["incl.", "excl."], pair(|hits| hits.host_hit_ratio));
        let title = "Both: % of all reads that either cache answers, inclusive and exclusive";
        self.add(&mut text, title, &["incl.", "excl."], pair(|hits| hits.hit_ratio));
        let title = "Inclusive memory for as many hits, as a multiple of the exclusive";
        self.add(&mut text, title, &["memory"], |cell| {
            vec![cell.equal_memory_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"))]
        });
        text
    }

    fn add(&self, text: &mut String, title: &str, columns: &[&str], cells: impl Fn(&Cell) -> Vec<String>) {
        let policies = self.rows.first().map(|row| row.policies.iter().map(|cell| cell.policy.clone()));
        let names = policies
            .into_iter()
            .flatten()
            .flat_map(|name| columns.iter().map(move |column| format!("{name} {column}")));
        let header = ["", "host/guest", "guest"].map(str::to_owned).into_iter().chain(names).collect();
        let row = |row: &Row| {
            let first = [row.workload.clone(), row.host_by_guest.to_string(), percent(row.guest_hit_ratio)];
            first.into_iter().chain(row.policies.iter().flat_map(&cells)).collect()
        };
        let rows: Vec<Vec<String>> = std::iter::once(header).chain(self.rows.iter().map(row)).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\n{title}");
        align(text, &rows, &[0]);
    }
}

fn percent(ratio: f64) -> String {
    format!("{:.1}", ratio * 100.0)
}

fn ratio(part: u64, all: u64) -> f64 {
    if all == 0 { 0.0 } else { part as f64 / all as f64 }
}
