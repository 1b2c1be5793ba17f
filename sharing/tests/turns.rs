//! Guests that flood the engine with one kind of work hold up no other kind.

mod common;

use std::time::{Duration, Instant};

use common::agent::{ANON, Agent, FILE};
use common::disks::Disk;
use common::followed::{Clock, Vm, following};
use common::{Guest, audit, engine, losses};
use samepage_sharing::Slot;
use samepage_sharing::blocks::{CacheSize, Keep};
use samepage_sharing::engine::{Engine, Mode, Settings};
use samepage_sharing::hints::Hint;

const PAGES: u32 = 3000;
/// Pages alike in two VMs.
const ALIKE: u32 = 200;
/// Steps within which all work is done that waits as the flood begins: some intervals of a hundred steps, and
/// each piece of work once for each other kind.
const STEPS: u32 = 2000;

/// VMs for which there is work of each kind, and one that floods.
struct World {
    engine: Engine,
    now: Instant,
    /// Alike when they have come to rest.
    rested: [Vm; 2],
    /// Without logs, and alike.
    passes: [(Guest, Slot); 2],
    /// Not to share any more.
    unshared: Vm,
    /// Its guest says something new.
    told: (Vm, Agent),
    /// It gives hints at the end.
    hinted: Vm,
    flood: Vm,
}

fn alike(page: u32) -> u64 {
    1 + u64::from(page)
}

impl World {
    fn new() -> Self {
        let settings = Settings {
            block_cache: CacheSize::Bytes(64 << 20),
            shortest_pause_ms: 1,
            longest_pause_ms: 100,
            ..following()
        };
        let mut engine = engine(&settings);
        let flood = Vm::start(&mut engine, PAGES);
        let rested = [(); 2].map(|()| Vm::start(&mut engine, PAGES));
        let [unshared, told, hinted] = [(); 3].map(|()| Vm::start(&mut engine, PAGES));
        let mut agent = Agent::start(&mut engine, told.slot, PAGES);
        let mut disk = Disk::new(9, Keep::Exclusive);
        disk.read(&mut engine, &hinted, 0, 0, 256);
        (0..ALIKE).for_each(|page| {
            [&unshared, &flood].into_iter().for_each(|vm| vm.write(page, 50_000 + alike(page)))
        });
        agent.say(0..PAGES, ANON);
        agent.pass();
        let mut clock = Clock::new();
        clock.intervals(&mut engine, 3);
        // What was read becomes cached blocks.
        (0..256).for_each(|page| hinted.write(page, 90_000 + alike(page)));
        clock.intervals(&mut engine, 3);
        assert!(engine.cache_statistics().blocks_cached >= 256);
        assert_eq!(engine.statistics().pages_sharing, u64::from(ALIKE));
        let passes = [(); 2].map(|()| {
            let guest = Guest::new(PAGES);
            let slot = engine.add(guest.ram.clone(), None, losses().1).unwrap();
            (guest, slot)
        });
        let now = Instant::now() + Duration::from_secs(60);
        Self { engine, now, rested, passes, unshared, told: (told, agent), hinted, flood }
    }

    /// One piece of work of each kind begins to wait.
    fn ask(&mut self) {
        for page in 0..ALIKE {
            self.rested.iter().for_each(|vm| vm.write(page, 10_000 + alike(page)));
            self.passes.iter().for_each(|(guest, _)| guest.write(page, 20_000 + alike(page)));
        }
        self.engine.set_mode(self.unshared.slot, Mode::Off);
        self.told.1.say(0..PAGES, FILE);
        self.told.1.pass();
        self.engine.set_cache_size(CacheSize::Bytes(0));
        let hints = self.engine.hints(self.hinted.slot).unwrap();
        hints.give(Hint { pages: 500..501, image: 77, block: 1 });
    }

    fn merged(&self, slot: Slot) -> u64 {
        self.engine.vm_statistics(slot).unwrap().unwrap().pages_merged
    }

