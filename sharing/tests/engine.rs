//! The engine on plain memory, without KVM: what it finds, what it leaves, what it gives back.

mod common;

use common::followed::{Clock, Vm, following};
use common::{Guest, audit, engine, losses, no_rest, pass};
use samepage_sharing::Slot;
use samepage_sharing::engine::{Engine, Settings};

fn add(engine: &mut Engine, guest: &Guest) -> Slot {
    engine.add(guest.ram.clone(), None, losses().1).unwrap()
}

/// Guests of `pages` pages: a third alike, a third their own, a third zeros.
fn guests(count: u64, pages: u32) -> Vec<Guest> {
    (0..count)
        .map(|vm| {
            let guest = Guest::new(pages);
            for page in 0..pages {
                guest.write(page, content(vm, page, pages));
            }
            guest
        })
        .collect()
}

fn content(vm: u64, page: u32, pages: u32) -> u64 {
    match page * 3 / pages {
        0 => 1 + u64::from(page),
        1 => (vm + 1) << 32 | u64::from(page),
        _ => 0,
    }
}

fn check(guests: &[Guest], pages: u32) {
    for (vm, guest) in guests.iter().enumerate() {
        (0..pages).for_each(|page| guest.check(page, content(vm as u64, page, pages)));
    }
}

#[test]
fn alike_pages_share_one_frame_and_zero_pages_take_nothing() {
    let guests = guests(4, 3000);
    let mut engine = engine(&no_rest(true));
    let slots: Vec<_> = guests.iter().map(|guest| add(&mut engine, guest)).collect();
    pass(&mut engine);
    pass(&mut engine);
    let statistics = engine.statistics();
    assert_eq!((statistics.pages_shared, statistics.pages_sharing), (1000, 3000));
    assert_eq!(statistics.zero_pages, 4000);
    assert_eq!(statistics.store_bytes, 1000 * 4096);
    assert_eq!(statistics.refusals, 0);
    for slot in slots {
        let vm = engine.vm_statistics(slot).unwrap().unwrap();
        assert_eq!((vm.pages_merged, vm.pages_shared, vm.pages_sharing), (1000, 250, 750));
        assert_eq!((vm.pages_private, vm.zero_pages), (1000, 1000));
        assert!(vm.mappings < 10, "{} mappings for a few runs", vm.mappings);
    }
    check(&guests, 3000);
    audit(&mut engine);
}

#[test]
fn a_second_pass_over_unchanged_pages_finds_nothing_new() {
    let guests = guests(2, 300);
    let mut engine = engine(&no_rest(true));
    for guest in &guests {
        add(&mut engine, guest);
    }
    while pass(&mut engine) > 0 {}
    let before = engine.statistics();
    assert_eq!(pass(&mut engine), 0);
    let after = engine.statistics();
    assert_eq!((after.merges, after.pages_sharing), (before.merges, before.pages_sharing));
}

#[test]
fn written_pages_leave_their_frames_and_the_last_one_frees_it() {
    let guests = guests(2, 300);
    let mut engine = engine(&no_rest(false));
    for guest in &guests {
        add(&mut engine, guest);
    }
    pass(&mut engine);
    assert_eq!(engine.statistics().pages_shared, 100);
    for page in 0..100 {
        guests[0].write(page, 7 << 40 | u64::from(page));
    }
    pass(&mut engine);
    let statistics = engine.statistics();
    assert_eq!((statistics.frames, statistics.pages_shared, statistics.breaks), (100, 0, 100));
    audit(&mut engine);
    for page in 0..100 {
        guests[1].check(page, content(1, page, 300));
        guests[1].write(page, 8 << 40 | u64::from(page));
    }
    pass(&mut engine);
    assert_eq!((engine.statistics().frames, engine.statistics().store_bytes), (0, 0));
    (0..100).for_each(|page| guests[0].check(page, 7 << 40 | u64::from(page)));
    audit(&mut engine);
}

#[test]
fn a_page_that_returns_to_its_frames_content_takes_no_new_mapping() {
    let guests = guests(3, 300);
    let mut engine = engine(&no_rest(false));
    for guest in &guests {
        add(&mut engine, guest);
    }
    pass(&mut engine);
    for round in 0..3 {
        for page in (0..100).step_by(7) {
            guests[0].write(page, 99);
            guests[0].write(page, content(0, page, 300));
        }
        let before = engine.statistics();
        pass(&mut engine);
        let after = engine.statistics();
        assert_eq!(after.merges - before.merges, 15, "round {round}");
        assert!(after.mappings <= before.mappings, "{} > {}", after.mappings, before.mappings);
    }
    check(&guests, 300);
    audit(&mut engine);
}

