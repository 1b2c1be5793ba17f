//! The results, as JSON and as tables.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;

use super::super::chart::Chart;
use super::super::replay;
use super::super::report::{Curves, Section};
use super::super::table::{self, align, number};
use super::cell::Cell;

/// A run's results.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Release of the host's kernel.
    pub(super) kernel: String,
    /// The kind of KVM.
    pub(super) kvm: String,
    pub(super) processors: usize,
    pub(super) quick: bool,
    /// Duration of the run, in seconds.
    pub(super) seconds: f64,
    /// Size of a guest's page cache, in blocks.
    pub(super) guest_blocks: u32,
    /// One guest, all workloads and policies.
    pub(super) cells: Vec<Cell>,
    /// Two guests on one disk.
    pub(super) two_vms: Vec<Cell>,
    /// Guests that read differently.
    pub(super) variants: Vec<Cell>,
    pub(super) goals: Section,
    pub(super) notes: Vec<String>,
    /// The results of the simulation; see `samepage bench cache-simulation`.
    pub(super) simulation: Option<replay::Report>,
}

impl Report {
    /// Returns an SVG picture of the part of all reads that reached the disk, by policy and size of the
    /// host's cache, for the first workload.
    ///
    /// # Errors
    /// As [`Chart::draw`].
    pub(super) fn draw(&self) -> Result<String> {
        let workload = self.cells.first().map_or("", |cell| &cell.workload);
        let mut curves = Curves {
            unit: "% of all reads that get to the disk",
            of: "the host's cache: 1 half the guest's, 2 as large, 3 twice as large",
            names: Vec::new(),
            points: Vec::new(),
        };
        for cell in self.cells.iter().filter(|cell| cell.workload == workload) {
            let curve = curves.names.iter().position(|name| *name == cell.policy).unwrap_or_else(|| {
                curves.names.push(cell.policy.clone());
                curves.points.push(Vec::new());
                curves.names.len() - 1
            });
            let missed = 1.0 - cell.other_guest_hit_ratio - cell.host_hit_ratio;
            curves.points[curve].push(100.0 * (1.0 - cell.guest_hit_ratio) * missed);
        }
        Chart::numbered(&format!("Caches of one memory: {workload}"), &curves).draw()
    }

    /// Returns the results as text.
    pub(crate) fn format(&self) -> String {
        let mut text = format!(
            "Linux {}, {} processors, {}\nGuests with page caches of {} blocks; disks of twice the blocks that all \
             caches hold{}\n",
            self.kernel,
            self.processors,
            self.kvm,
            self.guest_blocks,
            if self.quick { "; small sizes" } else { "" },
        );
        add(&mut text, "One guest; with the policy none its cache has the host's share as well", &self.cells);
        add(&mut text, "Two guests on one disk", &self.two_vms);
        add(&mut text, "Other ways to read", &self.variants);
        table::add(&mut text, &self.goals);
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "\n  - guest: % of reads that its own cache answers; other, host: % of its misses that are served from \
             another guest's memory and from the host's cache; p50, p99: requests, in µs; CPU: µs beside the vCPUs' \
             for each miss; host, twice: MiB of the host's copies, and of copies beyond the first of a block"
        );
        for note in &self.notes {
            let _ = writeln!(text, "  - {note}");
        }
        let judged: Vec<_> = self.goals.measurements.iter().filter_map(|goal| goal.met).collect();
        let met = judged.iter().filter(|&&met| met).count();
        let _ = writeln!(text, "\n{met} of {} goals met; took {:.0} s", judged.len(), self.seconds);
        if let Some(simulation) = &self.simulation {
            let _ = writeln!(text, "\nBy arithmetic:");
            text += &simulation.format();
        }
        text
    }
}

fn add(text: &mut String, title: &str, cells: &[Cell]) {
    if cells.is_empty() {
        return;
    }
    let header = [
        "",
        "host/guest",
        "",
        "guest",
        "other",
        "host",
        "disk reads",
        "blocks/s",
        "p50",
        "p99",
        "CPU",
        "host MiB",
        "twice MiB",
    ];
    let row = |cell: &Cell| {
        let percent = |ratio: f64| format!("{:.1}", ratio * 100.0);
        let mebibytes = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
        vec![
            cell.workload.clone(),
            number(f64::from(cell.host_blocks) / f64::from(cell.guest_blocks)),
            cell.policy.clone(),
            percent(cell.guest_hit_ratio),
            percent(cell.other_guest_hit_ratio),
            percent(cell.host_hit_ratio),
            cell.disk_reads.to_string(),
            format!("{:.0}", cell.blocks_per_second),
            number(cell.p50_us),
            number(cell.p99_us),
            number(cell.host_cpu_us),
            mebibytes(cell.host_bytes),
            mebibytes(cell.twice_bytes),
        ]
    };
    let header = header.map(str::to_owned).to_vec();
    let rows: Vec<_> = std::iter::once(header).chain(cells.iter().map(row)).collect();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "\n{title}");
    align(text, &rows, &[0, 2]);
}
