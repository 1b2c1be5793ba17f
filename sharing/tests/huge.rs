//! Huge pages: hot ones stay whole, cold ones with enough duplicates are split, and what guests wrote
//! stays what it is. Where the host has no huge pages to give, the contents alone are checked.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use common::followed::{Clock, Vm, following};
use common::{Fault, Guest, Numbers, audit, engine, faulty_engine, losses, no_rest, pass};
use samepage_sharing::engine::{Engine, Mode};
use samepage_sharing::pagemap::{Entry, Pagemap};
use samepage_sharing::ram::HUGE_PAGES;
use samepage_sharing::statistics::VmStatistics;

/// Longer than it takes for a huge page to become cold and its pages to be looked at, even if the kernel
/// makes a huge page of them again meanwhile.
const LONG: u32 = 64;

fn start(engine: &mut Engine, pages: u32) -> Vm {
    Vm::start_guest(engine, Guest::huge(pages))
}

/// A content of its own for each page of each VM.
fn own(vm: &Vm, page: u32) -> u64 {
    (vm.slot.index() as u64 + 1) << 32 | u64::from(page)
}

fn alike(page: u32) -> u64 {
    1 + u64::from(page)
}

/// Fills the first `count` pages of each range alike in all VMs.
fn fill(vm: &Vm, count: u32) {
    for page in 0..vm.guest.ram.pages() {
        vm.write(page, if page % HUGE_PAGES < count { alike(page) } else { own(vm, page) });
    }
}

fn check(vm: &Vm, count: u32) {
    for page in 0..vm.guest.ram.pages() {
        vm.guest.check(page, if page % HUGE_PAGES < count { alike(page) } else { own(vm, page) });
    }
}

fn statistics(engine: &Engine, vm: &Vm) -> VmStatistics {
    engine.vm_statistics(vm.slot).unwrap().unwrap()
}

/// Whether the host backs all of these VMs' full ranges with huge pages.
fn huge(engine: &Engine, vms: &[Vm]) -> bool {
    let all = vms
        .iter()
        .all(|vm| statistics(engine, vm).huge_whole == u64::from(vm.guest.ram.pages() / HUGE_PAGES));
    if !all {
        eprintln!("this host has no huge pages to give: the contents alone are checked");
    }
    all
}

/// How many private pages of a VM are parts of larger ones for the kernel, whatever they are mapped
/// as: of those none becomes free alone. `None` where that cannot be known.
fn parts_of_larger_pages(guest: &Guest) -> Option<usize> {
    const COMPOUND: u64 = 1 << 15 | 1 << 16;
    let flags = File::open("/proc/kpageflags").ok()?;
    let mut entries = vec![Entry::default(); guest.ram.pages() as usize];
    Pagemap::open().unwrap().read(guest.ram.base().as_ptr().addr(), &mut entries).unwrap();
    let mut parts = 0;
    for entry in entries.iter().filter(|entry| entry.private()) {
        let mut word = [0; 8];
        flags.read_exact_at(&mut word, Some(entry.physical()).filter(|&number| number != 0)? * 8).ok()?;
        parts += usize::from(u64::from_ne_bytes(word) & COMPOUND != 0);
    }
    Some(parts)
}

#[test]
fn a_cold_range_with_many_duplicates_is_split_and_its_memory_is_free() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| start(&mut engine, HUGE_PAGES)).collect();
    let mut clock = Clock::new();
    vms.iter().for_each(|vm| fill(vm, 200));
    let there = huge(&engine, &vms);
    clock.intervals(&mut engine, 4);
    if there {
        assert_eq!(engine.statistics().merges, 0, "not cold yet");
        let parts = parts_of_larger_pages(&vms[0].guest);
        assert!(parts.is_none_or(|parts| parts == HUGE_PAGES as usize), "{parts:?}");
    }
    clock.intervals(&mut engine, LONG);
    let now = engine.statistics();
    assert_eq!((now.pages_sharing, now.merges, now.refusals), (200, 400, 0), "{now:?}");
    for vm in &vms {
        let now = statistics(&engine, vm);
        assert_eq!((now.huge_whole, now.pages_private), (0, u64::from(HUGE_PAGES) - 200));
        assert!(now.huge_split >= u64::from(there));
        let parts = parts_of_larger_pages(&vm.guest);
        assert!(parts.is_none_or(|parts| parts == 0), "{parts:?} pages are kept by others");
        check(vm, 200);
    }
    audit(&mut engine);
}

#[test]
fn a_range_with_few_duplicates_stays_whole() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| start(&mut engine, 2 * HUGE_PAGES)).collect();
    let mut clock = Clock::new();
    vms.iter().for_each(|vm| fill(vm, 20));
    let there = huge(&engine, &vms);
    clock.intervals(&mut engine, 2 * LONG);
    let now = engine.statistics();
    if there {
        assert!(huge(&engine, &vms));
        assert_eq!((now.merges, now.huge_split), (0, 0));
        // All is known, and nothing is looked at again.
        clock.intervals(&mut engine, 3 * LONG);
        assert_eq!(engine.statistics().pages_scanned, now.pages_scanned);
    }
    vms.iter().for_each(|vm| check(vm, 20));
    audit(&mut engine);
}