#[test]
fn pages_alike_within_one_vm_are_merged_too() {
    let guest = Guest::new(64);
    (0..64).for_each(|page| guest.write(page, 1 + u64::from(page % 4)));
    let mut engine = engine(&no_rest(false));
    add(&mut engine, &guest);
    pass(&mut engine);
    pass(&mut engine);
    let statistics = engine.statistics();
    assert_eq!(statistics.pages_shared + statistics.pages_sharing, 64);
    assert!(statistics.frames <= 8, "{} frames for 4 contents", statistics.frames);
    (0..64).for_each(|page| guest.check(page, 1 + u64::from(page % 4)));
    audit(&mut engine);
}

#[test]
fn a_zero_page_where_a_frame_was_mapped_is_given_back_too() {
    let guests = guests(2, 300);
    let mut engine = engine(&no_rest(false));
    let slot = add(&mut engine, &guests[0]);
    add(&mut engine, &guests[1]);
    pass(&mut engine);
    (10..60).for_each(|page| guests[0].write(page, 0));
    pass(&mut engine);
    let vm = engine.vm_statistics(slot).unwrap().unwrap();
    assert_eq!((vm.zero_pages, vm.pages_private), (150, 100));
    (10..60).for_each(|page| guests[0].check(page, 0));
    (10..60).for_each(|page| guests[1].check(page, content(1, page, 300)));
    audit(&mut engine);
}

#[test]
fn untouched_memory_is_not_touched() {
    let guest = Guest::new(4096);
    guest.write(17, 5);
    let mut engine = engine(&no_rest(false));
    let slot = add(&mut engine, &guest);
    pass(&mut engine);
    assert_eq!(engine.statistics().pages_scanned, 1);
    assert_eq!(engine.vm_statistics(slot).unwrap().unwrap().pages_private, 1);
}

#[test]
fn a_vm_that_leaves_takes_its_share_and_nothing_else() {
    let guests = guests(3, 600);
    let mut engine = engine(&no_rest(false));
    let slots: Vec<_> = guests.iter().map(|guest| add(&mut engine, guest)).collect();
    pass(&mut engine);
    assert_eq!(engine.statistics().pages_sharing, 400);
    engine.remove(slots[1]).unwrap();
    assert_eq!(engine.statistics().pages_sharing, 200);
    audit(&mut engine);
    check(&guests[..1], 600);
    guests[2].check(0, content(2, 0, 600));
    pass(&mut engine);
    engine.remove(slots[0]).unwrap();
    engine.remove(slots[2]).unwrap();
    let statistics = engine.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes, statistics.pages_unshared), (0, 0, 0));
}

#[test]
fn at_the_reserve_of_mappings_merging_pauses_and_nothing_fails() {
    // Alternating alike and own pages: every merge is isolated and costs two mappings.
    let pages = 4000;
    let content = |vm: u64, page: u32| {
        if page.is_multiple_of(2) { 1 + u64::from(page) } else { (vm + 1) << 32 | u64::from(page) }
    };
    let guests: Vec<_> = (0..2)
        .map(|vm| {
            let guest = Guest::new(pages);
            (0..pages).for_each(|page| guest.write(page, content(vm, page)));
            guest
        })
        .collect();
    let settings = Settings { mappings_limit: Some(2000), ..no_rest(false) };
    let mut engine = engine(&settings);
    let slots: Vec<_> = guests.iter().map(|guest| add(&mut engine, guest)).collect();
    pass(&mut engine);
    pass(&mut engine);
    let statistics = engine.statistics();
    assert!(statistics.mappings_denied > 0 && statistics.refusals == 0, "{statistics:?}");
    assert!(statistics.pages_sharing > 50, "{statistics:?}");
    assert!(statistics.mappings < 1000, "half of 2,000 is kept back: {statistics:?}");
    for (vm, guest) in guests.iter().enumerate() {
        (0..pages).for_each(|page| guest.check(page, content(vm as u64, page)));
    }
    audit(&mut engine);
    engine.remove(slots[0]).unwrap();
    let third = Guest::new(pages);
    (0..pages).for_each(|page| third.write(page, content(2, page)));
    add(&mut engine, &third);
    pass(&mut engine);
    (0..pages).for_each(|page| third.check(page, content(2, page)));
    audit(&mut engine);
}

#[test]
fn pages_that_changed_unnoticed_do_not_pile_up_under_the_content_that_they_had() {
    let mut engine = engine(&following());
    let vm = Vm::start(&mut engine, 40);
    let mut clock = Clock::new();
    clock.intervals(&mut engine, 1);
    for page in 0..12 {
        vm.write(page, 7);
        clock.intervals(&mut engine, 1);
        // By now another one was looked at. Its log does not hear of this.
        if page >= 1 {
            vm.guest.write(page - 1, 1 << 32 | u64::from(page));
        }
    }
    let now = engine.statistics();
    assert!((1..=4).contains(&now.pages_unshared), "{now:?}");
    assert_eq!(now.merges, 0);
}
