//! Pages taken off their frames when a VM is not to share any more.

mod common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::followed::{Clock, Vm, following};
use common::{
    Fault, Guest, Numbers, audit, engine, faulty_engine, kernels_mappings, losses, no_rest, pass, take_off,
};
use samepage_sharing::Slot;
use samepage_sharing::changes::{ChangeLog, PageSet, pages_of};
use samepage_sharing::engine::{Engine, Mode};

const PAGES: u32 = 2000;

/// Content such that every fourth page is alike in all guests, and nothing else.
fn isolated(vm: u64, page: u32) -> u64 {
    if page.is_multiple_of(4) { 1 + u64::from(page) } else { (vm + 1) << 32 | u64::from(page) }
}

fn fill(guest: &Guest, content: impl Fn(u32) -> u64) {
    (0..guest.ram.pages()).for_each(|page| guest.write(page, content(page)));
}

fn add(engine: &mut Engine, guest: &Guest) -> Slot {
    engine.add(guest.ram.clone(), None, losses().1).unwrap()
}

#[test]
fn a_vm_that_is_not_to_share_any_more_has_its_memory_in_one_mapping_again() {
    let guests = [Guest::new(PAGES), Guest::new(PAGES)];
    let mut engine = engine(&no_rest(false));
    let slots: Vec<_> = (0..)
        .zip(&guests)
        .map(|(vm, guest)| {
            fill(guest, |page| isolated(vm, page));
            add(&mut engine, guest)
        })
        .collect();
    pass(&mut engine);
    pass(&mut engine);
    assert_eq!(engine.statistics().pages_sharing, u64::from(PAGES / 4));
    assert!(kernels_mappings(&guests[0]) > 900);
    // One page left its frame: its mapping is there, and refers to nothing.
    guests[0].write(8, 7 << 50);
    pass(&mut engine);

    engine.set_mode(slots[0], Mode::Off);
    take_off(&mut engine);
    let vm = engine.vm_statistics(slots[0]).unwrap().unwrap();
    assert_eq!((vm.pages_merged, vm.pages_private, vm.mappings), (0, u64::from(PAGES), 1));
    assert_eq!(kernels_mappings(&guests[0]), 1, "the kernel made one mapping of it");
    assert_eq!(engine.statistics().pages_sharing, 0);
    assert_eq!(engine.statistics().frames, u64::from(PAGES / 4), "the other VM's");
    (0..PAGES).for_each(|page| guests[0].check(page, if page == 8 { 7 << 50 } else { isolated(0, page) }));
    (0..PAGES).for_each(|page| guests[1].check(page, isolated(1, page)));
    audit(&mut engine);

    pass(&mut engine);
    assert_eq!(engine.statistics().pages_sharing, 0, "it is left alone");
    engine.set_mode(slots[0], Mode::Full);
    pass(&mut engine);
    pass(&mut engine);
    assert_eq!(engine.statistics().pages_sharing, u64::from(PAGES / 4 - 1));
    audit(&mut engine);
}

#[test]
fn of_a_vm_in_zero_mode_pages_of_zeros_alone_are_given_back() {
    let guests = [Guest::new(400), Guest::new(400)];
    let mut engine = engine(&no_rest(false));
    for guest in &guests {
        fill(guest, |page| if page < 100 { 0 } else { u64::from(page) });
    }
    let slots = [add(&mut engine, &guests[0]), add(&mut engine, &guests[1])];
    engine.set_mode(slots[0], Mode::Zero);
    pass(&mut engine);
    pass(&mut engine);
    let statistics = engine.statistics();
    assert_eq!((statistics.zero_pages, statistics.pages_sharing, statistics.merges), (200, 0, 0));
    engine.set_mode(slots[0], Mode::Full);
    pass(&mut engine);
    assert_eq!(engine.statistics().pages_sharing, 300);
    engine.set_mode(slots[1], Mode::Zero);
    take_off(&mut engine);
    pass(&mut engine);
    let statistics = engine.statistics();
    assert_eq!((statistics.zero_pages, statistics.pages_sharing, statistics.frames), (200, 0, 300));
    audit(&mut engine);
}

