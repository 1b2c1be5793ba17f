//! A frame store that has become mostly holes is repaired while guests go on.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::followed::{Clock, Vm, following};
use common::{Fault, audit, engine, faulty_engine};
use samepage_sharing::engine::Engine;

const PAGES: u32 = 24_000;

fn alike(page: u32) -> u64 {
    1 + u64::from(page)
}

fn own(number: u64, page: u32) -> u64 {
    (number + 1) << 40 | u64::from(page)
}

/// Whether a page keeps its frame when most are left.
fn stays(page: u32) -> bool {
    page.is_multiple_of(16)
}

/// Three VMs that share all of their pages and then leave fifteen in sixteen.
fn leave_most(engine: &mut Engine) -> (Vec<Vm>, Clock) {
    let vms: Vec<_> = (0..3).map(|_| Vm::start(engine, PAGES)).collect();
    let mut clock = Clock::new();
    vms.iter().for_each(|vm| (0..PAGES).for_each(|page| vm.write(page, alike(page))));
    clock.intervals(engine, 2);
    assert_eq!(engine.statistics().frames, u64::from(PAGES));
    for (number, vm) in (0..).zip(&vms) {
        (0..PAGES).filter(|&page| !stays(page)).for_each(|page| vm.write(page, own(number, page)));
    }
    (vms, clock)
}

fn check(vms: &[Vm]) {
    for (number, vm) in (0..).zip(vms) {
        let content = |page| if stays(page) { alike(page) } else { own(number, page) };
        (0..PAGES).for_each(|page| vm.guest.check(page, content(page)));
    }
}

#[test]
fn a_store_that_is_mostly_holes_is_compacted() {
    let mut engine = engine(&following());
    let (vms, mut clock) = leave_most(&mut engine);
    clock.intervals(&mut engine, 4);
    let statistics = engine.statistics();
    assert!(statistics.compactions > 0, "{statistics:?}");
    assert_eq!(statistics.frames, u64::from(PAGES / 16));
    assert_eq!(statistics.store_bytes, statistics.frames * 4096, "each frame is there once");
    assert!(statistics.frame_places <= 4096 + 2 * statistics.frames, "{statistics:?}");
    assert_eq!(statistics.pages_sharing, u64::from(2 * PAGES / 16));
    check(&vms);
    audit(&mut engine);
    // What was moved is found.
    vms[0].write(1, alike(16 * 700));
    clock.intervals(&mut engine, 3);
    assert_eq!(engine.statistics().pages_sharing, u64::from(2 * PAGES / 16) + 1);
    audit(&mut engine);
}

#[test]
fn pages_written_while_their_frames_move_keep_what_was_written() {
    let mut engine = engine(&following());
    let (vms, mut clock) = leave_most(&mut engine);
    let stop = AtomicBool::new(false);
    let last = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                for page in (0..PAGES).step_by(64) {
                    vms[1].write(page, own(round, page));
                    vms[1].guest.check(page, own(round, page));
                }
            }
            round
        });
        while engine.statistics().compactions == 0 && !writer.is_finished() {
            clock.intervals(&mut engine, 1);
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().expect("the writer found another's content")
    });
    clock.intervals(&mut engine, 40);
    (0..PAGES).step_by(64).for_each(|page| vms[1].guest.check(page, own(last, page)));
    for number in [0, 2] {
        (0..PAGES).filter(|&page| stays(page)).for_each(|page| vms[number].guest.check(page, alike(page)));
    }
    assert_eq!(engine.statistics().refusals, 0);
    audit(&mut engine);
}

#[test]
fn calls_that_fail_while_frames_move_leave_guests_whole() {
    for (call, fault) in
        [("protect", Fault::Refuse), ("map", Fault::Refuse), ("map", Fault::Tear), ("punch", Fault::Refuse)]
    {
        let (mut calls, mut total) = (0, 0);
        let mut engine = faulty_engine(&following(), move |name| {
            total += 1;
            calls += u32::from(name == call);
            if name == call && total > 300 && calls % 5 == 0 { fault } else { Fault::None }
        });
        let (vms, mut clock) = leave_most(&mut engine);
        clock.intervals(&mut engine, 20);
        assert!(engine.statistics().compactions > 0, "{call}: {:?}", engine.statistics());
        check(&vms);
        audit(&mut engine);
    }
}
