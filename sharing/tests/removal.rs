//! VMs that end: their memory goes in pieces, and others neither wait for it nor see anything of it.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::counted::counted_engine;
use common::followed::{Clock, Vm, following};
use common::{Fault, Guest, audit, engine, faulty_engine, losses, no_rest, pass};
use samepage_sharing::engine::Step;

/// Pages of a VM: 80 MiB.
const PAGES: u32 = 20_000;
/// Pages that one call may be about.
const PIECE: u32 = 1024;

fn alike(page: u32) -> u64 {
    1 + u64::from(page)
}

#[test]
fn no_call_is_about_much_memory() {
    let (mut engine, calls) = counted_engine(&following());
    let vms = [(); 2].map(|()| Vm::start(&mut engine, PAGES));
    // Half of it is shared, a quarter is each VM's own.
    for (number, vm) in (1..).zip(&vms) {
        (0..PAGES / 2).for_each(|page| vm.write(page, alike(page)));
        (PAGES / 2..PAGES / 4 * 3).for_each(|page| vm.write(page, number << 40 | alike(page)));
    }
    Clock::new().intervals(&mut engine, 3);
    assert_eq!(engine.statistics().pages_sharing, u64::from(PAGES / 2));
    calls.lock().clear();
    let mut removal = engine.begin_removal(vms[0].slot).unwrap();
    assert_eq!(*calls.lock(), [], "to begin moves nothing");
    let mut pieces = 1;
    loop {
        removal.empty().unwrap();
        assert!(calls.lock().len() <= 3, "a piece takes few calls: {:?}", calls.lock());
        let longest = calls.lock().drain(..).map(|(_, pages)| pages).max().unwrap();
        assert!(longest <= PIECE, "{longest} pages at once");
        let more = engine.go_on_removing(&mut removal);
        assert!(calls.lock().drain(..).all(|(name, _)| name == "punch"), "the engine only gives frames up");
        if !more {
            break;
        }
        pieces += 1;
    }
    assert_eq!(pieces, PAGES.div_ceil(PIECE));
    assert_eq!((engine.statistics().pages_sharing, engine.statistics().frames), (0, u64::from(PAGES / 2)));
    assert!((0..PAGES).all(|page| vms[0].guest.is_zero(page)), "all of it is untouched memory");
    (0..PAGES / 2).for_each(|page| vms[1].guest.check(page, alike(page)));
    audit(&mut engine);
}

#[test]
fn others_are_served_while_a_vm_goes() {
    let mut engine = engine(&following());
    let vms = [(); 4].map(|()| Vm::start(&mut engine, PAGES));
    for vm in &vms[..3] {
        (0..PAGES).for_each(|page| vm.write(page, alike(page)));
    }
    let mut clock = Clock::new();
    clock.intervals(&mut engine, 3);
    assert_eq!(engine.statistics().pages_sharing, 2 * u64::from(PAGES));
    // The first two go at the same time. The third changes what it has, the fourth comes to have it.
    let mut removals = [0, 1].map(|vm| engine.begin_removal(vms[vm].slot).unwrap());
    let mut going = [true; 2];
    let mut round = 0;
    while going.contains(&true) {
        for (removal, going) in removals.iter_mut().zip(&mut going) {
            if *going {
                removal.empty().unwrap();
                *going = engine.go_on_removing(removal);
            }
        }
        for page in (round * 100..round * 100 + 100).filter(|&page| page < PAGES) {
            vms[2].write(page, 1 << 41 | u64::from(page));
            vms[3].write(page + PAGES / 4, alike(page + PAGES / 4));
        }
        clock.tick(&mut engine);
        round += 1;
    }
    clock.intervals(&mut engine, 3);
    let written = (round * 100).min(PAGES);
    for page in 0..PAGES {
        let changed = page < written;
        vms[2].guest.check(page, if changed { 1 << 41 | u64::from(page) } else { alike(page) });
    }
    (PAGES / 4..PAGES / 4 + written).for_each(|page| vms[3].guest.check(page, alike(page)));
    // What both have, the fourth has found while the others went.
    assert_eq!(engine.statistics().pages_sharing, u64::from(written));
    assert_eq!(engine.mode(vms[0].slot), None);
    audit(&mut engine);
    engine.remove(vms[2].slot).unwrap();
    engine.remove(vms[3].slot).unwrap();
    while engine.step(std::time::Instant::now()) == Step::Worked {}
    assert_eq!((engine.statistics().frames, engine.statistics().store_bytes), (0, 0));
}

#[test]
fn a_removal_that_the_kernel_refuses_can_be_begun_again() {
    let refuse = Arc::new(AtomicBool::new(false));
    let refused = Arc::clone(&refuse);
    let mut engine = faulty_engine(&following(), move |name| match name {
        "discard" | "map" if refused.load(Ordering::Relaxed) => Fault::Refuse,
        _ => Fault::None,
    });
    let vms = [(); 2].map(|()| Vm::start(&mut engine, PAGES));
    vms.iter().for_each(|vm| (0..5000).for_each(|page| vm.write(page, alike(page))));
    let mut clock = Clock::new();
    clock.intervals(&mut engine, 3);
    let mut removal = engine.begin_removal(vms[0].slot).unwrap();
    removal.empty().unwrap();
    assert!(engine.go_on_removing(&mut removal));
    refuse.store(true, Ordering::Relaxed);
    assert!(removal.empty().is_err() && engine.remove(vms[0].slot).is_err());
    // Nothing was given up that is mapped, and the other VM goes on.
    audit(&mut engine);
    clock.intervals(&mut engine, 2);
    refuse.store(false, Ordering::Relaxed);
    engine.remove(vms[0].slot).unwrap();
    assert_eq!(engine.statistics().pages_sharing, 0);
    (0..5000).for_each(|page| vms[1].guest.check(page, alike(page)));
    audit(&mut engine);
}

#[test]
fn pages_of_a_vm_that_goes_never_show_the_frames_that_they_had_left() {
    const PAGES: u32 = 64;
    let guests = [Guest::new(PAGES), Guest::new(PAGES)];
    let is_going = Arc::new(AtomicBool::new(false));
    let (reader, going) = (Guest { ram: Arc::clone(&guests[0].ram) }, Arc::clone(&is_going));
    let mut engine = faulty_engine(&no_rest(false), move |name| {
        // A device may still be at work.
        if name == "map" && going.load(Ordering::Relaxed) {
            (0..PAGES).for_each(|page| reader.check(page, 1 << 40 | alike(page)));
        }
        Fault::None
    });
    let slots = guests.each_ref().map(|guest| {
        (0..PAGES).for_each(|page| guest.write(page, alike(page)));
        engine.add(guest.ram.clone(), None, losses().1).unwrap()
    });
    pass(&mut engine);
    assert_eq!(engine.statistics().pages_sharing, u64::from(PAGES));
    // Both leave their frames, which die.
    for (number, guest) in (1..).zip(&guests) {
        (0..PAGES).for_each(|page| guest.write(page, number << 40 | alike(page)));
    }
    pass(&mut engine);
    assert_eq!(engine.statistics().frames, 0);
    audit(&mut engine);
    is_going.store(true, Ordering::Relaxed);
    engine.remove(slots[0]).unwrap();
    audit(&mut engine);
}
