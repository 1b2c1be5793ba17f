//! VMs that lose memory while they share: they alone are told, nothing of them is looked at any more, and
//! others go on.

mod common;

use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::followed::{Clock, Vm, following};
use common::{Fault, Guest, audit, damage, engine, faulty_engine, losses, no_rest, pass};
use samepage_sharing::blocks::CacheSize;
use samepage_sharing::engine::{Order, Settings, Step};
use samepage_sharing::loss::{Cause, Loss};

const PAGES: u32 = 96;

/// Losses of a guest, as they are told.
fn told(guest: &Guest) -> mpsc::Receiver<Loss> {
    let (sender, receiver) = mpsc::channel();
    guest.ram.on_loss(move |loss| sender.send(loss).unwrap_or_default()).unwrap();
    receiver
}

#[test]
fn pages_of_a_vm_that_was_lost_are_compared_with_nobody_s() {
    let guests = [Guest::new(PAGES), Guest::new(PAGES), Guest::new(PAGES), Guest::new(PAGES)];
    for guest in &guests[..2] {
        (0..PAGES).for_each(|page| guest.write(page, 1 + u64::from(page)));
    }
    for (number, guest) in (0..).zip(&guests[2..]) {
        (0..PAGES).for_each(|page| guest.write(page, 5000 + 1000 * number + u64::from(page)));
    }
    let mut torn = 0;
    let mut engine = faulty_engine(&no_rest(false), move |name| match name {
        "map" | "map again" if torn < 2 => {
            torn += 1;
            if torn == 1 { Fault::Tear } else { Fault::Refuse }
        }
        _ => Fault::None,
    });
    for guest in &guests {
        engine.add(guest.ram.clone(), None, losses().1).unwrap();
    }
    pass(&mut engine);
    // The second VM's pages leave their frames, which die.
    (0..PAGES).for_each(|page| guests[1].write(page, 9000 + u64::from(page)));
    pass(&mut engine);
    assert_eq!(guests.iter().filter(|guest| guest.ram.lost()).count(), 1);
    // Two others have what the lost one had.
    for guest in &guests[2..] {
        (0..PAGES).for_each(|page| guest.write(page, 1 + u64::from(page)));
    }
    pass(&mut engine);
    pass(&mut engine);
    for guest in &guests[2..] {
        (0..PAGES).for_each(|page| guest.check(page, 1 + u64::from(page)));
    }
    assert!(engine.statistics().pages_sharing >= u64::from(PAGES), "{:?}", engine.statistics());
    audit(&mut engine);
}

#[test]
fn pages_that_the_host_cannot_supply_end_their_vm_alone() {
    for (cause, order) in [
        (Cause::Unmapped, Order::Digest),
        (Cause::Unbacked, Order::Digest),
        (Cause::Unmapped, Order::Content),
        (Cause::Unbacked, Order::Content),
    ] {
        let mut engine = engine(&Settings { order, ..no_rest(false) });
        let guests = [Guest::new(PAGES), Guest::new(PAGES), Guest::new(PAGES)];
        let mut slots = Vec::new();
        for (number, guest) in (0..).zip(&guests) {
            (0..PAGES / 2).for_each(|page| guest.write(page, 1 + u64::from(page)));
            (PAGES / 2..PAGES).for_each(|page| guest.write(page, 1000 * (number + 1) + u64::from(page)));
            slots.push(engine.add(guest.ram.clone(), None, losses().1).unwrap());
        }
        let told: Vec<_> = guests.iter().map(told).collect();
        pass(&mut engine);
        // Pages on frames, and unique ones that the index knows.
        for page in [PAGES / 2 - 1, PAGES / 2 + 3, PAGES - 1] {
            damage(&guests[2], page, 1, cause);
        }
        // Another VM's pages become what the lost ones were.
        for guest in &guests[..2] {
            (PAGES / 2..PAGES).for_each(|page| guest.write(page, 3000 + u64::from(page)));
        }
        for _ in 0..3 {
            pass(&mut engine);
        }
        if order == Order::Content {
            // A search by content goes by what pages hold now, and may have passed these by.
            guests[2].is_zero(PAGES - 1);
            pass(&mut engine);
        }
        let loss = told[2].recv_timeout(Duration::from_secs(60));
        assert_eq!(loss.map(|loss| loss.cause), Ok(cause), "{order:?}, lost: {}", guests[2].ram.lost());
        assert!(told[..2].iter().all(|told| told.try_recv().is_err()));
        for guest in &guests[..2] {
            (0..PAGES / 2).for_each(|page| guest.check(page, 1 + u64::from(page)));
            (PAGES / 2..PAGES).for_each(|page| guest.check(page, 3000 + u64::from(page)));
        }
        assert!(engine.statistics().pages_sharing >= u64::from(PAGES), "{:?}", engine.statistics());
        audit(&mut engine);
        slots.into_iter().for_each(|slot| engine.remove(slot).unwrap());
        assert_eq!((engine.statistics().frames, engine.statistics().store_bytes), (0, 0));
    }
}

/// The engine comes to rest beside a VM that is lost, and its pages are out of the books.
#[test]
fn the_engine_rests_beside_a_lost_vm() {
    let mut engine = engine(&Settings { block_cache: CacheSize::Bytes(1 << 20), ..following() });
    let vms: Vec<_> = (0..2).map(|_| Vm::start(&mut engine, 20_000)).collect();
    for (number, vm) in (0..).zip(&vms) {
        (0..2000).for_each(|page| vm.write(page, 1 + u64::from(page) + 10_000 * number));
    }
    let mut clock = Clock::new();
    clock.intervals(&mut engine, 2);
    assert!(engine.vm_statistics(vms[0].slot).unwrap().unwrap().pages_unshared >= 2000);
    damage(&vms[0].guest, 7, 1, Cause::Unmapped);
    vms[0].guest.is_zero(7);
    engine.set_mode(vms[0].slot, samepage_sharing::engine::Mode::Off);
    let mut now = Instant::now() + Duration::from_secs(60);
    let rested = (0..1000).any(|_| match engine.step(now) {
        Step::RestUntil(until) => until > std::mem::replace(&mut now, until),
        Step::Worked => false,
    });
    assert!(rested, "it goes on and on");
    let statistics = engine.vm_statistics(vms[0].slot).unwrap().unwrap();
    assert_eq!(statistics.pages_unshared, 0);
    engine.remove(vms[0].slot).unwrap();
    audit(&mut engine);
}
