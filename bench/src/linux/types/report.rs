//! The results, as tables and as JSON.

use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::run::{GUEST_MIB, Scenario, Told, TypeTold};
use crate::host::Host;
use crate::report::Figure;

/// Results of `samepage bench types`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct TypesReport {
    /// The machine.
    pub(crate) host: Host,
    /// Memory of each guest, in MiB.
    pub(crate) guest_mib: u32,
    /// What was compared, the baseline first.
    pub(crate) rows: Vec<Row>,
}

/// One of what is compared.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    /// What it is.
    pub(crate) scenario: Scenario,
    /// Medians of all rounds.
    pub(crate) medians: Medians,
    /// Each round.
    pub(crate) rounds: Vec<Told>,
}

/// Medians of all rounds, at the end of the work where nothing else is said.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Medians {
    /// Pages that sharing saves, on average over time.
    pub(crate) mean_sharing: f64,
    /// Pages that sharing saves.
    pub(crate) sharing: f64,
    /// Pages given back.
    pub(crate) given_back: f64,
    /// Memory that the process takes, in MiB.
    pub(crate) resident_mib: f64,
    /// Pages looked at for each one that was mapped to a frame.
    pub(crate) scanned_per_merge: f64,
    /// The same until some seconds after the boot.
    pub(crate) scanned_per_merge_boot: f64,
    /// Pages mapped to frames.
    pub(crate) merges: f64,
    /// Of these, in percent, the ones that were written since.
    pub(crate) broken_percent: f64,
    /// CPU time for sharing, in milliseconds.
    pub(crate) cpu_ms: f64,
    /// Pages mapped to frames for each second of CPU time.
    pub(crate) merges_per_cpu_second: f64,
}

/// How long after the boot the boot's figures are taken, in seconds.
const BOOT_SECONDS: f64 = 5.0;

impl Medians {
    fn of(rounds: &[Told]) -> Result<Self> {
        let median = |of: &dyn Fn(&Told) -> f64| {
            let figure = Figure::of(&rounds.iter().map(of).collect::<Vec<_>>());
            anyhow::Ok(figure.context("nothing was measured")?.median)
        };
        Ok(Self {
            mean_sharing: median(&Told::mean_sharing)?,
            sharing: median(&|told| told.end().pages_sharing as f64)?,
            given_back: median(&|told| told.end().zero_pages as f64)?,
            resident_mib: median(&|told| told.end().resident_bytes as f64 / f64::from(1 << 20))?,
            scanned_per_merge: median(&|told| {
                told.end().pages_scanned as f64 / told.end().merges.max(1) as f64
            })?,
            scanned_per_merge_boot: median(&|told| {
                let boot = told.at(told.booted_seconds + BOOT_SECONDS);
                boot.pages_scanned as f64 / boot.merges.max(1) as f64
            })?,
            merges: median(&|told| told.end().merges as f64)?,
            broken_percent: median(&|told| {
                100.0 * told.end().breaks as f64 / told.end().merges.max(1) as f64
            })?,
            cpu_ms: median(&|told| told.end().cpu_seconds * 1e3)?,
            merges_per_cpu_second: median(&|told| {
                told.end().merges as f64 / told.end().cpu_seconds.max(1e-6)
            })?,
        })
    }
}

