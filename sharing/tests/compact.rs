//! A frame store that has become mostly holes is repaired while guests go on.

#![expect(unsafe_code, reason = "plays guests whose pages differ in a word")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::followed::{Clock, Vm, following};
use common::{Fault, audit, engine, faulty_engine};
use samepage_sharing::engine::{Engine, Settings};

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

/// CPU time of this thread: what others take from it does not count.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one struct that is ours.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Writes the first word of a page alone, which is enough to tell it from others.
fn mark(vm: &Vm, page: u32, word: u64) {
    // SAFETY: the page is reserved, writable and written by this thread alone.
    unsafe { vm.guest.ram.range(page, 1).page(0).cast::<u64>().cast_mut().write_volatile(word) };
    vm.told.0.lock().insert(page);
}

#[test]
fn a_large_store_is_compacted_in_short_steps() {
    const MANY: u32 = 100_000;
    let pages: u32 = std::env::var("SAMEPAGE_TEST_COMPACT_PAGES").map_or(MANY, |text| text.parse().unwrap());
    let mut engine = engine(&Settings { shortest_mapping: 1, ..following() });
    let vms: Vec<_> = (0..2).map(|_| Vm::start(&mut engine, pages)).collect();
    let mut clock = Clock::new();
    vms.iter().for_each(|vm| (0..pages).for_each(|page| mark(vm, page, alike(page))));
    clock.intervals(&mut engine, 2);
    assert_eq!(engine.statistics().frames, u64::from(pages));
    // Single pages stay, and runs of eight at the end.
    let tail = pages / 10 * 9;
    let stays = |page: u32| if page < tail { page.is_multiple_of(16) } else { page % 24 < 8 };
    for (number, vm) in (0..).zip(&vms) {
        (0..pages).filter(|&page| !stays(page)).for_each(|page| mark(vm, page, own(number, page)));
    }
    let holes = |engine: &Engine| {
        let statistics = engine.statistics();
        statistics.frame_places > 8192 + 2 * statistics.frames
    };
    while !holes(&engine) {
        clock.tick(&mut engine);
    }
    let now = Instant::now() + Duration::from_secs(3600);
    let (mut longest, mut steps) = (Duration::ZERO, 0);
    loop {
        let before = cpu_time();
        let any = engine.compact_step(now);
        longest = longest.max(cpu_time() - before);
        steps += 1;
        if !any {
            break;
        }
    }
    let statistics = engine.statistics();
    println!("{pages} pages, {} frames: {steps} steps, the longest {longest:?}", statistics.frames);
    assert!(statistics.compactions > 1 && steps > 100, "{steps} steps, {statistics:?}");
    // A window that is under way is ended, and this build is slow.
    assert!(longest < Duration::from_millis(10), "a step of {longest:?}");
    for (number, vm) in (0..).zip(&vms) {
        for page in 0..pages {
            // SAFETY: as in `mark`.
            let found = unsafe { vm.guest.ram.range(page, 1).page(0).cast::<u64>().read_volatile() };
            assert_eq!(found, if stays(page) { alike(page) } else { own(number, page) }, "page {page}");
        }
    }
    audit(&mut engine);
}
