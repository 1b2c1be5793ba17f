//! Every call of the merge path made to fail: guests stay whole, or the one that cannot is told.

mod common;

use std::sync::atomic::Ordering;

use common::{Fault, Guest, audit, faulty_engine, losses, no_rest, pass};
use proptest::prelude::*;
use samepage_sharing::engine::Engine;

const PAGES: u32 = 96;

/// Content of which much is alike, some is zero.
fn seed(vm: u32, page: u32, round: u32) -> u64 {
    match (page + round) % 5 {
        0 => 0,
        4 => u64::from(vm + 1) << 32 | u64::from(page + round),
        _ => 1 + u64::from(page / 2 + round),
    }
}

/// Two guests, passes between rounds of writing, checked after each against what was written.
fn run_rounds(engine: &mut Engine) {
    let guests = [Guest::new(PAGES), Guest::new(PAGES)];
    for guest in &guests {
        while engine.add(guest.ram.clone(), None, losses().1).is_err() {}
    }
    for round in 0..4 {
        for (vm, guest) in (0..).zip(&guests) {
            (0..PAGES)
                .filter(|page| (page / 7) % 4 != round)
                .for_each(|page| guest.write(page, seed(vm, page, 0)));
            (0..PAGES)
                .filter(|page| (page / 7) % 4 == round)
                .for_each(|page| guest.write(page, seed(vm, page, round)));
        }
        pass(engine);
        pass(engine);
        for (vm, guest) in (0..).zip(&guests) {
            for page in 0..PAGES {
                let round = if (page / 7) % 4 == round { round } else { 0 };
                guest.check(page, seed(vm, page, round));
            }
        }
        audit(engine);
    }
}

#[test]
fn any_one_kind_of_call_that_always_fails_leaves_guests_whole() {
    for call in ["protect", "map", "discard", "punch"] {
        let mut engine =
            faulty_engine(
                &no_rest(false),
                move |name| {
                    if name == call { Fault::Refuse } else { Fault::None }
                },
            );
        run_rounds(&mut engine);
        assert!(engine.statistics().refusals > 0 || call == "punch", "{call} was never asked for");
    }
}

#[test]
fn a_remap_that_unmaps_and_fails_is_mended_at_once() {
    let mut engine =
        faulty_engine(&no_rest(false), |name| if name == "map" { Fault::Tear } else { Fault::None });
    run_rounds(&mut engine);
    assert!(engine.statistics().merges > 100);
    assert_eq!(engine.statistics().refusals, 0);
}

#[test]
fn registration_that_fails_after_a_remap_is_made_up_for() {
    let mut asked = 0;
    let mut engine = faulty_engine(&no_rest(false), move |name| {
        if name != "register" {
            return Fault::None;
        }
        asked += 1;
        if asked > 2 && asked % 2 == 1 { Fault::Refuse } else { Fault::None }
    });
    run_rounds(&mut engine);
    assert!(engine.statistics().merges > 100);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn random_failures_leave_guests_whole(faults in prop::collection::vec(0_u8..12, 1..200)) {
        // Not all fail: a VM is added again until it can be.
        let mut next = faults.into_iter().chain([11]).cycle();
        let mut engine = faulty_engine(&no_rest(false), move |name| match (name, next.next()) {
            // What must not fail twice in a row is the subject of the tests of losses.
            ("map again" | "unprotect", _) => Fault::None,
            (_, Some(0 | 1)) => Fault::Refuse,
            ("map", Some(2 | 3)) => Fault::Tear,
            _ => Fault::None,
        });
        run_rounds(&mut engine);
    }
}

#[test]
fn a_vm_whose_memory_is_lost_is_told_and_others_go_on() {
    let guests = [Guest::new(PAGES), Guest::new(PAGES), Guest::new(PAGES)];
    for guest in &guests {
        (0..PAGES).for_each(|page| guest.write(page, 1 + u64::from(page)));
    }
    let mut torn = 0;
    let mut engine = faulty_engine(&no_rest(false), move |name| match name {
        // The first VM's second run: torn out, and not to be had again.
        "map" | "map again" if torn < 2 => {
            torn += 1;
            if torn == 1 { Fault::Tear } else { Fault::Refuse }
        }
        _ => Fault::None,
    });
    let handlers: Vec<_> = guests.iter().map(|_| losses()).collect();
    let mut counts = Vec::new();
    let mut slots = Vec::new();
    for (guest, (count, handler)) in guests.iter().zip(handlers) {
        slots.push(engine.add(guest.ram.clone(), None, handler).unwrap());
        counts.push(count);
    }
    pass(&mut engine);
    pass(&mut engine);
    let told: Vec<_> = counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
    assert_eq!(told.iter().sum::<u32>(), 1, "one VM is told, once: {told:?}");
    for (guest, _) in guests.iter().zip(&told).filter(|(_, told)| **told == 0) {
        (0..PAGES).for_each(|page| guest.check(page, 1 + u64::from(page)));
    }
    assert!(engine.statistics().pages_sharing >= u64::from(PAGES));
    audit(&mut engine);
    slots.into_iter().for_each(|slot| engine.remove(slot).unwrap());
    assert_eq!((engine.statistics().frames, engine.statistics().store_bytes), (0, 0));
}