#[test]
fn a_change_of_mode_goes_over_no_memory_and_holds_from_then_on() {
    const MANY: u32 = 20_000;
    let guests = [Guest::new(MANY), Guest::new(400)];
    let mut engine = engine(&no_rest(false));
    fill(&guests[0], |page| 1 << 32 | u64::from(page));
    fill(&guests[1], |page| 2 << 32 | u64::from(page));
    let slots = [add(&mut engine, &guests[0]), add(&mut engine, &guests[1])];
    pass(&mut engine);
    let unshared = |engine: &Engine| engine.statistics().pages_unshared;
    let all = u64::from(MANY + 400);
    assert_eq!(unshared(&engine), all);
    for mode in [Mode::Off, Mode::Zero] {
        engine.set_mode(slots[0], mode);
        assert_eq!(unshared(&engine), all, "nothing was gone over");
        // Pages that are still in the index are not merged with.
        fill(&guests[1], |page| 1 << 32 | u64::from(page));
        pass(&mut engine);
        assert_eq!(engine.statistics().merges, 0);
        let mut before = unshared(&engine);
        while engine.unmerge_step(std::time::Instant::now()) {
            let now = unshared(&engine);
            assert!(before - now <= 2048, "{} pages in one step", before - now);
            before = now;
        }
        assert_eq!(before, 400, "its pages are in no index");
        fill(&guests[1], |page| 2 << 32 | u64::from(page));
        engine.set_mode(slots[0], Mode::Full);
        pass(&mut engine);
        assert_eq!(unshared(&engine), all);
    }
    // A change that is taken back half-way.
    engine.set_mode(slots[0], Mode::Off);
    engine.unmerge_step(std::time::Instant::now());
    engine.set_mode(slots[0], Mode::Full);
    fill(&guests[1], |page| 1 << 32 | u64::from(page));
    pass(&mut engine);
    pass(&mut engine);
    assert_eq!(engine.statistics().pages_sharing, 400);
    audit(&mut engine);
}

#[test]
fn a_followed_vm_is_looked_at_anew_when_it_shares_again() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| Vm::start(&mut engine, 500)).collect();
    let mut clock = Clock::new();
    vms.iter().for_each(|vm| (0..500).for_each(|page| vm.write(page, 1 + u64::from(page))));
    clock.intervals(&mut engine, 2);
    assert_eq!(engine.statistics().pages_sharing, 500);
    engine.set_mode(vms[1].slot, Mode::Off);
    clock.intervals(&mut engine, 1);
    assert_eq!(engine.statistics().pages_sharing, 0);
    vms[1].write(3, 9 << 50);
    clock.intervals(&mut engine, 10);
    assert_eq!(engine.statistics().pages_sharing, 0);
    engine.set_mode(vms[1].slot, Mode::Full);
    clock.intervals(&mut engine, 3);
    assert_eq!(engine.statistics().pages_sharing, 499);
    audit(&mut engine);
}

#[test]
fn a_vm_is_taken_off_its_frames_while_others_change_faster_than_the_engine_looks() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..3).map(|_| Vm::start(&mut engine, PAGES)).collect();
    let mut clock = Clock::new();
    vms.iter().for_each(|vm| (0..PAGES).for_each(|page| vm.write(page, 1 + u64::from(page))));
    clock.intervals(&mut engine, 2);
    assert_eq!(engine.statistics().pages_sharing, u64::from(2 * PAGES));
    engine.set_mode(vms[0].slot, Mode::Off);
    let off = |engine: &Engine| engine.vm_statistics(vms[0].slot).unwrap().unwrap().pages_merged == 0;
    let mut steps = 0;
    while !off(&engine) {
        // An interval is over with every step, and pages have come to rest in it.
        for vm in &vms[1..] {
            (0..64).for_each(|page| vm.write((steps * 64 + page) % PAGES, u64::from(steps) << 32));
        }
        clock.tick(&mut engine);
        steps += 1;
        assert!(steps < 1000, "{:?}", engine.statistics());
    }
    (0..PAGES).for_each(|page| vms[0].guest.check(page, 1 + u64::from(page)));
    audit(&mut engine);
}

#[test]
fn writers_go_on_while_their_pages_are_taken_off() {
    let guests = [Guest::new(PAGES), Guest::new(PAGES)];
    let mut engine = engine(&no_rest(false));
    let alike = |page: u32| 1 + u64::from(page);
    guests.iter().for_each(|guest| fill(guest, alike));
    let slots = [add(&mut engine, &guests[0]), add(&mut engine, &guests[1])];
    let stop = AtomicBool::new(false);
    let model = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut numbers = Numbers(1);
            let mut model: Vec<u64> = (0..PAGES).map(alike).collect();
            while !stop.load(Ordering::Relaxed) {
                let page = numbers.below(u64::from(PAGES)) as u32;
                guests[0].check(page, model[page as usize]);
                // Often the content that it had at first, so that it is merged again.
                let content = if numbers.below(4) > 0 { alike(page) } else { numbers.below(9) << 32 | 5 };
                guests[0].write(page, content);
                model[page as usize] = content;
            }
            model
        });
        while engine.statistics().pages_undone < 20_000 && !writer.is_finished() {
            pass(&mut engine);
            engine.set_mode(slots[0], Mode::Off);
            take_off(&mut engine);
            engine.set_mode(slots[0], Mode::Full);
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().expect("the writer found another's content")
    });
    (0..PAGES).for_each(|page| guests[0].check(page, model[page as usize]));
    (0..PAGES).for_each(|page| guests[1].check(page, alike(page)));
    assert_eq!(engine.statistics().refusals, 0);
    audit(&mut engine);
}

