//! The cost of giving disk blocks to guests by mapping, compared with copying. It is measured for runs of
//! several lengths, from the blocks' arrival in host memory until the guest has read each of them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::blocks::{BlockRead, CacheSize, Image, Keep};
use samepage_sharing::calls::Linux;
use samepage_sharing::engine::{Engine, Settings};
use samepage_sharing::store::FrameStore;

use super::context::Bench;
use super::cpu::{self, micros_each};
use super::memory::Memory;
use super::report::{Measurement, Section};

const TITLE: &str = "CPU time for each block of a disk that a guest gets and reads";
/// Pages between runs, so that each run is mapped separately.
const GAP: u32 = 1;

pub(super) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let mut section = Section::new(TITLE, "mapped", "copied");
    for (touched, name) in [(false, "new memory"), (true, "memory in use")] {
        for run in [1, 2, 4, 8, 16, 32] {
            let (mapped, copied) = bench.in_turns(
                &format!("runs of {run}, {name}"),
                || deliver(bench, run, 1, touched).map(Some),
                || deliver(bench, run, u32::MAX, touched).map(Some),
            )?;
            section.push(Measurement::new(format!("runs of {run}, {name}"), "µs/block", &mapped, &copied));
        }
    }
    section.note(
        "copying includes the digest by which the block is found again in the guest; a mapped block needs none",
    );
    Ok(vec![section])
}

/// Returns the CPU time for each block, in microseconds.
fn deliver(bench: &Bench, run: u32, shortest_mapping: u32, touched: bool) -> Result<f64> {
    let blocks = bench.size(16384, 4096);
    let runs = blocks / run;
    let memory = Memory::new(runs * (run + GAP))?;
    if touched {
        (0..memory.pages()).for_each(|page| memory.write_word(page, 0, 1 + u64::from(page)));
    }
    let store = FrameStore::create(1 << 20).context("create the frame store")?;
    let calls = Linux::open(Arc::clone(store.file())).context("open the kernel's calls")?;
    let block_cache = CacheSize::Bytes(0);
    let settings = Settings { shortest_mapping, block_cache, ..Settings::default() };
    let mut engine = Engine::new(&settings, store, Box::new(calls)).context("make an engine")?;
    let slot =
        engine.add(memory.ram(), Some(Box::new(memory.log())), Box::new(|_| {})).context("share memory")?;
    let vm = engine.vm_number(slot);

    let mut time = Duration::ZERO;
    for index in 0..runs {
        bench.check()?;
        let first = index * (run + GAP);
        let targets: Vec<_> = (first..first + run).map(Some).collect();
        let read = BlockRead {
            keep: Keep::Exclusive,
            image: Image([0; 4]),
            first: u64::from(index * run),
            targets: &targets,
        };
        let mut copy = |at: usize, content: &[u8; PAGE_SIZE]| {
            if let Some(page) = targets[at] {
                memory.fill(page, content);
            }
        };
        let (plan, begun) = cpu::of(|| engine.begin_read(vm, &read, &mut copy));
        ensure!(plan.fetches.len() == 1, "a run of blocks is one fetch");
        for fetch in &plan.fetches {
            memory.land(fetch, u64::from(first) << 16);
        }
        let (delivered, ended) = cpu::of(|| engine.end_fetch(plan.fetches[0].token, true, &mut copy));
        ensure!(delivered, "the VM is there");
        let (_, read) =
            cpu::of(|| (first..first + run).map(|page| memory.read(page)).fold(0, u64::wrapping_add));
        time += begun + ended + read;
    }
    let statistics = engine.cache_statistics();
    let mapped =
        if shortest_mapping == 1 { statistics.delivered_mapped } else { statistics.delivered_copied };
    ensure!(
        mapped * 10 >= u64::from(runs * run) * 9,
        "most blocks go the way that is measured: {statistics:?}"
    );
    Ok(micros_each(time, u64::from(runs * run)))
}