    /// What is left to be done.
    fn waiting(&self, passes: u64) -> Vec<&'static str> {
        let alike = u64::from(ALIKE);
        let left = [
            ("pages at rest", self.rested.iter().any(|vm| self.merged(vm.slot) < alike)),
            ("full passes", self.passes.iter().any(|&(_, slot)| self.merged(slot) < alike)),
            ("the end of sharing", self.merged(self.unshared.slot) > 0),
            ("claims", self.engine.claimed(self.told.0.slot).unwrap().unwrap().passes == passes),
            ("evictions", self.engine.cache_statistics().blocks_cached > 256),
            ("hints", self.engine.hints(self.hinted.slot).unwrap().waiting() > 0),
        ];
        left.into_iter().filter(|&(_, left)| left).map(|(what, _)| what).collect()
    }
}

/// Floods before each step. All that waited is done in time, and the contents are right.
fn flooded(between: Duration, mut flood: impl FnMut(&mut World, u64)) {
    let mut world = World::new();
    let passes = world.engine.claimed(world.told.0.slot).unwrap().unwrap().passes;
    (0..20).for_each(|step| flood(&mut world, step));
    world.ask();
    for step in 0..STEPS {
        flood(&mut world, 20 + u64::from(step));
        world.now += between;
        world.engine.step(world.now);
        if step % 20 == 0 && world.waiting(passes).is_empty() {
            break;
        }
    }
    assert_eq!(world.waiting(passes), Vec::<&str>::new(), "wait after {STEPS} steps");
    for page in 0..ALIKE {
        world.rested.iter().for_each(|vm| vm.guest.check(page, 10_000 + alike(page)));
        world.passes.iter().for_each(|(guest, _)| guest.check(page, 20_000 + alike(page)));
        world.unshared.guest.check(page, 50_000 + alike(page));
    }
    audit(&mut world.engine);
}

const SOON: Duration = Duration::from_millis(1);

#[test]
fn nothing_holds_work_up_where_there_is_no_flood() {
    flooded(SOON, |_, _| {});
}

#[test]
fn hints_hold_nothing_up() {
    flooded(SOON, |world, step| {
        let hints = world.engine.hints(world.flood.slot).unwrap();
        for hint in 0..17 {
            let block = step * 17 + hint;
            let page = 1000 + (block % 1000) as u32;
            hints.give(Hint { pages: page..page + 1, image: 1, block });
        }
    });
}

#[test]
fn hints_about_all_memory_hold_nothing_up() {
    flooded(SOON, |world, step| {
        let hints = world.engine.hints(world.flood.slot).unwrap();
        hints.give(Hint { pages: 1000..PAGES, image: 1, block: step });
    });
}

#[test]
fn claims_hold_nothing_up() {
    let mut agents = Vec::new();
    flooded(SOON, move |world, step| {
        if agents.is_empty() {
            agents = (0..40)
                .map(|_| {
                    let vm = Vm::start(&mut world.engine, PAGES);
                    let agent = Agent::start(&mut world.engine, vm.slot, PAGES);
                    (vm, agent)
                })
                .collect();
        }
        for (_, agent) in &mut agents {
            agent.say(0..PAGES, if step % 2 == 0 { ANON } else { FILE });
            agent.pass();
        }
    });
}

#[test]
fn changes_hold_nothing_up() {
    // An interval is over before each step.
    flooded(Duration::from_millis(150), |world, step| {
        (1000..1050).for_each(|page| world.flood.write(page, 1 << 40 | step << 20 | u64::from(page)));
    });
}

#[test]
fn reads_of_disks_hold_nothing_up() {
    let mut disk = Disk::new(1, Keep::Exclusive);
    flooded(SOON, move |world, step| {
        let World { engine, flood, .. } = world;
        disk.read(engine, flood, step * 64, 1000 + (step % 2) as u32 * 64, 64);
    });
}

#[test]
fn changes_of_mode_hold_nothing_up() {
    flooded(SOON, |world, step| {
        let mode = if step % 2 == 0 { Mode::Off } else { Mode::Full };
        world.engine.set_mode(world.flood.slot, mode);
    });
}

#[test]
fn full_passes_hold_nothing_up() {
    let mut guest = None;
    flooded(SOON, move |world, step| {
        let guest = guest.get_or_insert_with(|| {
            let guest = Guest::new(10 * PAGES);
            world.engine.add(guest.ram.clone(), None, losses().1).unwrap();
            guest
        });
        (0..50).for_each(|page| guest.write((step as u32 * 50 + page) % (10 * PAGES), 1 << 41 | step << 8));
    });
}
