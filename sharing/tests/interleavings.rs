//! Everything at once, in any order: guests write, free and read pages, disks are read and written, VMs
//! come and go, modes change, calls fail, mappings run out, and the store is compacted again and again. A
//! model knows what each page and each block has to hold ([`common::world`]).
//!
//! `SAMEPAGE_TEST_INTERLEAVINGS_SECONDS` says for how long, and `SAMEPAGE_TEST_INTERLEAVINGS_SEED` has one
//! interleaving played again, the one that a failure names.

mod common;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::Numbers;
use common::followed::following;
use common::world::World;
use common::world::weather::{Weather, faults};
use samepage_sharing::blocks::CacheSize;
use samepage_sharing::engine::{Order, Settings};

/// What is told of the last things that happened before a failure.
const TOLD: usize = 60;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

fn duration() -> Duration {
    let usual = if std::env::var_os("CI").is_some_and(|ci| ci == "true") { 60 } else { 20 };
    Duration::from_secs(number("SAMEPAGE_TEST_INTERLEAVINGS_SECONDS").unwrap_or(usual))
}

/// The settings of an interleaving, and how many pages a VM has and how much happens.
fn arrangement(numbers: &mut Numbers) -> (Settings, u32, u32) {
    let large = numbers.below(200) == 0;
    let usual = [60, 100, 160, 400][numbers.below(4) as usize];
    let size = if large { 3000 + numbers.below(6000) } else { 24 + numbers.below(usual) } as u32;
    let cached = [0, u64::from(size) / 8, 4 * u64::from(size)][numbers.below(3) as usize];
    let mappings_limit = (numbers.below(3) == 0).then(|| {
        // The engine keeps half of such a limit and 64 for each VM free.
        let mappings = samepage_sharing::budget::mappings_of_process().unwrap();
        2 * (mappings + 4 * 64 + 20 + numbers.below(300))
    });
    let settings = Settings {
        lookahead: numbers.below(8) > 0,
        order: if numbers.below(8) == 0 { Order::Content } else { Order::Digest },
        settle: numbers.below(2) == 0,
        mappings_limit,
        shortest_mapping: 1 + numbers.below(2) as u32,
        block_cache: CacheSize::Bytes(cached * 4096),
        compaction_windows: if numbers.below(4) == 0 { 32 } else { 1 + numbers.below(3) as u32 },
        // Words of pages for which an interval ends in one step: one, some, or all.
        interval_effort: [1, 2000, u32::MAX][numbers.below(3) as usize],
        batch: [1, 2, 16][numbers.below(3) as usize],
        few_holes: if large { 1024 } else { 4 + numbers.below(60) as u32 },
        longest_rest: [1, 4][numbers.below(2) as usize],
        ..following()
    };
    (settings, size, 40 + numbers.below(80) as u32)
}

/// Plays one interleaving. Returns what is wrong with it, and what it was.
fn play(seed: u64, statistics: &mut BTreeMap<&'static str, u64>) -> Result<(), String> {
    let mut numbers = Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    (0..8).for_each(|_| {
        numbers.below(2);
    });
    let (settings, size, length) = arrangement(&mut numbers);
    let weather = Arc::new(Weather::default());
    let plan = faults(&weather, numbers.below(u64::MAX));
    let mut world = World::new(&settings, Arc::clone(&weather), plan, numbers.below(u64::MAX), size);
    let played = catch_unwind(AssertUnwindSafe(|| {
        for _ in 0..2 + world.below(2) {
            let (followed, with_agent) = (world.below(5) > 0, world.below(2) == 0);
            world.add_vm(followed, with_agent);
        }
        let (refused, fatal) = [(0, 0), (0, 0), (10, 0), (60, 2)][world.below(4) as usize];
        weather.refused.store(refused, Ordering::Relaxed);
        weather.fatal.store(fatal, Ordering::Relaxed);
        for step in 0..length {
            world.act();
            if step % 64 == 63 {
                world.audit();
            }
        }
        let engine = world.engine.statistics();
        let cache = world.engine.cache_statistics();
        for (name, count) in [
            ("acts", u64::from(length)),
            ("merges", engine.merges),
            ("compactions", engine.compactions),
            ("pages undone", engine.pages_undone),
            ("refusals", engine.refusals),
            ("mappings denied", engine.mappings_denied),
            ("blocks delivered mapped", cache.delivered_mapped),
            ("blocks delivered copied", cache.delivered_copied),
            ("blocks served from guests", cache.served_from_guests),
            ("blocks served from the host", cache.served_from_host),
            ("VMs lost", world.lost),
            ("pages given back", world.given_back()),
        ] {
            *statistics.entry(name).or_default() += count;
        }
        world.end();
    }));
    played.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
        let told = &world.told[world.told.len().saturating_sub(TOLD)..];
        // What broke in the middle of something is left alone.
        let told = told.join("\n");
        std::mem::forget(world);
        format!("{told}\n{settings:?}\nVMs of {size} pages\nseed {seed}: {text}")
    })
}

#[test]
fn no_interleaving_spoils_a_page_or_a_block() {
    if let Some(seed) = number("SAMEPAGE_TEST_INTERLEAVINGS_SEED") {
        play(seed, &mut BTreeMap::new()).unwrap_or_else(|what| panic!("{what}"));
        return;
    }
    let first = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() * 1_000_000;
    println!("seeds from {first} on");
    let started = Instant::now();
    let (mut count, mut told) = (0_u64, Duration::ZERO);
    let mut statistics = BTreeMap::new();
    while count == 0 || started.elapsed() < duration() {
        if let Err(what) = play(first + count, &mut statistics) {
            panic!(
                "{what}\nafter {count} interleavings, {:?}; SAMEPAGE_TEST_INTERLEAVINGS_SEED={} plays it again",
                started.elapsed(),
                first + count
            );
        }
        count += 1;
        if started.elapsed() >= told + Duration::from_secs(60) {
            told = started.elapsed();
            println!("{count} interleavings in {told:?}: {statistics:?}");
        }
    }
    println!(
        "{count} interleavings in {:?}, to seed {}: {statistics:?}",
        started.elapsed(),
        first + count - 1
    );
    for what in ["merges", "compactions", "blocks delivered mapped", "pages given back"] {
        assert!(count < 100 || statistics[what] > 0, "nothing was tried of {what}: {statistics:?}");
    }
}