#[test]
fn a_hot_range_stays_whole_until_it_is_cold() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| start(&mut engine, 2 * HUGE_PAGES)).collect();
    let mut clock = Clock::new();
    vms.iter().for_each(|vm| fill(vm, HUGE_PAGES));
    let there = huge(&engine, &vms);
    for round in 0..2 * u64::from(LONG) {
        vms.iter().for_each(|vm| vm.write(100, 1 << 40 | round));
        clock.end_interval(&mut engine);
    }
    if there {
        for vm in &vms {
            let now = statistics(&engine, vm);
            assert_eq!((now.huge_whole, now.pages_merged), (1, 512), "{now:?}");
        }
    }
    vms.iter().for_each(|vm| vm.write(100, alike(100)));
    clock.intervals(&mut engine, 300);
    let now = engine.statistics();
    assert_eq!(now.pages_sharing, u64::from(2 * HUGE_PAGES), "{now:?}");
    vms.iter().for_each(|vm| check(vm, HUGE_PAGES));
    audit(&mut engine);
}

#[test]
fn a_range_that_changed_once_becomes_cold_again() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| start(&mut engine, HUGE_PAGES)).collect();
    let mut clock = Clock::new();
    vms.iter().for_each(|vm| fill(vm, 20));
    clock.intervals(&mut engine, 4);
    vms.iter().for_each(|vm| fill(vm, 300));
    clock.intervals(&mut engine, LONG);
    let now = engine.statistics();
    assert_eq!(now.pages_sharing, 300, "{now:?}");
    vms.iter().for_each(|vm| check(vm, 300));
    audit(&mut engine);
}

#[test]
fn equal_pages_of_huge_pages_are_represented_by_a_few() {
    const PAGES: u32 = 4 * HUGE_PAGES;
    let mut engine = engine(&following());
    let vm = start(&mut engine, PAGES);
    let mut clock = Clock::new();
    (0..PAGES).for_each(|page| vm.write(page, 7));
    let there = huge(&engine, std::slice::from_ref(&vm));
    clock.intervals(&mut engine, 4);
    let now = engine.statistics();
    if there {
        // Each that is entered was in the way of all that came after.
        assert!((1..=4).contains(&now.pages_unshared), "{now:?}");
        assert!(now.comparisons <= 2 * u64::from(PAGES), "{now:?}");
    }
    // All of them have their like all the same.
    clock.intervals(&mut engine, LONG);
    let now = engine.statistics();
    assert!(now.pages_sharing >= u64::from(PAGES - PAGES / 4), "{now:?}");
    (0..PAGES).for_each(|page| vm.guest.check(page, 7));
    audit(&mut engine);
}

#[test]
fn what_a_huge_page_brought_along_is_given_back() {
    for mode in [Mode::Full, Mode::Zero] {
        let mut engine = engine(&following());
        let vm = start(&mut engine, 3 * HUGE_PAGES + 7);
        engine.set_mode(vm.slot, mode);
        let mut clock = Clock::new();
        for range in 0..3 {
            vm.write(range * HUGE_PAGES, own(&vm, range));
        }
        clock.intervals(&mut engine, LONG);
        assert_eq!(statistics(&engine, &vm).pages_private, 3);
        (0..3).for_each(|range| vm.guest.check(range * HUGE_PAGES, own(&vm, range)));
        audit(&mut engine);
    }
}

#[test]
fn small_pages_find_each_other_beside_a_huge_page_of_their_content() {
    let mut engine = engine(&following());
    let whole = [start(&mut engine, HUGE_PAGES)];
    let small: Vec<_> = (0..3).map(|_| Vm::start(&mut engine, HUGE_PAGES)).collect();
    let mut clock = Clock::new();
    fill(&whole[0], 100);
    let there = huge(&engine, &whole);
    clock.intervals(&mut engine, 2);
    small.iter().for_each(|vm| fill(vm, 100));
    clock.intervals(&mut engine, LONG);
    let now = engine.statistics();
    assert_eq!(now.pages_sharing, if there { 200 } else { 300 }, "{now:?}");
    if there {
        assert!(huge(&engine, &whole), "too few duplicates to split it for");
    }
    whole.iter().chain(&small).for_each(|vm| check(vm, 100));
    audit(&mut engine);
}

#[test]
fn where_the_kernel_gave_small_pages_nothing_is_waited_for() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2)
        .map(|_| {
            let guest = Guest::new(HUGE_PAGES);
            (0..HUGE_PAGES).for_each(|page| guest.write(page, alike(page)));
            guest.ram.use_huge_pages().unwrap();
            Vm::start_guest(&mut engine, guest)
        })
        .collect();
    let mut clock = Clock::new();
    clock.intervals(&mut engine, 3);
    let now = engine.statistics();
    assert_eq!((now.pages_sharing, now.huge_split), (u64::from(HUGE_PAGES), 0));
    vms.iter().for_each(|vm| check(vm, HUGE_PAGES));
    audit(&mut engine);
}

