//! The results, as a table and as JSON.

use std::fmt;

use serde::Serialize;

use super::rounds::RoundsRow;
use super::smaps::Memory;
use crate::host::Host;

/// The goal for samepage's time, as a part of QEMU's.
const TIME_GOAL: f64 = 1.0 / 3.0;
/// The goal for a VM's memory in addition to its own, in KiB, including the memory of its process.
const FIRST_VM_GOAL_KIB: f64 = 5.0 * 1024.0;
/// The same for each further VM of the process.
const FURTHER_VM_GOAL_KIB: f64 = 1024.0;
/// The goal for a process's memory after all VMs have ended, in KiB.
const KEPT_GOAL_KIB: f64 = 10.0 * 1024.0;

/// A measurement of both monitors.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Pair<T> {
    /// samepage's value.
    pub(crate) samepage: T,
    /// QEMU's value.
    pub(crate) qemu: T,
}

/// Times of several runs, in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Spread {
    /// A quarter of the runs took less.
    pub(crate) lower_quartile_ms: f64,
    /// Half of the runs took less.
    pub(crate) median_ms: f64,
    /// A quarter of the runs took more.
    pub(crate) upper_quartile_ms: f64,
}

/// The time from the start of a process to its guest's first output.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct TimeRow {
    /// The kind of output.
    pub(crate) what: &'static str,
    /// The times.
    #[serde(flatten)]
    pub(crate) times: Pair<Spread>,
    /// The ratio of the medians.
    pub(crate) ratio: f64,
}

impl TimeRow {
    pub(super) fn new(what: &'static str, times: Pair<Spread>) -> Self {
        let ratio = times.samepage.median_ms / times.qemu.median_ms;
        Self { what, times, ratio }
    }
}

/// Memory of everything that runs a number of VMs, in addition to the guests' own.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct MemoryRow {
    /// Number of VMs: in one process of samepage, and in as many of QEMU.
    pub(crate) vms: u32,
    /// The memory.
    #[serde(flatten)]
    pub(crate) memory: Pair<Memory>,
    /// The ratio of the proportional set sizes.
    pub(crate) ratio: f64,
}

impl MemoryRow {
    pub(super) fn new(vms: u32, memory: Pair<Memory>) -> Self {
        let ratio = memory.samepage.proportional_kib as f64 / memory.qemu.proportional_kib as f64;
        Self { vms, memory, ratio }
    }

    fn proportional(&self) -> Pair<f64> {
        let kib = |memory: &Memory| memory.proportional_kib as f64;
        Pair { samepage: kib(&self.memory.samepage), qemu: kib(&self.memory.qemu) }
    }
}

/// The memory that a VM adds, by proportional set size, in KiB.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct VmRow {
    /// The VM.
    pub(crate) what: String,
    /// The memory.
    #[serde(flatten)]
    pub(crate) kib: Pair<f64>,
    /// The ratio.
    pub(crate) ratio: f64,
    /// The goal for samepage.
    pub(crate) goal_kib: f64,
}

impl VmRow {
    /// Returns rows for the first VM and for the average of the others, from ascending numbers of VMs, as far
    /// as these allow.
    fn all(memory: &[MemoryRow]) -> Vec<Self> {
        let [first, .., last] = memory else {
            return memory.iter().filter_map(Self::first).collect();
        };
        let further = f64::from(last.vms - first.vms);
        let (few, many) = (first.proportional(), last.proportional());
        let kib = Pair {
            samepage: (many.samepage - few.samepage) / further,
            qemu: (many.qemu - few.qemu) / further,
        };
        let what = format!("each of VMs {} to {}", first.vms + 1, last.vms);
        Self::first(first).into_iter().chain([Self::new(what, kib, FURTHER_VM_GOAL_KIB)]).collect()
    }

    fn first(memory: &MemoryRow) -> Option<Self> {
        (memory.vms == 1).then(|| Self::new("VM 1".to_owned(), memory.proportional(), FIRST_VM_GOAL_KIB))
    }

    fn new(what: String, kib: Pair<f64>, goal_kib: f64) -> Self {
        let ratio = kib.samepage / kib.qemu;
        Self { what, kib, ratio, goal_kib }
    }
}

/// Results of `samepage bench startup`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct StartupReport {
    /// The machine.
    pub(crate) host: Host,
    /// QEMU's version.
    pub(crate) qemu: String,
    /// Memory of each guest, in MiB.
    pub(crate) guest_mib: u32,
    /// Runs for each time.
    pub(crate) runs: u32,
    /// Times.
    pub(crate) times: Vec<TimeRow>,
    /// Memory, by ascending numbers of VMs.
    pub(crate) memory: Vec<MemoryRow>,
    /// The memory for each VM.
    pub(crate) vms: Vec<VmRow>,
    /// The memory of a process after its VMs have ended.
    pub(crate) rounds: RoundsRow,
}

impl StartupReport {
    pub(super) fn new(
        host: Host,
        qemu: String,
        (guest_mib, runs): (u32, u32),
        (times, memory, rounds): (Vec<TimeRow>, Vec<MemoryRow>, RoundsRow),
    ) -> Self {
        let vms = VmRow::all(&memory);
        Self { host, qemu, guest_mib, runs, times, memory, vms, rounds }
    }
}

