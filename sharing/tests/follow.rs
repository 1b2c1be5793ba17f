//! Work that follows change: with a log of writes, pages are looked at once when they come to
//! rest, and an idle VM costs next to nothing.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use common::followed::{Clock, LONGEST, Vm, following, stretching};
use common::{audit, engine};
use proptest::prelude::*;
use samepage_sharing::engine::{Engine, Mode, Settings, Step};

const PAGES: u32 = 3000;
#[test]
fn pages_are_merged_an_interval_after_they_came_to_rest() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| Vm::start(&mut engine, PAGES)).collect();
    let mut clock = Clock::new();
    for vm in &vms {
        (0..1000).for_each(|page| vm.write(page, 1 + u64::from(page)));
        (1000..1100).for_each(|page| vm.write(page, 0));
    }
    clock.intervals(&mut engine, 2);
    let statistics = engine.statistics();
    assert_eq!((statistics.pages_sharing, statistics.zero_pages), (1000, 200));
    assert_eq!(statistics.merges, 2000);
    // The first page of a window is searched for.
    assert!(statistics.merges_lookahead >= 1980, "{statistics:?}");
    audit(&mut engine);

    // Nothing changes, nothing is looked at.
    clock.intervals(&mut engine, 20);
    assert_eq!(engine.statistics().pages_scanned, statistics.pages_scanned);

    vms[0].write(500, 7777);
    vms[1].write(2500, 7777);
    clock.intervals(&mut engine, 3);
    let after = engine.statistics();
    assert_eq!(after.pages_scanned - statistics.pages_scanned, 2);
    assert_eq!((after.breaks, after.pages_sharing), (1, 1000));
    (0..1000).for_each(|page| vms[1].guest.check(page, 1 + u64::from(page)));
    vms[0].guest.check(500, 7777);
    audit(&mut engine);
}

#[test]
fn only_what_has_come_to_rest_is_looked_at() {
    let mut engine = engine(&following());
    let vm = Vm::start(&mut engine, PAGES);
    let mut clock = Clock::new();
    (0..PAGES).for_each(|page| vm.write(page, 1 + u64::from(page)));
    clock.intervals(&mut engine, 2);
    assert_eq!(engine.statistics().pages_scanned, u64::from(PAGES));
    for page in (0..PAGES).step_by(100) {
        vm.write(page, 5000 + u64::from(page));
    }
    clock.intervals(&mut engine, 3);
    assert_eq!(engine.statistics().pages_scanned, u64::from(PAGES + PAGES / 100));
}

#[test]
fn pages_that_keep_changing_are_left_alone() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| Vm::start(&mut engine, 300)).collect();
    let mut clock = Clock::new();
    for round in 0..60 {
        for vm in &vms {
            (0..100).for_each(|page| vm.write(page, round * 1000 + u64::from(page) + 1));
        }
        clock.end_interval(&mut engine);
    }
    let statistics = engine.statistics();
    assert_eq!(statistics.merges, 0, "{statistics:?}");
    assert_eq!(statistics.pages_volatile, 200);
    clock.intervals(&mut engine, 300);
    let statistics = engine.statistics();
    assert_eq!((statistics.pages_sharing, statistics.pages_volatile), (100, 0));
    audit(&mut engine);
}

#[test]
fn frames_are_left_at_the_end_of_the_interval_in_which_all_pages_were_written() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| Vm::start(&mut engine, 300)).collect();
    let mut clock = Clock::new();
    for vm in &vms {
        (0..100).for_each(|page| vm.write(page, 1 + u64::from(page)));
    }
    clock.intervals(&mut engine, 2);
    assert_eq!(engine.statistics().frames, 100);
    for (number, vm) in (1..).zip(&vms) {
        (0..100).for_each(|page| vm.write(page, number << 32 | u64::from(page)));
    }
    clock.intervals(&mut engine, 1);
    let statistics = engine.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes), (0, 0));
    audit(&mut engine);
    engine.remove(vms[0].slot).unwrap();
    engine.remove(vms[1].slot).unwrap();
    assert_eq!(engine.statistics().pages_unshared, 0);
}

