//! The results, as tables and as JSON.

use std::fmt;

use anyhow::{Context, Result};
use serde::Serialize;

use super::super::GUEST_MIB;
use super::run::{Round, Scenario, TypeCounts};
use crate::host::Host;
use crate::report::Figure;

/// Results of `samepage bench types`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct TypesReport {
    /// The machine.
    pub(crate) host: Host,
    /// Memory of each guest, in MiB.
    pub(crate) guest_mib: u32,
    /// The scenarios, the baseline first.
    pub(crate) rows: Vec<Row>,
}

/// The results of a scenario.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    /// The scenario.
    pub(crate) scenario: Scenario,
    /// Medians of all rounds.
    pub(crate) medians: Medians,
    /// Each round.
    pub(crate) rounds: Vec<Round>,
}

/// Medians of all rounds, at the end of the work unless a field says otherwise.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Medians {
    /// Pages that sharing saves, on average over time.
    pub(crate) mean_sharing: f64,
    /// Pages that sharing saves.
    pub(crate) sharing: f64,
    /// Freed pages.
    pub(crate) freed: f64,
    /// Memory of the process, in MiB.
    pub(crate) resident_mib: f64,
    /// Scanned pages for each page that was mapped to a frame.
    pub(crate) scanned_per_merge: f64,
    /// The same until some seconds after the boot.
    pub(crate) scanned_per_merge_boot: f64,
    /// Pages mapped to frames.
    pub(crate) merges: f64,
    /// Percentage of these pages that were written since.
    pub(crate) broken_percent: f64,
    /// CPU time for sharing, in milliseconds.
    pub(crate) cpu_ms: f64,
    /// Pages mapped to frames for each second of CPU time.
    pub(crate) merges_per_cpu_second: f64,
}

/// Time between the boot and its figures, in seconds.
const BOOT_SECONDS: f64 = 5.0;

impl Medians {
    fn of(rounds: &[Round]) -> Result<Self> {
        let median = |of: &dyn Fn(&Round) -> f64| {
            let figure = Figure::of(&rounds.iter().map(of).collect::<Vec<_>>());
            anyhow::Ok(figure.context("nothing was measured")?.median)
        };
        Ok(Self {
            mean_sharing: median(&|round| round.moments.mean_sharing())?,
            sharing: median(&|round| round.moments.end().pages_sharing as f64)?,
            freed: median(&|round| round.moments.end().zero_pages as f64)?,
            resident_mib: median(&|round| round.moments.end().resident_bytes as f64 / f64::from(1 << 20))?,
            scanned_per_merge: median(&|round| {
                round.moments.end().pages_scanned as f64 / round.moments.end().merges.max(1) as f64
            })?,
            scanned_per_merge_boot: median(&|round| {
                let boot = round.moments.at(round.booted_seconds + BOOT_SECONDS);
                boot.pages_scanned as f64 / boot.merges.max(1) as f64
            })?,
            merges: median(&|round| round.moments.end().merges as f64)?,
            broken_percent: median(&|round| {
                100.0 * round.moments.end().breaks as f64 / round.moments.end().merges.max(1) as f64
            })?,
            cpu_ms: median(&|round| round.moments.end().cpu_seconds * 1e3)?,
            merges_per_cpu_second: median(&|round| {
                round.moments.end().merges as f64 / round.moments.end().cpu_seconds.max(1e-6)
            })?,
        })
    }
}

impl TypesReport {
    pub(super) fn new(host: Host, measured: Vec<(Scenario, Vec<Round>)>) -> Result<Self> {
        let row = |(scenario, rounds): (Scenario, Vec<Round>)| {
            Ok(Row { scenario, medians: Medians::of(&rounds)?, rounds })
        };
        let rows = measured.into_iter().map(row).collect::<Result<_>>()?;
        Ok(Self { host, guest_mib: GUEST_MIB, rows })
    }

    fn baseline(&self) -> Medians {
        self.rows[0].medians
    }
}