impl fmt::Display for StartupReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Host { processors, kernel, kvm, load: [before, after] } = &self.host;
        writeln!(f, "{processors} processors, Linux {kernel}, {kvm}; {}", self.qemu)?;
        writeln!(f, "load average {before:.2} before, {after:.2} after; guests of {} MiB", self.guest_mib)?;

        writeln!(f, "\nTime from the start of the process to the guest's first byte of output, in ms:")?;
        writeln!(f, "median (quartiles) of {} runs, in turns\n", self.runs)?;
        writeln!(f, "{:<24} {:>22} {:>22} {:>6}  goal", "", "samepage", "QEMU microvm", "ratio")?;
        for TimeRow { what, times: Pair { samepage, qemu }, ratio } in &self.times {
            let (samepage, qemu) = (samepage.to_string(), qemu.to_string());
            let verdict = verdict(*ratio, TIME_GOAL);
            writeln!(f, "{what:<24} {samepage:>22} {qemu:>22} {ratio:>6.3}  {TIME_GOAL:.2}: {verdict}")?;
        }

        writeln!(
            f,
            "\nMemory beyond the guests' own, in KiB: one process of samepage's, one a VM of QEMU's"
        )?;
        writeln!(f, "(proportional: private, and a share of what several processes have mapped)\n")?;
        let columns = format!("{:>8} {:>12} {:>11}", "private", "proportional", "page tables");
        writeln!(f, "{:>5} {:>33} {:>33}", "", "samepage", "QEMU microvm")?;
        writeln!(f, "{:>5} {columns} {columns} {:>6}", "VMs", "ratio")?;
        for MemoryRow { vms, memory: Pair { samepage, qemu }, ratio } in &self.memory {
            writeln!(f, "{vms:>5} {samepage} {qemu} {ratio:>6.3}")?;
        }

        writeln!(f, "\nOf that, proportional, in KiB:\n")?;
        writeln!(f, "{:<24} {:>22} {:>22} {:>6}  goal", "", "samepage", "QEMU microvm", "ratio")?;
        for VmRow { what, kib: Pair { samepage, qemu }, ratio, goal_kib } in &self.vms {
            let verdict = verdict(*samepage, *goal_kib);
            writeln!(f, "{what:<24} {samepage:>22.0} {qemu:>22.0} {ratio:>6.3}  {goal_kib}: {verdict}")?;
        }

        let RoundsRow { rounds, vms, before_kib, after_kib } = self.rounds;
        let verdict = verdict(after_kib as f64, KEPT_GOAL_KIB);
        writeln!(f, "\nPrivate memory of samepage's process without VMs, in KiB:\n")?;
        writeln!(f, "before the first VM {before_kib:>12}")?;
        writeln!(f, "after {rounds} rounds of {vms} VMs {after_kib:>6}  goal {KEPT_GOAL_KIB}: {verdict}")
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lower_quartile_ms, median_ms, upper_quartile_ms } = self;
        write!(f, "{median_ms:.1} ({lower_quartile_ms:.1}-{upper_quartile_ms:.1})")
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { private_kib, proportional_kib, page_tables_kib } = self;
        write!(f, "{private_kib:>8} {proportional_kib:>12} {page_tables_kib:>11}")
    }
}

fn verdict(found: f64, most: f64) -> &'static str {
    if found <= most { "met" } else { "missed" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(vms: u32, samepage: u64, qemu: u64) -> MemoryRow {
        let memory =
            |kib| Memory { private_kib: kib / 2, proportional_kib: kib, page_tables_kib: u64::from(vms) };
        MemoryRow::new(vms, Pair { samepage: memory(samepage), qemu: memory(qemu) })
    }

    #[test]
    fn what_a_vm_needs_follows_from_numbers_of_vms() {
        let rows = VmRow::all(&[row(1, 2000, 30_000), row(2, 2300, 50_000), row(11, 4000, 230_000)]);
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].kib.samepage, rows[0].kib.qemu), (2000.0, 30_000.0));
        assert_eq!((rows[1].kib.samepage, rows[1].kib.qemu, rows[1].ratio), (200.0, 20_000.0, 0.01));
        assert_eq!(rows[1].what, "each of VMs 2 to 11");
        assert_eq!(VmRow::all(&[row(1, 1, 1)]).len(), 1);
        assert_eq!(VmRow::all(&[row(2, 1, 1), row(4, 3, 5)]).len(), 1);
        assert!(VmRow::all(&[row(2, 1, 1)]).is_empty());
    }

    #[test]
    fn the_table_tells_ratios_and_goals() {
        let host = Host { processors: 2, kernel: "6.18.0".into(), kvm: "kvm_intel".into(), load: [0.0, 1.0] };
        let spread =
            |median_ms| Spread { lower_quartile_ms: 1.0, median_ms, upper_quartile_ms: 2.0 * median_ms };
        let times = TimeRow::new("first instruction", Pair { samepage: spread(6.0), qemu: spread(12.0) });
        let memory = vec![row(1, 2000, 40_000), row(3, 2400, 80_000)];
        let rounds = RoundsRow { rounds: 50, vms: 32, before_kib: 3000, after_kib: 6000 };
        let report = StartupReport::new(host, "QEMU 7".into(), (64, 20), (vec![times], memory, rounds));

        let text = report.to_string();
        assert!(text.contains("6.0 (1.0-12.0)") && text.contains("0.500  0.33: missed"), "{text}");
        assert!(text.contains("0.050  5120: met") && text.contains("0.010  1024: met"), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["times"][0]["qemu"]["median_ms"], 12.0);
        assert_eq!(json["memory"][1]["samepage"]["proportional_kib"], 2400);
        assert_eq!(json["vms"][1]["samepage"], 200.0);
    }
}