#[test]
fn calls_that_fail_while_pages_are_taken_off_leave_guests_whole() {
    for (call, fault) in [
        ("stage", Fault::Refuse),
        ("restore", Fault::Refuse),
        ("restore", Fault::Tear),
        ("unstage", Fault::Refuse),
        ("protect", Fault::Refuse),
    ] {
        let mut failures = 0;
        let taking_off = std::sync::Arc::new(AtomicBool::new(false));
        let fails = std::sync::Arc::clone(&taking_off);
        let mut engine = faulty_engine(&no_rest(false), move |name| {
            failures += 1;
            let fails = name == call && fails.load(Ordering::Relaxed) && failures % 3 == 0;
            if fails { fault } else { Fault::None }
        });
        let guests = [Guest::new(300), Guest::new(300)];
        let slots: Vec<_> = (0..)
            .zip(&guests)
            .map(|(vm, guest)| {
                fill(guest, |page| isolated(vm, page));
                add(&mut engine, guest)
            })
            .collect();
        pass(&mut engine);
        pass(&mut engine);
        taking_off.store(true, Ordering::Relaxed);
        engine.set_mode(slots[0], Mode::Off);
        take_off(&mut engine);
        for (vm, guest) in (0..).zip(&guests) {
            (0..300).for_each(|page| guest.check(page, isolated(vm, page)));
        }
        audit(&mut engine);
        taking_off.store(false, Ordering::Relaxed);
        engine.set_mode(slots[0], Mode::Full);
        pass(&mut engine);
        pass(&mut engine);
        assert_eq!(engine.statistics().pages_sharing, 75, "{call}");
        audit(&mut engine);
    }
}

/// A log that says whether it notes writes.
struct Noting(Arc<AtomicBool>, PageSet);

impl ChangeLog for Noting {
    fn collect(&mut self, written: &mut PageSet) -> io::Result<()> {
        assert!(self.0.load(Ordering::SeqCst), "asked while it notes nothing");
        written.words_mut().copy_from_slice(self.1.words());
        Ok(())
    }

    fn arm(&mut self, first: usize, words: &[u64]) -> io::Result<()> {
        pages_of(first, words).for_each(|page| {
            self.1.remove(page);
        });
        Ok(())
    }

    fn set_noting(&mut self, noting: bool) -> io::Result<()> {
        self.0.store(noting, Ordering::SeqCst);
        self.1.insert_range(0..PAGES);
        Ok(())
    }
}

#[test]
fn a_guest_that_does_not_share_does_not_pay_for_a_log_of_its_writes() {
    let noting = Arc::new(AtomicBool::new(true));
    let mut all = PageSet::new(PAGES);
    all.insert_range(0..PAGES);
    let guest = Guest::new(PAGES);
    fill(&guest, |page| 1 + u64::from(page % 7));
    let mut engine = engine(&following());
    let log = Box::new(Noting(Arc::clone(&noting), all));
    let slot = engine.add(guest.ram.clone(), Some(log), losses().1).unwrap();
    let mut clock = Clock::new();
    clock.intervals(&mut engine, 2);
    let alike = u64::from(PAGES - 7);
    assert_eq!(engine.statistics().pages_sharing, alike);
    engine.set_mode(slot, Mode::Zero);
    assert!(noting.load(Ordering::SeqCst), "pages of zeros are looked for");
    engine.set_mode(slot, Mode::Off);
    assert!(!noting.load(Ordering::SeqCst));
    clock.intervals(&mut engine, 2);
    assert_eq!(engine.statistics().pages_sharing, 0);
    engine.set_mode(slot, Mode::Full);
    assert!(noting.load(Ordering::SeqCst));
    clock.intervals(&mut engine, 2);
    assert_eq!(engine.statistics().pages_sharing, alike);
}
