//! What guests say of their pages: free ones are given back, unless they have been written since, and
//! others are looked at in their turn.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use common::agent::{ANON, Agent, FILE, FREE, SLAB};
use common::followed::{Clock, Vm, following};
use common::{Fault, Numbers, audit, engine, faulty_engine};
use samepage_hole::{FREED_PAGES_MATTER, PageType};
use samepage_sharing::by_type::TypeStatistics;
use samepage_sharing::claims::SharedTypes;
use samepage_sharing::engine::{Engine, Settings};

const PAGES: u32 = 3000;
/// Pages that are free in these tests.
const FREED: std::ops::Range<u32> = 1000..2000;

/// A VM of which each page has a content of its own, and its agent.
fn started(engine: &mut Engine, clock: &mut Clock) -> (Vm, Agent) {
    let vm = Vm::start(engine, PAGES);
    (0..PAGES).for_each(|page| vm.write(page, 1 + u64::from(page)));
    let mut agent = Agent::start(engine, vm.slot, PAGES);
    agent.say(0..PAGES, ANON);
    agent.pass();
    clock.intervals(engine, 3);
    (vm, agent)
}

fn given_back(engine: &Engine, vm: &Vm) -> u64 {
    engine.claimed(vm.slot).unwrap().unwrap().given_back
}

fn of(engine: &Engine, vm: &Vm, kind: PageType) -> TypeStatistics {
    engine.claimed(vm.slot).unwrap().unwrap().types[kind as usize]
}

/// Two passes: the first names what is free, the second answers the host's request.
fn two_passes(engine: &mut Engine, clock: &mut Clock, agent: &mut Agent) {
    for _ in 0..2 {
        agent.pass();
        clock.intervals(engine, 3);
    }
}

#[test]
fn free_pages_are_given_back_in_two_passes_and_can_be_used_again_at_once() {
    let mut engine = engine(&following());
    let mut clock = Clock::new();
    let (vm, mut agent) = started(&mut engine, &mut clock);
    let before = engine.vm_statistics(vm.slot).unwrap().unwrap();
    agent.say(FREED, FREE);
    two_passes(&mut engine, &mut clock, &mut agent);
    assert_eq!(given_back(&engine, &vm), 1000);
    let after = engine.vm_statistics(vm.slot).unwrap().unwrap();
    assert_eq!(before.pages_private - after.pages_private, 1000);
    assert_eq!((after.zero_pages, after.pages_merged, after.mappings), (1000, 0, 1));
    assert_eq!(engine.statistics().frames, 0, "what they were put on is free again");
    let free = of(&engine, &vm, PageType::Free);
    let TypeStatistics { merged_seconds, watched_seconds, .. } = free;
    let expected = TypeStatistics {
        pages: 1000,
        zero: 1000,
        merged_seconds,
        watched_seconds,
        ..TypeStatistics::default()
    };
    assert_eq!(free, expected);
    for page in FREED {
        vm.guest.check(page, 0);
        vm.write(page, 7000 + u64::from(page));
    }
    clock.intervals(&mut engine, 3);
    for page in 0..PAGES {
        vm.guest.check(page, if FREED.contains(&page) { 7000 } else { 1 } + u64::from(page));
    }
    audit(&mut engine);
}

#[test]
fn pages_that_are_used_again_before_the_guest_answers_are_left_alone() {
    let mut engine = engine(&following());
    let mut clock = Clock::new();
    let (vm, mut agent) = started(&mut engine, &mut clock);
    agent.say(FREED, FREE);
    agent.pass();
    clock.intervals(&mut engine, 3);
    assert_eq!(of(&engine, &vm, PageType::Free).merged, 1000, "they are where writes show");
    let asked = agent.requested();
    // The guest's pass sees all of them free, and then some are taken into use: one with the very content
    // that it has, one behind the back of the log, and some as ever.
    vm.write(1100, 1101);
    vm.guest.write(1200, 1201);
    (1300..1400).for_each(|page| vm.write(page, 9000 + u64::from(page)));
    agent.end_pass(asked);
    clock.intervals(&mut engine, 3);
    assert_eq!(given_back(&engine, &vm), 1000 - 102);
    for page in FREED {
        let content = match page {
            1100 | 1200 => 1 + u64::from(page),
            1300..1400 => 9000 + u64::from(page),
            _ => 0,
        };
        vm.guest.check(page, content);
    }
    audit(&mut engine);
}

