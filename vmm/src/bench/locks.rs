//! For how long the engine is kept from others at a time, by what it does: guests that wait for their disks
//! wait for that. Large VMs, since nothing is to grow with them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use samepage_sharing::calls::Linux;
use samepage_sharing::changes::ChangeLog;
use samepage_sharing::engine::{Engine, Mode, Settings, Step};
use samepage_sharing::hints::Hint;
use samepage_sharing::holds::Hold;
use samepage_sharing::store::FrameStore;

use super::context::Bench;
use super::layout::{Layout, own};
use super::memory::Memory;
use super::report::{Goal, Measurement, Section};

const VMS: u64 = 4;
/// Intervals that pass after each thing that happens.
const INTERVALS: u32 = 6;

/// The longest holds of one round.
type Longest = BTreeMap<&'static str, Hold>;

pub(super) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let pages = bench.size(1 << 19, 1 << 14);
    let title = format!("The longest time that the engine is held at once: {VMS} VMs of {} MiB", pages >> 8);
    let mut section = Section::new(title, "CPU time", "real time");
    let mut rounds: Vec<Longest> = Vec::new();
    for round in 0..bench.rounds {
        bench.say(format_args!("round {} of {}", round + 1, bench.rounds));
        rounds.push(self::round(bench, pages)?);
    }
    let names: std::collections::BTreeSet<_> = rounds.iter().flat_map(BTreeMap::keys).copied().collect();
    for name in names {
        let holds: Vec<_> = rounds.iter().filter_map(|round| round.get(name)).collect();
        let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
        let cpu: Vec<_> = holds.iter().map(|hold| milliseconds(hold.cpu)).collect();
        let longest: Vec<_> = holds.iter().map(|hold| milliseconds(hold.longest)).collect();
        let times = holds.iter().map(|hold| hold.times).max().unwrap_or(0);
        let measurement = Measurement::new(name, "ms", &cpu, &longest).goal(Goal::AtMost(2.0));
        section.push(measurement.note(format!("{times} times")));
    }
    section.note(
        "half of each VM's memory is alike in all, an eighth is its own; then half of what is alike is written, \
         one VM stops to share and begins again, one frees half of its memory, and one ends",
    );
    section.note("on a busy host the real time is what the thread waits for its processor");
    Ok(vec![section])
}

fn round(bench: &Bench, pages: u32) -> Result<Longest> {
    let store = FrameStore::create(4 * pages).context("create the frame store")?;
    let calls = Linux::open(Arc::clone(store.file())).context("open the kernel's calls")?;
    let mut engine = Engine::new(&Settings::default(), store, Box::new(calls)).context("make an engine")?;
    let memory = Memory::filled(&Layout { vms: vec![vec![None; pages as usize]; VMS as usize] })?;
    let mut slots = Vec::new();
    for vm in &memory {
        let log: Box<dyn ChangeLog> = Box::new(vm.log());
        slots.push(engine.add(vm.ram(), Some(log), Box::new(|_| {})).context("share memory")?);
    }
    let mut now = Instant::now();
    for (number, vm) in (0..).zip(&memory) {
        bench.check()?;
        (0..pages / 2).for_each(|page| vm.write(page, 1 + u64::from(page)));
        (pages / 2..pages / 8 * 5).for_each(|page| vm.write(page, own(number, page.into())));
    }
    work(bench, &mut engine, &mut now)?;
    ensure!(engine.statistics().pages_sharing > u64::from(pages), "{:?}", engine.statistics());
    // Every other run of 16, and every other page of a part.
    for (number, vm) in (0..).zip(&memory) {
        let written = |page: &u32| if page % 256 < 64 { page.is_multiple_of(2) } else { page % 32 < 16 };
        (0..pages / 2).filter(written).for_each(|page| vm.write(page, own(10 + number, page.into())));
    }
    work(bench, &mut engine, &mut now)?;
    for &slot in &slots {
        engine.vm_statistics(slot)?;
        engine.claimed(slot)?;
        engine.map(slot, 1000)?;
    }
    engine.set_mode(slots[1], Mode::Off);
    work(bench, &mut engine, &mut now)?;
    engine.set_mode(slots[1], Mode::Full);
    let hints = engine.hints(slots[2]).context("the VM is there")?;
    hints.give(Hint::Freed { pages: 0..pages / 2 });
    work(bench, &mut engine, &mut now)?;
    engine.remove(slots[0]).context("remove a VM")?;
    work(bench, &mut engine, &mut now)?;
    let holds = engine.take_holds();
    for slot in slots {
        engine.remove(slot).context("remove a VM")?;
    }
    Ok(holds)
}

/// Lets intervals pass, with all work in them.
fn work(bench: &Bench, engine: &mut Engine, now: &mut Instant) -> Result<()> {
    for _ in 0..INTERVALS {
        loop {
            bench.check()?;
            if let Step::RestUntil(until) = engine.step(*now) {
                *now = until.max(*now + Duration::from_millis(1));
                break;
            }
        }
    }
    Ok(())
}