#[test]
fn modes_change_and_vms_go() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| start(&mut engine, 2 * HUGE_PAGES)).collect();
    let mut clock = Clock::new();
    vms.iter().for_each(|vm| fill(vm, 300));
    for mode in [Mode::Zero, Mode::Off, Mode::Full, Mode::Off, Mode::Full] {
        engine.set_mode(vms[0].slot, mode);
        clock.intervals(&mut engine, LONG);
        vms.iter().for_each(|vm| check(vm, 300));
        audit(&mut engine);
    }
    assert_eq!(engine.statistics().pages_sharing, 600);
    engine.remove(vms[0].slot).unwrap();
    clock.intervals(&mut engine, 2);
    check(&vms[1], 300);
    audit(&mut engine);
    engine.remove(vms[1].slot).unwrap();
    assert_eq!(engine.statistics().pages_unshared, 0);
}

#[test]
fn a_split_that_is_refused_costs_nothing() {
    let plan = |call| if call == "split" { Fault::Refuse } else { Fault::None };
    let mut engine = faulty_engine(&following(), plan);
    let vms: Vec<_> = (0..2).map(|_| start(&mut engine, HUGE_PAGES)).collect();
    let mut clock = Clock::new();
    vms.iter().for_each(|vm| fill(vm, 400));
    let there = huge(&engine, &vms);
    clock.intervals(&mut engine, 2 * LONG);
    let now = engine.statistics();
    if there {
        assert_eq!((now.merges, now.huge_split), (0, 0));
        assert!((2..20).contains(&now.refusals), "{now:?}");
        assert!(huge(&engine, &vms));
    }
    vms.iter().for_each(|vm| check(vm, 400));
    audit(&mut engine);
}

#[test]
fn no_write_is_lost_while_huge_pages_are_split() {
    const PAGES: u32 = 4 * HUGE_PAGES;
    const WRITES: u64 = 40_000;
    for settle in [true, false] {
        let mut engine = engine(&no_rest(settle));
        let guests: Vec<_> = (0..2).map(|_| Guest::huge(PAGES)).collect();
        let slots: Vec<_> = guests
            .iter()
            .map(|guest| {
                (0..PAGES).for_each(|page| guest.write(page, alike(page)));
                engine.add(guest.ram.clone(), None, losses().1).unwrap()
            })
            .collect();
        let written = AtomicBool::new(false);
        let models: Vec<Vec<u64>> = std::thread::scope(|scope| {
            let writers: Vec<_> = (1..)
                .zip(&guests)
                .map(|(number, guest)| {
                    let done = &written;
                    scope.spawn(move || {
                        let mut numbers = Numbers(number);
                        let mut model: Vec<_> = (0..PAGES).map(alike).collect();
                        for write in 0..WRITES {
                            // One range after the other is hot; the others cool down.
                            let range = write * 8 / WRITES % 4 * u64::from(HUGE_PAGES);
                            let page = (range + numbers.below(HUGE_PAGES.into())) as u32;
                            let seed = if numbers.below(4) > 0 { alike(page) } else { number << 40 | write };
                            guest.check(page, model[page as usize]);
                            guest.write(page, seed);
                            model[page as usize] = seed;
                        }
                        done.store(true, Ordering::Release);
                        model
                    })
                })
                .collect();
            while !written.load(Ordering::Acquire) {
                pass(&mut engine);
                while engine.split_step() {}
            }
            writers.into_iter().map(|writer| writer.join().unwrap()).collect()
        });
        for _ in 0..2 * LONG {
            pass(&mut engine);
            while engine.split_step() {}
        }
        for (guest, model) in guests.iter().zip(&models) {
            (0..PAGES).for_each(|page| guest.check(page, model[page as usize]));
        }
        let now = engine.statistics();
        assert!(now.pages_sharing > u64::from(HUGE_PAGES), "{now:?}");
        assert_eq!(now.refusals, 0);
        audit(&mut engine);
        assert_eq!(engine.vm_statistics(slots[0]).unwrap().unwrap().huge_whole, 0);
    }
}

#[test]
fn the_books_stay_small_when_huge_pages_are_split() {
    const PAGES: u32 = 64 * HUGE_PAGES;
    // How full the tables are depends on the random key of the digests, by a hundredth.
    const MOST: f64 = 16.2;
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| start(&mut engine, PAGES)).collect();
    let mut clock = Clock::new();
    let bytes_a_page = |engine: &Engine| engine.statistics().metadata_bytes as f64 / f64::from(2 * PAGES);
    vms.iter().for_each(|vm| fill(vm, 130));
    clock.intervals(&mut engine, 4);
    assert!(bytes_a_page(&engine) <= MOST, "{} bytes", bytes_a_page(&engine));
    clock.intervals(&mut engine, LONG);
    assert_eq!(engine.statistics().pages_sharing, 130 * 64);
    assert!(bytes_a_page(&engine) <= MOST, "{} bytes", bytes_a_page(&engine));
}