#[test]
fn only_a_pass_that_began_after_the_request_counts() {
    let mut engine = engine(&following());
    let mut clock = Clock::new();
    let (vm, mut agent) = started(&mut engine, &mut clock);
    agent.say(FREED, FREE);
    agent.pass();
    clock.intervals(&mut engine, 3);
    let asked = agent.requested();
    assert_ne!(asked, 0);
    for answered in [asked.wrapping_sub(1), asked + 1, u32::MAX] {
        agent.end_pass(answered);
        clock.intervals(&mut engine, 3);
        assert_eq!((given_back(&engine, &vm), agent.requested()), (0, asked));
    }
    // Some are in use by the time of the pass that counts.
    agent.say(1000..1500, ANON);
    agent.pass();
    clock.intervals(&mut engine, 3);
    assert_eq!(given_back(&engine, &vm), 500);
    (1000..1500).for_each(|page| vm.guest.check(page, 1 + u64::from(page)));
    audit(&mut engine);
}

#[test]
fn guests_that_look_at_freed_pages_keep_them() {
    let mut engine = engine(&following());
    let mut clock = Clock::new();
    let (vm, mut agent) = started(&mut engine, &mut clock);
    agent.header.features = FREED_PAGES_MATTER;
    agent.say(FREED, FREE);
    two_passes(&mut engine, &mut clock, &mut agent);
    assert_eq!((given_back(&engine, &vm), agent.requested()), (0, 0));
    (0..PAGES).for_each(|page| vm.guest.check(page, 1 + u64::from(page)));
}

#[test]
fn a_page_that_is_shared_and_free_leaves_its_frame_to_the_others() {
    let mut engine = engine(&following());
    let mut clock = Clock::new();
    let (vm, mut agent) = started(&mut engine, &mut clock);
    let other = Vm::start(&mut engine, PAGES);
    (0..PAGES).for_each(|page| other.write(page, 1 + u64::from(page)));
    clock.intervals(&mut engine, 3);
    assert_eq!(engine.statistics().pages_sharing, u64::from(PAGES));
    agent.say(FREED, FREE);
    two_passes(&mut engine, &mut clock, &mut agent);
    assert_eq!(given_back(&engine, &vm), 1000);
    assert_eq!(engine.statistics().pages_sharing, u64::from(PAGES) - 1000);
    (0..PAGES).for_each(|page| other.guest.check(page, 1 + u64::from(page)));
    audit(&mut engine);
}

#[test]
fn a_guest_that_is_silent_or_takes_its_header_away_has_said_nothing() {
    for silent in [true, false] {
        let mut engine = engine(&following());
        let mut clock = Clock::new();
        let (vm, mut agent) = started(&mut engine, &mut clock);
        agent.say(FREED, FREE);
        agent.pass();
        clock.intervals(&mut engine, 3);
        assert_eq!(of(&engine, &vm, PageType::Free).pages, 1000);
        if silent {
            clock.intervals(&mut engine, 110);
        } else {
            agent.take_away();
            agent.bell.store(true, Ordering::Release);
            clock.intervals(&mut engine, 3);
        }
        let claimed = engine.claimed(vm.slot).unwrap().unwrap();
        assert!(!claimed.publishing);
        assert_eq!(claimed.types[PageType::Unknown as usize].pages, u64::from(PAGES));
        // A late answer to what was asked before means nothing.
        agent.pass();
        clock.intervals(&mut engine, 3);
        assert_eq!(given_back(&engine, &vm), 0);
        (0..PAGES).for_each(|page| vm.guest.check(page, 1 + u64::from(page)));
        audit(&mut engine);
    }
}

#[test]
fn a_guest_that_says_nothing_any_more_is_forgotten_in_parts() {
    const MANY: u32 = 40_000;
    let mut engine = engine(&following());
    let vm = Vm::start(&mut engine, MANY);
    let mut agent = Agent::start(&mut engine, vm.slot, MANY);
    let mut clock = Clock::new();
    // Slabs are never given back.
    agent.say(0..MANY, SLAB);
    agent.pass();
    clock.intervals(&mut engine, 3);
    let slabs = |engine: &Engine| of(engine, &vm, PageType::Slab).pages;
    assert_eq!(slabs(&engine), u64::from(MANY));
    agent.take_away();
    agent.bell.store(true, Ordering::Release);
    let mut before = slabs(&engine);
    while before > 0 {
        clock.tick(&mut engine);
        let now = slabs(&engine);
        assert!(before - now <= 2 * 8192, "{} pages in two steps", before - now);
        before = now;
    }
    assert_eq!(of(&engine, &vm, PageType::Unknown).pages, u64::from(MANY));
}

