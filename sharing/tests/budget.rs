//! Mappings run out: longer runs are merged rather than short ones. Alone in its process, whose mappings
//! are what counts.

mod common;

use common::followed::{Clock, Vm, following};
use common::{audit, engine};
use samepage_sharing::engine::{Engine, Settings};

const PAGES: u32 = 2000;

/// Content such that every fourth page is alike in all guests, and nothing else.
fn isolated(vm: u64, page: u32) -> u64 {
    if page.is_multiple_of(4) { 1 + u64::from(page) } else { (vm + 1) << 32 | u64::from(page) }
}

/// Guests of which the first two have isolated pages in common and the last two long runs, under a
/// limit that does not allow for both.
fn short_of_mappings(engine: &mut Engine) -> (Vec<Vm>, Clock) {
    let vms: Vec<_> = (0..4).map(|_| Vm::start(engine, PAGES)).collect();
    let mut clock = Clock::new();
    for (number, vm) in (0..).zip(&vms[..2]) {
        (0..PAGES).for_each(|page| vm.write(page, isolated(number, page)));
    }
    clock.intervals(engine, 2);
    (vms, clock)
}

/// Runs of 31 pages that are alike in both VMs, with a page between that is not.
fn in_runs(vm: u64, page: u32) -> u64 {
    if page.is_multiple_of(32) { (vm + 9) << 40 | u64::from(page) } else { 1 << 50 | u64::from(page) }
}

#[test]
fn merges_of_low_value_are_undone_for_better_ones() {
    let mappings = samepage_sharing::budget::mappings_of_process().unwrap();
    // Room for some 900 mappings of guests beside the reserve.
    let limit = 2 * (mappings + 1200 + 4 * 64);
    let mut engine = engine(&Settings { mappings_limit: Some(limit), ..following() });
    let (vms, mut clock) = short_of_mappings(&mut engine);
    let singles = engine.statistics();
    assert!(singles.pages_sharing > 150 && singles.pages_sharing < u64::from(PAGES / 4), "{singles:?}");
    assert!(singles.mappings_denied > 0 && singles.mappings < limit, "{singles:?}");

    for (number, vm) in (2..).zip(&vms[2..]) {
        (0..PAGES).for_each(|page| vm.write(page, in_runs(number, page)));
    }
    clock.intervals(&mut engine, 12);
    let runs = engine.statistics();
    let long: u64 =
        vms[2..].iter().map(|vm| engine.vm_statistics(vm.slot).unwrap().unwrap().pages_merged).sum();
    let all = 2 * (0..PAGES).filter(|page| !page.is_multiple_of(32)).count() as u64;
    assert!(long > all * 9 / 10, "{long} of {all} pages in long runs are merged: {runs:?}");
    assert!(runs.pages_undone > 0 && runs.pages_sharing > singles.pages_sharing, "{runs:?}");
    assert!(runs.mappings < limit, "{runs:?}");
    for (number, vm) in (0..).zip(&vms) {
        let content = |page| if number < 2 { isolated(number, page) } else { in_runs(number, page) };
        (0..PAGES).for_each(|page| vm.guest.check(page, content(page)));
    }
    audit(&mut engine);

    // At rest there is no to and fro.
    clock.intervals(&mut engine, 40);
    assert_eq!(engine.statistics().pages_undone, runs.pages_undone);
    assert_eq!(engine.statistics().merges, runs.merges);
}
