//! Measures both monitors alternately.

use std::path::Path;

use anyhow::{Context, Error, Result, bail};
use serde::Deserialize;

use super::StartupArgs;
use super::guest::Files;
use super::report::{MemoryRow, Pair, Spread, StartupReport, TimeRow};
use super::rounds;
use super::smaps::{self, Memory};
use crate::host::Host;
use crate::monitor::{self, GUEST_MIB, Running, Samepage};
use crate::qemu;
use crate::report::Figure;

/// Limit for the seconds until a number of idle guests is measured.
const SAMPLES: u32 = 60;
/// Seconds until samepage has freed the memory that its start left behind.
const SECONDS_TO_GIVE_BACK: u32 = 3;
const PAGE_KIB: u64 = 4;

/// Measures start-up times, then memory.
pub(super) fn startup(args: &StartupArgs, samepage: &Samepage, guests: &Files) -> Result<StartupReport> {
    let mut host = Host::look()?;
    let qemu = qemu::version().map_err(Error::msg)?;
    let times = vec![
        time("first instruction", args.runs, samepage, &guests.first_instruction)?,
        time("demo guest's first line", args.runs, samepage, &guests.demo)?,
    ];
    let mut numbers = args.vms.clone();
    numbers.sort_unstable();
    numbers.dedup();
    let memory = numbers.into_iter().map(|vms| memory(vms, samepage, &guests.demo)).collect::<Result<_>>()?;
    let rounds = rounds::measure(args.rounds, &samepage.program, &guests.demo)?;
    host.look_again()?;
    Ok(StartupReport::new(host, qemu, (GUEST_MIB, args.runs), (times, memory, rounds)))
}

fn time(what: &'static str, runs: u32, samepage: &Samepage, kernel: &Path) -> Result<TimeRow> {
    let milliseconds =
        |command: &mut _| monitor::time_to_first_byte(command).map(|elapsed| elapsed.as_secs_f64() * 1000.0);
    let mut samples = Pair { samepage: Vec::new(), qemu: Vec::new() };
    // The first start of each does not count, because it may read the program from disk.
    for run in 0..=runs {
        let first_samepage = run % 2 == 0;
        let mut qemu = 0.0;
        if !first_samepage {
            qemu = milliseconds(&mut monitor::qemu(kernel, 0))?;
        }
        let own = milliseconds(&mut samepage.command(kernel, 1, false))?;
        if first_samepage {
            qemu = milliseconds(&mut monitor::qemu(kernel, 0))?;
        }
        if run > 0 {
            samples.samepage.push(own);
            samples.qemu.push(qemu);
        }
    }
    let spread = |samples: Vec<f64>| {
        let Figure { median, quartiles: [lower, upper], .. } =
            Figure::of(&samples).context("nothing was measured")?;
        anyhow::Ok(Spread { lower_quartile_ms: lower, median_ms: median, upper_quartile_ms: upper })
    };
    Ok(TimeRow::new(what, Pair { samepage: spread(samples.samepage)?, qemu: spread(samples.qemu)? }))
}

fn memory(vms: u32, samepage: &Samepage, kernel: &Path) -> Result<MemoryRow> {
    let mut own = Running::start(&mut samepage.command(kernel, vms, true))?;
    own.wait_until_idle(vms)?;
    let samepage = memory_at_rest(&mut own)?;
    drop(own);

    let mut processes = Vec::new();
    for vm in 0..vms {
        let mut process = Running::start(&mut monitor::qemu(kernel, vm))?;
        process.wait_until_idle(1)?;
        processes.push(process);
    }
    let mut qemu = Memory::default();
    for process in &processes {
        qemu += smaps::of_qemu(process.id(), u64::from(GUEST_MIB) << 10)?;
    }
    Ok(MemoryRow::new(vms, Pair { samepage, qemu }))
}

/// The part of samepage's statistics that tells how much of its memory belongs to guests.
#[derive(Debug, Deserialize, PartialEq, Eq)]
struct Statistics {
    merges: u64,
    pages_unshared: u64,
    vms: Vec<VmStatistics>,
}

#[derive(Debug, Deserialize, PartialEq, Eq)]
struct VmStatistics {
    pages_private: u64,
}

impl Statistics {
    fn private_kib(&self) -> u64 {
        self.vms.iter().map(|vm| vm.pages_private).sum::<u64>() * PAGE_KIB
    }
}

/// Returns the memory of a samepage process whose statistics have stopped changing. They appear each second.
/// The process frees memory a second after its last VM has started.
fn memory_at_rest(process: &mut Running) -> Result<Memory> {
    for _ in 0..SECONDS_TO_GIVE_BACK {
        statistics(process)?;
    }
    let mut before = statistics(process)?;
    for _ in 0..SAMPLES {
        let memory = smaps::of_samepage(process.id(), before.private_kib())?;
        let after = statistics(process)?;
        if after == before {
            return Ok(memory);
        }
        before = after;
    }
    bail!("memory of idle guests still changes after {SAMPLES} s; their last statistics: {before:?}")
}

fn statistics(process: &mut Running) -> Result<Statistics> {
    loop {
        let line = process.line()?;
        if line.starts_with('{') {
            return serde_json::from_str(&line).with_context(|| format!("reading the statistics {line:?}"));
        }
    }
}