#[test]
fn free_pages_are_not_looked_at_and_the_kernels_own_last() {
    let mut engine = engine(&following());
    let mut clock = Clock::new();
    let (vm, mut agent) = started(&mut engine, &mut clock);
    agent.say(0..PAGES, FILE);
    agent.say(0..500, SLAB);
    agent.say(500..600, FREE);
    agent.pass();
    clock.intervals(&mut engine, 3);
    let before = engine.statistics().pages_scanned;
    (0..700).for_each(|page| vm.write(page, 50_000 + u64::from(page)));
    clock.intervals(&mut engine, 3);
    assert_eq!(engine.statistics().pages_scanned - before, 100, "those of files");
    clock.intervals(&mut engine, 40);
    assert_eq!(engine.statistics().pages_scanned - before, 600, "and of slabs, but none that is free");
}

#[test]
fn types_that_are_not_to_be_shared_are_not() {
    for (types, shared) in [(SharedTypes::All, 2000), (SharedTypes::File, 500), (SharedTypes::NotFile, 1500)]
    {
        let mut engine = engine(&Settings { types, ..following() });
        let mut clock = Clock::new();
        let vms = [started(&mut engine, &mut clock), started(&mut engine, &mut clock)];
        let mut vms = vms.map(|(vm, mut agent)| {
            (0..2000).for_each(|page| vm.write(page, 60_000 + u64::from(page)));
            (2000..PAGES)
                .for_each(|page| vm.write(page, 100_000 + u64::from(page) * 2 + vm.slot.index() as u64));
            agent.say(0..500, FILE);
            agent.pass();
            (vm, agent)
        });
        clock.intervals(&mut engine, 40);
        let sharing = engine.statistics().pages_sharing;
        assert_eq!(sharing, shared, "{types:?}");
        if types == SharedTypes::All {
            assert_eq!(of(&engine, &vms[0].0, PageType::FileUnmapped).sharing, 250);
            assert_eq!(of(&engine, &vms[0].0, PageType::FileUnmapped).merges, 500);
            let (vm, agent) = &mut vms[1];
            let before = of(&engine, vm, PageType::FileUnmapped).broken;
            (0..100).for_each(|page| vm.write(page, 70_000 + u64::from(page)));
            agent.pass();
            clock.intervals(&mut engine, 3);
            let file = of(&engine, vm, PageType::FileUnmapped);
            assert_eq!((file.broken - before, file.merged, file.private), (100, 400, 100));
        }
        audit(&mut engine);
    }
}

#[test]
fn passes_cost_by_the_words_that_change() {
    let mut engine = engine(&following());
    let mut clock = Clock::new();
    let (vm, mut agent) = started(&mut engine, &mut clock);
    let words = |engine: &Engine| engine.claimed(vm.slot).unwrap().unwrap().words;
    let before = words(&engine);
    assert_eq!(before, u64::from(PAGES));
    for round in 0..10_u32 {
        agent.say([round * 7], FILE);
        agent.pass();
        clock.intervals(&mut engine, 2);
    }
    let claimed = engine.claimed(vm.slot).unwrap().unwrap();
    assert_eq!((claimed.words - before, claimed.passes), (10, 11));
}

