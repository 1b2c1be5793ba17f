//! The results, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result};
use serde::Serialize;

use super::run::Phase;
use crate::host::Host;
use crate::report::Figure;

/// KVM's counters in the table, with their columns.
const COLUMNS: [(&str, &str); 5] = [
    ("exits", "exits"),
    ("mmio_exits", "to samepage"),
    ("halt_exits", "halts"),
    ("irq_injections", "interrupts"),
    ("insn_emulation", "interpreted"),
];

/// Results of `samepage bench requests`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RequestsReport {
    /// The machine.
    pub(crate) host: Host,
    /// Boots with each bus.
    pub(crate) runs: u32,
    /// What guests did, by bus.
    pub(crate) rows: Vec<Row>,
}

/// Medians of what a guest did with one bus.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    /// The bus.
    pub(crate) bus: &'static str,
    /// The kind of request.
    pub(crate) what: &'static str,
    /// Requests in each run.
    pub(crate) requests: f64,
    /// Time for each, in microseconds.
    pub(crate) microseconds: f64,
    /// KVM's counters for each, by KVM's names. Exits for ports are no part of `exits`.
    pub(crate) counts: BTreeMap<String, f64>,
}

impl RequestsReport {
    pub(super) fn new(host: Host, runs: u32, phases: &[Phase]) -> Result<Self> {
        let mut rows: Vec<Row> = Vec::new();
        for Phase { bus, what, .. } in phases {
            if rows.iter().any(|row| (row.bus, row.what) == (*bus, *what)) {
                continue;
            }
            let same: Vec<_> =
                phases.iter().filter(|other| (other.bus, other.what) == (*bus, *what)).collect();
            rows.push(Row::new(&same)?);
        }
        // What is compared stands together.
        let order: Vec<_> = rows.iter().map(|row| row.what).collect();
        rows.sort_by_key(|row| order.iter().position(|what| *what == row.what));
        Ok(Self { host, runs, rows })
    }
}

impl Row {
    fn new(phases: &[&Phase]) -> Result<Self> {
        let median = |of: &dyn Fn(&Phase) -> f64| {
            let figure = Figure::of(&phases.iter().map(|phase| of(phase)).collect::<Vec<_>>());
            anyhow::Ok(figure.context("nothing was measured")?.median)
        };
        let each = |phase: &Phase, value: f64| value / phase.requests.max(1) as f64;
        let first = phases.first().context("nothing was measured")?;
        let counts = first.counts.keys().map(|name| {
            let of = |phase: &Phase| each(phase, phase.counts.get(name).copied().unwrap_or(0) as f64);
            Ok((name.clone(), median(&of)?))
        });
        let counts: BTreeMap<_, _> = counts.collect::<Result<_>>()?;
        Ok(Self {
            bus: first.bus,
            what: first.what,
            requests: median(&|phase| phase.requests as f64)?,
            microseconds: median(&|phase| each(phase, phase.elapsed.as_secs_f64() * 1e6))?,
            counts: counts.into_iter().filter(|(_, count)| *count > 0.0).collect(),
        })
    }
}

impl fmt::Display for RequestsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.host)?;
        writeln!(f, "medians of {} boots with each bus; for each request:", self.runs)?;
        write!(f, "\n{:26}{:6}{:>10}", "", "bus", "requests")?;
        COLUMNS.iter().try_for_each(|(_, column)| write!(f, "{column:>13}"))?;
        writeln!(f, "{:>13}", "µs")?;
        for Row { bus, what, requests, microseconds, counts } in &self.rows {
            write!(f, "{what:26}{bus:6}{requests:>10.0}")?;
            for (name, _) in COLUMNS {
                write!(f, "{:>13.2}", counts.get(name).copied().unwrap_or(0.0))?;
            }
            writeln!(f, "{microseconds:>13.0}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn figures_are_medians_for_each_request_and_stand_together() {
        let phase = |bus, what, exits| Phase {
            bus,
            what,
            requests: 10,
            elapsed: Duration::from_millis(1),
            counts: [("exits".to_owned(), exits), ("hypercalls".to_owned(), 0)].into(),
        };
        let phases = [
            phase("mmio", "read", 40),
            phase("mmio", "frame", 5),
            phase("pci", "read", 20),
            phase("mmio", "read", 30),
            phase("mmio", "read", 90),
        ];
        let host = Host { processors: 2, kernel: "6.18.0".into(), kvm: "kvm_intel".into(), load: [0.0, 1.0] };
        let report = RequestsReport::new(host, 3, &phases).unwrap();
        let rows: Vec<_> = report
            .rows
            .iter()
            .map(|row| (row.what, row.bus, row.counts["exits"], row.microseconds))
            .collect();
        assert_eq!(
            rows,
            [("read", "mmio", 4.0, 100.0), ("read", "pci", 2.0, 100.0), ("frame", "mmio", 0.5, 100.0)]
        );
        assert_eq!(report.rows[0].counts.len(), 1);
        assert!(
            report.to_string().contains("read                      mmio          10         4.00"),
            "{report}"
        );
    }
}
