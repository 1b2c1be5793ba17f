//! The longest times for which the engine is locked, by activity. Guests that wait for their disks wait for
//! that. The VMs are large, because no time should grow with their size.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use samepage_hole::{FrameRange, GuestHeader, Hole, HostHeader, MAX_RANGES, PUBLISHED, bytes_for, flags};
use samepage_sharing::Slot;
use samepage_sharing::blocks::{BlockRead, Image, Keep};
use samepage_sharing::calls::Linux;
use samepage_sharing::changes::ChangeLog;
use samepage_sharing::claims::ClaimSource;
use samepage_sharing::engine::{Engine, Mode, Settings, Step};
use samepage_sharing::hints::Hint;
use samepage_sharing::holds::Hold;
use samepage_sharing::store::FrameStore;

use super::context::Bench;
use super::layout::{Layout, own};
use super::memory::Memory;
use super::report::{Goal, Measurement, Section};

const VMS: u64 = 4;
/// Number of intervals after each event.
const INTERVALS: u32 = 6;

/// Number of disk blocks to read at once.
const READ_BLOCKS: u32 = 256;
/// Number of an agent's passes after which free pages are tried again.
const PASSES: u32 = 33;

/// The longest times of one round.
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
         one VM stops to share and begins again, one frees half of its memory, one says what its pages are for \
         and falls silent, one reads a quarter of its memory from a disk and discards those blocks, and one ends",
    );
    section.note(
        "the engine is alone here and counts the process's mappings itself; where VMs run, a thread that holds no \
         engine does",
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
    // Every second run of 16, and every second page of a part.
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
    hints.give(Hint { pages: 0..pages / 2, image: 1, block: 512 });
    hints.give(Hint { pages: 0..512, image: 1, block: 0 });
    work(bench, &mut engine, &mut now)?;
    claim(bench, &mut engine, slots[3], pages, &mut now)?;
    discard(bench, &mut engine, slots[2], &memory[2], &mut now)?;
    engine.remove(slots[0]).context("remove a VM")?;
    work(bench, &mut engine, &mut now)?;
    let holds = engine.take_holds();
    for slot in slots {
        engine.remove(slot).context("remove a VM")?;
    }
    Ok(holds)
}

/// Reads a disk into a quarter of a VM's memory, and discards the same blocks.
fn discard(bench: &Bench, engine: &mut Engine, slot: Slot, memory: &Memory, now: &mut Instant) -> Result<()> {
    let blocks = memory.pages() / 4;
    let image = Image([1, 2, 3, 4]);
    let vm = engine.vm_number(slot);
    for first in (0..blocks).step_by(READ_BLOCKS as usize) {
        bench.check()?;
        let targets: Vec<_> = (first..blocks.min(first + READ_BLOCKS)).map(Some).collect();
        let read = BlockRead { keep: Keep::Exclusive, image, first: first.into(), targets: &targets };
        let mut copied = |_, _: &_| {};
        for fetch in engine.begin_read(vm, &read, &mut copied).fetches {
            memory.land(&fetch, 1 << 50 | fetch.first);
            engine.end_fetch(fetch.token, true, &mut copied);
        }
    }
    // If mappings are short, blocks are copied to guests.
    let cache = engine.cache_statistics();
    ensure!(cache.blocks_in_guests + cache.blocks_noted >= u64::from(blocks) / 2, "{cache:?}");
    work(bench, engine, now)?;
    let discarded = 0..u64::from(blocks);
    engine.begin_write(image, &discarded);
    engine.end_write(image, &discarded);
    work(bench, engine, now)
}

/// A guest publishes half of its pages as free, repeatedly, and then publishes nothing any more.
fn claim(bench: &Bench, engine: &mut Engine, slot: Slot, pages: u32, now: &mut Instant) -> Result<()> {
    let words = (0..bytes_for(pages) / 4).map(|_| AtomicU32::new(0)).collect();
    let agent = Arc::new(Agent { words, ranges: [FrameRange { first: 0, count: pages }], frames: pages });
    let mut ranges = [FrameRange::default(); MAX_RANGES];
    ranges[..1].copy_from_slice(&agent.ranges);
    let header = HostHeader { frames: pages, ranges, ..HostHeader::default() };
    agent.hole().set_host_header(&header);
    let bell = Arc::new(AtomicBool::new(false));
    engine.listen(slot, agent.clone(), Arc::clone(&bell));
    for (page, word) in agent.hole().flags().iter().enumerate().take(pages as usize) {
        let kind = if page % 128 < 64 { flags::BUDDY } else { flags::SLAB };
        word.store(PUBLISHED | kind, Ordering::Relaxed);
    }
    for generation in 1..=PASSES {
        let answered = agent.hole().host_header().map_or(0, |header| header.requested);
        let header = GuestHeader { generation, answered, next_ms: 100, ..GuestHeader::default() };
        agent.hole().set_guest_header(&header);
        bell.store(true, Ordering::Release);
        work(bench, engine, now)?;
    }
    let claimed = engine.claimed(slot)?.context("the VM is there")?;
    ensure!(claimed.given_back > 0, "free pages are freed: {claimed:?}");
    agent.hole().clear_guest_header();
    bell.store(true, Ordering::Release);
    work(bench, engine, now)
}

/// An agent without a guest.
#[derive(Debug)]
struct Agent {
    words: Vec<AtomicU32>,
    ranges: [FrameRange; 1],
    frames: u32,
}

impl ClaimSource for Agent {
    fn hole(&self) -> Hole<'_> {
        Hole::new(&self.words, self.frames).expect("there is a word for each page")
    }

    fn ranges(&self) -> &[FrameRange] {
        &self.ranges
    }
}

/// Lets intervals pass, with all of their work.
fn work(bench: &Bench, engine: &mut Engine, now: &mut Instant) -> Result<()> {
    // Due work counts as due now.
    *now = (*now).max(Instant::now());
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