#[test]
fn a_write_that_the_log_missed_is_found_in_time() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| Vm::start(&mut engine, 300)).collect();
    let mut clock = Clock::new();
    for vm in &vms {
        (0..100).for_each(|page| vm.write(page, 1 + u64::from(page)));
    }
    clock.intervals(&mut engine, 2);
    vms[0].guest.write(50, 99);
    clock.intervals(&mut engine, 3);
    assert_eq!(engine.statistics().breaks, 0, "nobody said so");
    audit(&mut engine);
    clock.intervals(&mut engine, 256);
    assert_eq!(engine.statistics().breaks, 1);
    vms[0].guest.check(50, 99);
    vms[1].guest.check(50, 51);
    audit(&mut engine);
}

#[test]
fn the_log_of_a_vm_that_does_not_run_is_not_read() {
    let mut engine = engine(&stretching());
    let readings = Arc::new(AtomicU32::new(0));
    let vms: Vec<_> = (0..2).map(|_| Vm::resting(&mut engine, PAGES, &readings)).collect();
    let mut clock = Clock::new();
    for vm in &vms {
        (0..1000).for_each(|page| vm.write(page, 1 + u64::from(page)));
    }
    clock.intervals(&mut engine, 4);
    assert_eq!(engine.statistics().pages_sharing, 1000);
    let read = readings.load(Ordering::Relaxed);
    clock.intervals(&mut engine, 300);
    assert_eq!(readings.load(Ordering::Relaxed), read, "nobody has written");

    // The next write is seen at the end of the interval, and what follows from it comes as ever.
    vms[0].write(500, 7777);
    vms[1].write(2500, 7777);
    assert_eq!(clock.end_within(&mut engine, LONGEST), 1);
    assert_eq!(readings.load(Ordering::Relaxed), read + 2);
    assert_eq!(engine.statistics().breaks, 1);
    clock.intervals(&mut engine, 3);
    assert_eq!(engine.statistics().pages_sharing, 1000);
    vms[0].guest.check(500, 7777);
    audit(&mut engine);
}

/// Lets an interval pass, and does no more than what each step of its end is.
fn steps_of_an_end(engine: &mut Engine, now: Instant, mut after: impl FnMut(&mut Engine)) -> u32 {
    let mut steps = 0;
    while engine.step(now) == Step::Worked {
        steps += 1;
        after(engine);
    }
    steps
}

#[test]
fn a_step_ends_an_interval_for_a_bounded_number_of_pages() {
    const PAGES: u32 = 6000;
    /// Pages that change in one step: those of the effort of 20, and those of the word that exceeds it.
    const MOST: u64 = 20 + 64;
    let mut engine = engine(&Settings { interval_effort: 20 * 512, ..following() });
    let vms: Vec<_> = (0..2).map(|_| Vm::start(&mut engine, PAGES)).collect();
    let mut clock = Clock::new();
    for vm in &vms {
        (0..PAGES).for_each(|page| vm.write(page, 1 + u64::from(page)));
    }
    clock.intervals(&mut engine, 3);
    assert_eq!(engine.statistics().pages_sharing, u64::from(PAGES));
    for (number, vm) in (1..).zip(&vms) {
        (0..PAGES).for_each(|page| vm.write(page, number << 32 | u64::from(page)));
    }
    let mut breaks = 0;
    let steps = steps_of_an_end(&mut engine, clock.later(), |engine| {
        let before = std::mem::replace(&mut breaks, engine.statistics().breaks);
        assert!(breaks - before <= MOST, "{} pages in one step", breaks - before);
    });
    assert_eq!(breaks, 2 * u64::from(PAGES), "all of them within the interval");
    assert!(steps >= 2 * PAGES / MOST as u32, "{steps} steps");
    audit(&mut engine);
}

