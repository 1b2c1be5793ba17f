//! The results, as a table and as JSON.

use std::fmt;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::run::{Curve, GUEST_MIB};
use crate::host::Host;

/// Between two columns of the table, in seconds.
const STEP: usize = 5;

/// Results of `samepage bench lookahead`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LookaheadReport {
    /// The machine.
    pub(crate) host: Host,
    /// Memory of each guest, in MiB.
    pub(crate) guest_mib: u32,
    /// The ceiling of CPU time, in percent of a core.
    pub(crate) cpu_percent: f64,
    /// The engines.
    pub(crate) curves: Vec<Curve>,
}

impl LookaheadReport {
    pub(super) fn new(host: Host, cpu_percent: f64, curves: Vec<Curve>) -> Result<Self> {
        ensure!(curves.iter().all(|curve| !curve.points.is_empty()), "samepage told no statistics");
        Ok(Self { host, guest_mib: GUEST_MIB, cpu_percent, curves })
    }

    /// The last moment that all curves reach, in seconds.
    pub(super) fn shortest(&self) -> f64 {
        self.curves.iter().map(|curve| curve.end().seconds).fold(f64::INFINITY, f64::min)
    }

    fn moments(&self) -> impl Iterator<Item = usize> + '_ {
        (STEP..=self.shortest() as usize).step_by(STEP)
    }
}

impl fmt::Display for LookaheadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Host { processors, kernel, kvm, load: [before, after] } = &self.host;
        writeln!(
            f,
            "{processors} processors, Linux {kernel}, {kvm}; load {before:.2} before, {after:.2} after"
        )?;
        writeln!(
            f,
            "two Linux guests of {} MiB boot and work; {} % of a core for sharing",
            self.guest_mib, self.cpu_percent
        )?;

        let width = self.curves.iter().map(|curve| curve.engine.name.len()).max().unwrap_or(0);
        writeln!(f, "\nPages saved by sharing, so many seconds after the start:\n")?;
        write!(f, "{:width$} {:>7}", "", "booted")?;
        self.moments().try_for_each(|moment| write!(f, " {moment:>7}"))?;
        writeln!(f, " {:>7}", "end")?;
        for curve in &self.curves {
            write!(f, "{:width$} {:>6.1}s", curve.engine.name, curve.booted_seconds)?;
            for moment in self.moments() {
                write!(f, " {:>7}", curve.at(moment as f64).pages_sharing)?;
            }
            writeln!(f, " {:>7}", curve.end().pages_sharing)?;
        }

        writeln!(f, "\nWhat finding them took, until the end:\n")?;
        let columns = ["CPU ms", "merges", "lookahead", "steps/merge", "compared/merge", "CPU µs/merge"];
        write!(f, "{:width$}", "")?;
        columns.iter().try_for_each(|column| write!(f, " {column:>14}"))?;
        writeln!(f)?;
        for curve in &self.curves {
            let end = curve.end();
            let merges = end.merges.max(1) as f64;
            writeln!(
                f,
                "{:width$} {:>14.0} {:>14} {:>12.0} % {:>14.1} {:>14.1} {:>14.1}",
                curve.engine.name,
                end.cpu_seconds * 1e3,
                end.merges,
                end.merges_lookahead as f64 * 100.0 / merges,
                end.search_steps as f64 / merges,
                end.comparisons as f64 / merges,
                end.cpu_seconds * 1e6 / merges,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::run::{Engine, Point};
    use super::*;

    fn report() -> LookaheadReport {
        let host = Host { processors: 2, kernel: "6.18.0".into(), kvm: "kvm_intel".into(), load: [0.0, 1.0] };
        let curve = |name, slope: u64| Curve {
            engine: Engine { name, settings: "" },
            booted_seconds: 4.5,
            points: (1..=12)
                .map(|second| Point {
                    seconds: second as f64 + 0.01,
                    pages_sharing: slope * second,
                    cpu_seconds: 0.01 * second as f64,
                    merges: 2 * slope * second,
                    merges_lookahead: slope * second,
                    search_steps: 6 * slope * second,
                    ..Point::default()
                })
                .collect(),
        };
        LookaheadReport::new(host, 1.0, vec![curve("fast", 100), curve("slow & steady", 10)]).unwrap()
    }

    #[test]
    fn the_table_tells_pages_over_time_and_what_they_took() {
        let text = report().to_string();
        assert!(text.contains("fast             4.5s     500    1000    1200\n"), "{text}");
        let row = "slow & steady            120            240           50 %            3.0";
        assert!(text.contains(row), "{text}");
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["curves"][0]["name"], "fast");
        assert_eq!(json["curves"][1]["points"][11]["pages_sharing"], 120);
    }

    #[test]
    fn engines_without_statistics_are_refused() {
        let LookaheadReport { host, mut curves, .. } = report();
        curves[1].points.clear();
        assert!(LookaheadReport::new(host, 1.0, curves).is_err());
    }
}