/// A guest that allocates, uses and frees pages while its agent publishes and the engine gives back.
/// Nothing that is in use may ever change under it.
#[test]
fn what_is_in_use_is_never_damaged() {
    const ROUNDS: u32 = 40;
    let mut engine = engine(&Settings { rest_ms: 5, ..following() });
    let vm = Vm::start(&mut engine, PAGES);
    // What was left in pages by who used them before.
    (0..PAGES).for_each(|page| vm.write(page, 1 + u64::from(page)));
    let mut agent = Agent::start(&mut engine, vm.slot, PAGES);
    let free: Arc<Vec<AtomicBool>> = Arc::new((0..PAGES).map(|_| AtomicBool::new(true)).collect());
    let done = AtomicBool::new(false);
    let rounds = AtomicU32::new(0);
    thread::scope(|scope| {
        let (vm, free, done, rounds) = (&vm, &free, &done, &rounds);
        scope.spawn(move || {
            let mut numbers = Numbers(0x5eed);
            let mut used: Vec<(u32, u64)> = Vec::new();
            while !done.load(Ordering::Relaxed) {
                for _ in 0..200 {
                    // Some pages are used again all the time, others now and then.
                    let pages = if numbers.below(200) == 0 { PAGES } else { PAGES / 2 };
                    let page = numbers.below(u64::from(pages)) as u32;
                    if free[page as usize].swap(false, Ordering::SeqCst) {
                        // Few contents, so that pages are written with what they hold, too.
                        let seed = 1 + numbers.below(3);
                        vm.write(page, seed);
                        used.push((page, seed));
                    }
                }
                while used.len() > 500 {
                    let (page, seed) = used.swap_remove(numbers.below(used.len() as u64) as usize);
                    vm.guest.check(page, seed);
                    free[page as usize].store(true, Ordering::SeqCst);
                }
                thread::yield_now();
            }
            used.into_iter().for_each(|(page, seed)| vm.guest.check(page, seed));
        });
        scope.spawn(move || {
            while rounds.load(Ordering::Relaxed) < ROUNDS {
                let asked = agent.requested();
                for page in 0..PAGES {
                    let is_free = free[page as usize].load(Ordering::SeqCst);
                    agent.say([page], if is_free { FREE } else { ANON });
                }
                agent.end_pass(asked);
                rounds.fetch_add(1, Ordering::Relaxed);
                // The engine reads ten passes a second.
                thread::sleep(std::time::Duration::from_millis(60));
            }
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            engine.step(Instant::now());
        }
    });
    assert!(given_back(&engine, &vm) > 500, "{}", given_back(&engine, &vm));
    audit(&mut engine);
}

#[test]
fn calls_that_fail_leave_guests_whole_and_giving_back_going_on() {
    for call in ["protect", "map", "unprotect", "register", "discard", "punch"] {
        for tear in [false, true] {
            let mut count = 0_u32;
            let mut engine = faulty_engine(&following(), move |name| {
                count += u32::from(name == call);
                match name == call && count.is_multiple_of(3) {
                    // A part that cannot be unprotected is lost, which other tests are about.
                    true if tear && name == "map" => Fault::Tear,
                    true if name != "unprotect" => Fault::Refuse,
                    _ => Fault::None,
                }
            });
            let mut clock = Clock::new();
            let (vm, mut agent) = started(&mut engine, &mut clock);
            for round in 0..6_u64 {
                // Every other run of pages, so that there is more than one call.
                let some = || FREED.filter(move |page| u64::from(page / 100) % 2 == round % 2);
                agent.say(some(), FREE);
                two_passes(&mut engine, &mut clock, &mut agent);
                (0..PAGES).filter(|page| !FREED.contains(page)).for_each(|page| {
                    vm.guest.check(page, 1 + u64::from(page));
                });
                for page in some() {
                    vm.write(page, 80_000 + round);
                }
                agent.say(some(), ANON);
                two_passes(&mut engine, &mut clock, &mut agent);
                some().for_each(|page| vm.guest.check(page, 80_000 + round));
            }
            assert!(given_back(&engine, &vm) > 1000, "{call}: {}", given_back(&engine, &vm));
            audit(&mut engine);
        }
    }
}

/// Random words everywhere, at any time: others are whole, and the liar's own pages are what they were or
/// zeros.
#[test]
fn lies_harm_nobody_else() {
    let mut engine = engine(&Settings { rest_ms: 5, ..following() });
    let mut clock = Clock::new();
    let (liar, agent) = started(&mut engine, &mut clock);
    let honest = Vm::start(&mut engine, PAGES);
    (0..PAGES).for_each(|page| honest.write(page, 1 + u64::from(page)));
    let done = AtomicBool::new(false);
    let metadata = thread::scope(|scope| {
        scope.spawn(|| {
            let mut numbers = Numbers(77);
            let words = &agent.source.words;
            // The headers of both sides are among the first pages.
            while !done.load(Ordering::Relaxed) {
                for _ in 0..500 {
                    let place = numbers.below(words.len() as u64) as usize;
                    let value = match numbers.below(4) {
                        0 => FREE,
                        1 => agent.source.words[8].load(Ordering::Relaxed),
                        _ => numbers.below(1 << 32) as u32,
                    };
                    // Without the magic number nobody would listen.
                    if place != 1024 && place != 1025 && place > 1 {
                        words[place].store(value, Ordering::Relaxed);
                    }
                }
                agent.bell.store(true, Ordering::Release);
            }
        });
        let mut metadata = 0;
        for step in 0..40_000 {
            engine.step(Instant::now());
            if step == 1000 {
                metadata = engine.statistics().metadata_bytes;
            }
        }
        done.store(true, Ordering::Relaxed);
        metadata
    });
    assert!(engine.statistics().metadata_bytes < metadata + (1 << 20), "{metadata}");
    (0..PAGES).for_each(|page| honest.guest.check(page, 1 + u64::from(page)));
    let zeros = (0..PAGES).filter(|&page| {
        let zero = liar.guest.is_zero(page);
        if !zero {
            liar.guest.check(page, 1 + u64::from(page));
        }
        zero
    });
    println!("{} pages of the liar's were given back", zeros.count());
    audit(&mut engine);
}
