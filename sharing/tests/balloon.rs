//! Pages that guests give back, whatever is done with them meanwhile.

mod common;

use common::followed::{Clock, Vm, following};
use common::{Guest, audit, engine, kernels_mappings};
use samepage_sharing::engine::{Engine, Settings};
use samepage_sharing::{PAGE_SIZE, Ram};

const PAGES: u32 = 4096;

/// Two VMs, of which the second half of the pages is alike.
fn pair(engine: &mut Engine, clock: &mut Clock) -> [Vm; 2] {
    let vms = [0, 1].map(|_| Vm::start(engine, PAGES));
    for (number, vm) in (1..).zip(&vms) {
        for page in 0..PAGES {
            let own = (number << 32) + u64::from(page) + 1;
            vm.write(page, if page < PAGES / 2 { own } else { u64::from(page) });
        }
    }
    clock.intervals(engine, 4);
    vms
}

/// Gives pages back. Returns how many had memory.
fn discard(engine: &mut Engine, vm: &Vm, pages: std::ops::Range<u32>) -> u32 {
    let number = engine.vm_number(vm.slot);
    let (mut next, mut freed) = (pages.start, 0);
    while next < pages.end {
        let discarded = engine.discard(number, next..pages.end);
        assert!(discarded.next > next, "{discarded:?}");
        next = discarded.next;
        freed += discarded.freed;
    }
    freed
}

#[test]
fn pages_of_all_kinds_become_untouched_memory() {
    let mut engine = engine(&following());
    let mut clock = Clock::new();
    let [one, two] = pair(&mut engine, &mut clock);
    let before = engine.vm_statistics(one.slot).unwrap().unwrap();
    assert_eq!((before.pages_private, engine.statistics().frames), (2048, 2048));
    // Private ones, shared ones, and some that have left their frames.
    (3000..3010).for_each(|page| one.write(page, 7));
    assert_eq!(discard(&mut engine, &one, 1000..3500), 2500);
    (1000..3500).for_each(|page| one.guest.check(page, 0));
    (0..1000).for_each(|page| one.guest.check(page, (1 << 32) + u64::from(page) + 1));
    (3500..PAGES).for_each(|page| one.guest.check(page, page.into()));
    (2048..PAGES).for_each(|page| two.guest.check(page, page.into()));
    audit(&mut engine);
    assert_eq!(discard(&mut engine, &one, 1000..3500), 0, "there is nothing more to free");
    // Frames live as long as somebody refers to them.
    assert_eq!(discard(&mut engine, &two, 2048..3000), 952);
    clock.intervals(&mut engine, 4);
    audit(&mut engine);
    // And what is used again is found again.
    (2048..3000).for_each(|page| [&one, &two].iter().for_each(|vm| vm.write(page, page.into())));
    clock.intervals(&mut engine, 6);
    (2048..3000).for_each(|page| [&one, &two].iter().for_each(|vm| vm.guest.check(page, page.into())));
    let after = engine.vm_statistics(two.slot).unwrap().unwrap();
    assert_eq!(after.pages_private, u64::from(PAGES / 2));
    audit(&mut engine);
}

#[test]
fn nothing_is_freed_of_a_vm_that_is_gone_or_behind_its_memory() {
    let mut engine = engine(&following());
    let mut clock = Clock::new();
    let [one, two] = pair(&mut engine, &mut clock);
    let number = engine.vm_number(one.slot);
    let discarded = engine.discard(number, PAGES..PAGES + 5);
    assert_eq!((discarded.next, discarded.freed), (PAGES + 5, 0));
    engine.remove(one.slot).unwrap();
    // Another VM in its place keeps what it has.
    let third = Vm::start(&mut engine, PAGES);
    assert_eq!(third.slot, one.slot);
    third.write(5, 5);
    assert_eq!(engine.discard(number, 0..PAGES).freed, 0);
    third.guest.check(5, 5);
    two.guest.check(5, (2 << 32) + 6);
}

#[test]
fn a_run_that_would_take_the_last_mappings_stays() {
    let limit = 2 * (samepage_sharing::budget::mappings_of_process().unwrap() + 3 * 64 + 40);
    let mut engine = engine(&Settings { mappings_limit: Some(limit), ..following() });
    let mut clock = Clock::new();
    let [one, two] = pair(&mut engine, &mut clock);
    let freed: u32 = (2048..PAGES).step_by(3).map(|page| discard(&mut engine, &one, page..page + 1)).sum();
    assert!(freed < 500, "{freed}");
    assert!(kernels_mappings(&one.guest) < 400);
    for page in 2048..PAGES {
        let is_freed = one.guest.is_zero(page);
        one.guest.check(page, if is_freed { 0 } else { page.into() });
        two.guest.check(page, page.into());
    }
    audit(&mut engine);
}

#[test]
fn parts_of_huge_pages_are_freed_as_well() {
    let mut engine = engine(&following());
    let vm = Vm::start_guest(&mut engine, Guest::huge(PAGES));
    (0..PAGES).for_each(|page| vm.write(page, u64::from(page) + 1));
    assert_eq!(discard(&mut engine, &vm, 700..2600), 1900);
    (0..PAGES).for_each(|page| {
        vm.guest.check(page, if (700..2600).contains(&page) { 0 } else { u64::from(page) + 1 });
    });
    audit(&mut engine);
}

#[test]
fn memory_without_an_engine_is_freed_in_pieces() {
    let guest = Guest::new(PAGES);
    (0..PAGES).for_each(|page| guest.write(page, 9));
    let ram: &Ram = &guest.ram;
    assert_eq!(ram.bytes(), PAGES as usize * PAGE_SIZE);
    assert_eq!(ram.discard(10, 0).unwrap(), (10, 0));
    let (next, freed) = ram.discard(10, PAGES - 20).unwrap();
    assert_eq!((next, freed), (10 + 1024, 1024));
    assert_eq!(ram.discard(10, 1025).unwrap(), (next, 0));
    guest.check(9, 9);
    (10..next).for_each(|page| guest.check(page, 0));
    guest.check(next, 9);
}