impl fmt::Display for TypesReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.host)?;
        let rounds = self.rows[0].rounds.len();
        writeln!(
            f,
            "two Linux guests of {} MiB boot, read and write files, use and free memory; medians of {rounds}",
            self.guest_mib
        )?;

        let columns = [
            "saved, mean",
            "saved, end",
            "freed",
            "resident MiB",
            "scanned/merge",
            "booting",
            "merges",
            "broken",
            "CPU ms",
            "merges/CPU s",
        ];
        let width = self.rows.iter().map(|row| row.scenario.name.len()).max().unwrap_or(0);
        writeln!(f, "\nPages of 4 KiB:\n")?;
        write!(f, "{:width$}", "")?;
        columns.iter().try_for_each(|column| write!(f, " {column:>15}"))?;
        writeln!(f)?;
        for row in &self.rows {
            let Medians {
                mean_sharing,
                sharing,
                freed,
                resident_mib,
                scanned_per_merge,
                scanned_per_merge_boot,
                merges,
                broken_percent,
                cpu_ms,
                merges_per_cpu_second,
            } = row.medians;
            writeln!(
                f,
                "{:width$} {mean_sharing:>15.0} {sharing:>15.0} {freed:>15.0} {resident_mib:>15.1} \
                 {scanned_per_merge:>15.2} {scanned_per_merge_boot:>15.2} {merges:>15.0} \
                 {broken_percent:>13.1} % {cpu_ms:>15.0} {merges_per_cpu_second:>15.0}",
                row.scenario.name
            )?;
        }

        let (base, agents) = (self.baseline(), self.rows[1].medians);
        writeln!(f, "\nWith agents, relative to without:")?;
        for (what, with, without) in [
            ("pages scanned for each merge", agents.scanned_per_merge, base.scanned_per_merge),
            ("the same while booting", agents.scanned_per_merge_boot, base.scanned_per_merge_boot),
            ("pages saved by sharing, on average", agents.mean_sharing, base.mean_sharing),
            ("memory at the end", agents.resident_mib, base.resident_mib),
            ("pages broken again", agents.broken_percent, base.broken_percent),
            ("merges for each second of CPU time", agents.merges_per_cpu_second, base.merges_per_cpu_second),
        ] {
            writeln!(f, "  {what:36} {:>6.2} times", with / without)?;
        }

        writeln!(f, "\nBy type, with agents and everything shared (last round):\n")?;
        writeln!(
            f,
            "{:15} {:>8} {:>8} {:>11} {:>8} {:>8} {:>15}",
            "", "pages", "saved", "freed", "merges", "broken", "a page lives"
        )?;
        let types = self.rows[1].rounds.last().map(|round| &round.types);
        for (name, counts) in types.into_iter().flatten() {
            let TypeCounts { pages, sharing, zero, merges, broken, merged_seconds, watched_seconds } =
                *counts;
            let life = match broken {
                0 => "-".to_owned(),
                broken if merged_seconds / broken as f64 > watched_seconds => {
                    format!("> {watched_seconds:.0} s")
                }
                broken => format!("{:.0} s", merged_seconds / broken as f64),
            };
            writeln!(f, "{name:15} {pages:>8} {sharing:>8} {zero:>11} {merges:>8} {broken:>8} {life:>15}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::series::{Point, Series};
    use super::*;

    fn report() -> TypesReport {
        let host = Host { processors: 2, kernel: "6.18.0".into(), kvm: "kvm_intel".into(), load: [0.0, 1.0] };
        let round = |slope: u64| Round {
            booted_seconds: 4.5,
            moments: Series(
                (1..=12)
                    .map(|second| Point {
                        seconds: second as f64 + 0.01,
                        pages_sharing: slope * second,
                        cpu_seconds: 0.01 * second as f64,
                        pages_scanned: 300 * second,
                        merges: 2 * slope * second,
                        breaks: slope * second / 2,
                        resident_bytes: 64 << 20,
                        zero_pages: 7,
                        ..Point::default()
                    })
                    .collect(),
            ),
            types: [(
                "page_table".to_owned(),
                TypeCounts {
                    pages: 5,
                    broken: 2,
                    merged_seconds: 30.0,
                    watched_seconds: 60.0,
                    ..TypeCounts::default()
                },
            )]
            .into(),
        };
        let scenario = |name| Scenario { name, has_agent: true, engine: "" };
        let rounds = |slope| vec![round(slope), round(slope + 10), round(slope - 10)];
        TypesReport::new(host, vec![(scenario("quiet"), rounds(100)), (scenario("told <all>"), rounds(150))])
            .unwrap()
    }

    #[test]
    fn tables_have_medians_ratios_and_types() {
        let text = report().to_string();
        assert!(text.contains("quiet                  650            1200"), "{text}");
        assert!(text.contains("pages scanned for each merge           0.67 times"), "{text}");
        assert!(
            text.contains("page_table             5        0           0        0        2            15 s"),
            "{text}"
        );
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["rows"][1]["medians"]["broken_percent"], 25.0);
        assert_eq!(json["rows"][0]["rounds"][0]["moments"][11]["pages_sharing"], 1200);
    }
}
