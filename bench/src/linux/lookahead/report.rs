//! The results, as a table and as JSON.

use std::fmt;

use serde::Serialize;

use super::super::GUEST_MIB;
use super::run::EngineRun;
use crate::host::Host;

/// Time between two columns of the table, in seconds.
const STEP: usize = 5;

/// Results of `samepage bench lookahead`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LookaheadReport {
    /// The machine.
    pub(crate) host: Host,
    /// Memory of each guest, in MiB.
    pub(crate) guest_mib: u32,
    /// The limit of CPU time, in percent of a core.
    pub(crate) cpu_percent: f64,
    /// The engines' runs.
    #[serde(rename = "curves")]
    pub(crate) runs: Vec<EngineRun>,
}

impl LookaheadReport {
    pub(super) fn new(host: Host, cpu_percent: f64, runs: Vec<EngineRun>) -> Self {
        Self { host, guest_mib: GUEST_MIB, cpu_percent, runs }
    }

    /// Returns the duration of the shortest run, in seconds.
    pub(super) fn shortest(&self) -> f64 {
        self.runs.iter().map(|run| run.points.end().seconds).fold(f64::INFINITY, f64::min)
    }

    fn moments(&self) -> impl Iterator<Item = usize> + '_ {
        (STEP..=self.shortest() as usize).step_by(STEP)
    }
}

impl fmt::Display for LookaheadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.host)?;
        writeln!(
            f,
            "two Linux guests of {} MiB boot and work; {} % of a core for sharing",
            self.guest_mib, self.cpu_percent
        )?;

        let width = self.runs.iter().map(|run| run.engine.name.len()).max().unwrap_or(0);
        writeln!(f, "\nPages saved by sharing, by seconds after the start:\n")?;
        write!(f, "{:width$} {:>7}", "", "booted")?;
        self.moments().try_for_each(|moment| write!(f, " {moment:>7}"))?;
        writeln!(f, " {:>7}", "end")?;
        for run in &self.runs {
            write!(f, "{:width$} {:>6.1}s", run.engine.name, run.booted_seconds)?;
            for moment in self.moments() {
                write!(f, " {:>7}", run.points.at(moment as f64).pages_sharing)?;
            }
            writeln!(f, " {:>7}", run.points.end().pages_sharing)?;
        }

        writeln!(f, "\nEffort of finding them, until the end:\n")?;
        let columns = ["CPU ms", "merges", "lookahead", "steps/merge", "compared/merge", "CPU µs/merge"];
        write!(f, "{:width$}", "")?;
        columns.iter().try_for_each(|column| write!(f, " {column:>14}"))?;
        writeln!(f)?;
        for run in &self.runs {
            let end = run.points.end();
            let merges = end.merges.max(1) as f64;
            writeln!(
                f,
                "{:width$} {:>14.0} {:>14} {:>12.0} % {:>14.1} {:>14.1} {:>14.1}",
                run.engine.name,
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
    use super::super::super::series::{Point, Series};
    use super::super::run::Engine;
    use super::*;

    fn report() -> LookaheadReport {
        let host = Host { processors: 2, kernel: "6.18.0".into(), kvm: "kvm_intel".into(), load: [0.0, 1.0] };
        let run = |name, slope: u64| EngineRun {
            engine: Engine { name, settings: "" },
            booted_seconds: 4.5,
            points: Series(
                (1..=12)
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
            ),
        };
        LookaheadReport::new(host, 1.0, vec![run("fast", 100), run("slow & steady", 10)])
    }

    #[test]
    fn the_table_has_pages_over_time_and_the_effort() {
        let text = report().to_string();
        assert!(text.contains("fast             4.5s     500    1000    1200\n"), "{text}");
        let row = "slow & steady            120            240           50 %            3.0";
        assert!(text.contains(row), "{text}");
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["curves"][0]["name"], "fast");
        assert_eq!(json["curves"][1]["points"][11]["pages_sharing"], 120);
    }
}