impl TypesReport {
    pub(super) fn new(host: Host, measured: Vec<(Scenario, Vec<Told>)>) -> Result<Self> {
        let told = measured.iter().flat_map(|(_, rounds)| rounds);
        ensure!(told.clone().all(|told| !told.moments.is_empty()), "samepage told no statistics");
        let row = |(scenario, rounds): (Scenario, Vec<Told>)| {
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
        let Host { processors, kernel, kvm, load: [before, after] } = &self.host;
        writeln!(
            f,
            "{processors} processors, Linux {kernel}, {kvm}; load {before:.2} before, {after:.2} after"
        )?;
        let rounds = self.rows[0].rounds.len();
        writeln!(
            f,
            "two Linux guests of {} MiB boot, read and write files, use and free memory; medians of {rounds}",
            self.guest_mib
        )?;

        let columns = [
            "saved, mean",
            "saved, end",
            "given back",
            "resident MiB",
            "looked at/merge",
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
                given_back,
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
                "{:width$} {mean_sharing:>15.0} {sharing:>15.0} {given_back:>15.0} {resident_mib:>15.1} \
                 {scanned_per_merge:>15.2} {scanned_per_merge_boot:>15.2} {merges:>15.0} \
                 {broken_percent:>13.1} % {cpu_ms:>15.0} {merges_per_cpu_second:>15.0}",
                row.scenario.name
            )?;
        }

        let (base, told) = (self.baseline(), self.rows[1].medians);
        writeln!(f, "\nWith what guests say against without it:")?;
        for (what, with, without) in [
            ("pages looked at for each merge", told.scanned_per_merge, base.scanned_per_merge),
            ("the same while booting", told.scanned_per_merge_boot, base.scanned_per_merge_boot),
            ("pages saved by sharing, on average", told.mean_sharing, base.mean_sharing),
            ("memory taken at the end", told.resident_mib, base.resident_mib),
            ("pages broken again", told.broken_percent, base.broken_percent),
            ("merges for each second of CPU time", told.merges_per_cpu_second, base.merges_per_cpu_second),
        ] {
            writeln!(f, "  {what:36} {:>6.2} times", with / without)?;
        }

        writeln!(f, "\nBy type, where agents say it and all is shared (last round):\n")?;
        writeln!(
            f,
            "{:15} {:>8} {:>8} {:>11} {:>8} {:>8} {:>15}",
            "", "pages", "saved", "given back", "merges", "broken", "a page lives"
        )?;
        let types = self.rows[1].rounds.last().map(|told| &told.types);
        for (name, told) in types.into_iter().flatten() {
            let TypeTold { pages, sharing, zero, merges, broken, merged_seconds, watched_seconds } = *told;
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
    use super::super::run::Moment;
    use super::*;

    fn report() -> TypesReport {
        let host = Host { processors: 2, kernel: "6.18.0".into(), kvm: "kvm_intel".into(), load: [0.0, 1.0] };
        let told = |slope: u64| Told {
            booted_seconds: 4.5,
            moments: (1..=12)
                .map(|second| Moment {
                    seconds: second as f64 + 0.01,
                    pages_sharing: slope * second,
                    cpu_seconds: 0.01 * second as f64,
                    pages_scanned: 300 * second,
                    merges: 2 * slope * second,
                    breaks: slope * second / 2,
                    resident_bytes: 64 << 20,
                    zero_pages: 7,
                })
                .collect(),
            types: [(
                "page_table".to_owned(),
                TypeTold {
                    pages: 5,
                    broken: 2,
                    merged_seconds: 30.0,
                    watched_seconds: 60.0,
                    ..TypeTold::default()
                },
            )]
            .into(),
        };
        let scenario = |name| Scenario { name, told: true, engine: "" };
        let rounds = |slope| vec![told(slope), told(slope + 10), told(slope - 10)];
        TypesReport::new(host, vec![(scenario("quiet"), rounds(100)), (scenario("told <all>"), rounds(150))])
            .unwrap()
    }

    #[test]
    fn tables_tell_medians_ratios_and_types() {
        let text = report().to_string();
        assert!(text.contains("quiet                  650            1200"), "{text}");
        assert!(text.contains("pages looked at for each merge         0.67 times"), "{text}");
        assert!(
            text.contains("page_table             5        0           0        0        2            15 s"),
            "{text}"
        );
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["rows"][1]["medians"]["broken_percent"], 25.0);
        assert_eq!(json["rows"][0]["rounds"][0]["moments"][11]["pages_sharing"], 1200);
    }
}