#[test]
fn a_vm_may_end_stop_and_change_while_its_interval_ends() {
    const PAGES: u32 = 640;
    for (turn, then) in [Mode::Off, Mode::Zero, Mode::Full].into_iter().enumerate() {
        let mut engine = engine(&Settings { interval_effort: 1, ..following() });
        let vms: Vec<_> = (0..3).map(|_| Vm::start(&mut engine, PAGES)).collect();
        let mut clock = Clock::new();
        for vm in &vms {
            (0..PAGES).for_each(|page| vm.write(page, 1 + u64::from(page)));
        }
        clock.intervals(&mut engine, 3);
        (0..PAGES).for_each(|page| vms[0].write(page, 1 << 32 | u64::from(page)));
        let now = clock.later();
        let mut again = BTreeSet::new();
        for step in 0..60 {
            engine.step(now);
            // Behind what has ended, and before it.
            for page in [step * 10, PAGES - 1 - step * 10] {
                vms[0].write(page, 1 << 40);
                again.insert(page);
            }
            if engine.statistics().breaks > 200 {
                break;
            }
        }
        let breaks = engine.statistics().breaks;
        assert!((1..u64::from(PAGES)).contains(&breaks), "half-way: {breaks}");
        engine.set_mode(vms[0].slot, then);
        engine.step(now);
        if turn == 0 {
            engine.remove(vms[0].slot).unwrap();
        } else {
            engine.set_mode(vms[0].slot, Mode::Full);
        }
        // Another VM, perhaps in the same slot.
        let late = Vm::start(&mut engine, PAGES / 2);
        (0..PAGES / 2).for_each(|page| late.write(page, 1 + u64::from(page)));
        clock.intervals(&mut engine, 4);
        audit(&mut engine);
        let sharing = u64::from(PAGES + PAGES / 2) + if turn == 0 { 0 } else { again.len() as u64 - 1 };
        assert_eq!(engine.statistics().pages_sharing, sharing, "{then:?}");
        if turn > 0 {
            let seed = |page| if again.contains(&page) { 1 << 40 } else { 1 << 32 | u64::from(page) };
            (0..PAGES).for_each(|page| vms[0].guest.check(page, seed(page)));
        }
        (0..PAGES).for_each(|page| vms[1].guest.check(page, 1 + u64::from(page)));
    }
}

#[test]
fn what_a_log_refuses_in_the_middle_of_an_end_is_done_with_the_next() {
    const PAGES: u32 = 640;
    let refuse = Arc::new(AtomicBool::new(false));
    let mut engine = engine(&Settings { interval_effort: 1, ..following() });
    let vms: Vec<_> = (0..2).map(|_| Vm::unsure(&mut engine, PAGES, &refuse)).collect();
    let mut clock = Clock::new();
    for round in 1..4 {
        for vm in &vms {
            (0..PAGES).for_each(|page| vm.write(page, round << 32 | u64::from(page)));
        }
        let mut steps = 0;
        steps_of_an_end(&mut engine, clock.later(), |_| {
            steps += 1;
            refuse.store(steps % 3 == 0, Ordering::Relaxed);
        });
        refuse.store(false, Ordering::Relaxed);
        clock.intervals(&mut engine, 4);
        assert_eq!(engine.statistics().pages_sharing, u64::from(PAGES), "round {round}");
        audit(&mut engine);
    }
    assert!(engine.statistics().refusals > 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn guests_read_what_they_wrote_and_all_that_rests_is_shared(
        writes in prop::collection::vec((0..2_usize, 0..200_u32, 1..60_u32, 0..4_u64, 0..3_u32), 1..40),
    ) {
        const PAGES: u32 = 200;
        // All of an interval ends at once, or for a word of pages in each step.
        let interval_effort = if writes.len() % 2 == 0 { 1 } else { Settings::default().interval_effort };
        let mut engine = engine(&Settings { interval_effort, ..following() });
        let vms: Vec<_> = (0..2).map(|_| Vm::start(&mut engine, PAGES)).collect();
        let mut models = vec![vec![0; PAGES as usize]; 2];
        let mut clock = Clock::new();
        for (vm, page, count, seed, intervals) in writes {
            for page in page..(page + count).min(PAGES) {
                let seed = if seed == 0 { 0 } else { seed * 1000 + u64::from(page) };
                vms[vm].write(page, seed);
                models[vm][page as usize] = seed;
            }
            clock.intervals(&mut engine, intervals);
            for (vm, model) in vms.iter().zip(&models) {
                (0..).zip(model).for_each(|(page, &seed)| vm.guest.check(page, seed));
            }
        }
        clock.intervals(&mut engine, 300);
        let alike = models[0].iter().zip(&models[1]).filter(|(one, other)| one == other && **one != 0);
        prop_assert_eq!(engine.statistics().pages_sharing, alike.count() as u64);
        audit(&mut engine);
    }
}
