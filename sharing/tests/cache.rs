//! Disk blocks in memory once: delivered from who holds them, kept when nobody does.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::disks::Disk;
use common::followed::{Clock, Vm, following};
use common::{Fault, Numbers, audit, engine, faulty_engine, losses};
use samepage_sharing::blocks::{BlockRead, CacheSize, Image, Keep};
use samepage_sharing::engine::{Engine, Mode, Settings};
use samepage_sharing::service::{Fetched, Membership, Sharing, SharingSpec};

const PAGES: u32 = 512;

fn settings(blocks: u64) -> Settings {
    Settings { block_cache: CacheSize::Bytes(blocks * 4096), ..following() }
}

fn check(vm: &Vm, disk: &Disk, first: u64, page: u32, count: u32) {
    (0..count).for_each(|index| vm.guest.check(page + index, disk.seed(first + u64::from(index))));
}

#[test]
fn a_second_vm_reads_what_the_first_holds_from_its_memory() {
    let mut engine = engine(&settings(1000));
    let vms = [Vm::start(&mut engine, PAGES), Vm::start(&mut engine, PAGES)];
    let mut disk = Disk::new(1, Keep::Exclusive);
    // A run that is mapped, and pages here and there that are copied.
    disk.read(&mut engine, &vms[0], 100, 10, 64);
    let scattered: Vec<_> = (0..10).map(|page| Some(200 + 2 * page)).collect();
    disk.read_to(&mut engine, &vms[0], 500, scattered.clone());
    assert_eq!(disk.reads, 74);
    let statistics = engine.cache_statistics();
    assert_eq!((statistics.delivered_mapped, statistics.delivered_copied), (64, 10));
    assert_eq!((statistics.blocks_cached, statistics.blocks_in_guests, statistics.blocks_noted), (0, 64, 10));

    let plan = disk.read(&mut engine, &vms[1], 100, 300, 64);
    assert_eq!((plan.from_guests, plan.from_host, disk.reads), (64, 0, 74));
    let plan = disk.read_to(&mut engine, &vms[1], 500, scattered);
    assert_eq!((plan.from_guests, plan.from_host, disk.reads), (10, 0, 74));
    assert_eq!(engine.statistics().pages_sharing, 64, "shared at once, without a search");
    check(&vms[0], &disk, 100, 10, 64);
    check(&vms[1], &disk, 100, 300, 64);
    (0..10).for_each(|page| vms[1].guest.check(200 + 2 * page, disk.seed(500 + u64::from(page))));
    audit(&mut engine);
    // Copies are merged in their own time, and the frames know what they hold.
    Clock::new().intervals(&mut engine, 3);
    assert_eq!(engine.statistics().pages_sharing, 74);
    assert_eq!(engine.cache_statistics().blocks_in_guests, 74);
    audit(&mut engine);
}

#[test]
fn a_block_that_its_last_guest_leaves_stays_until_it_is_wanted_again() {
    let mut engine = engine(&settings(1000));
    let vm = Vm::start(&mut engine, PAGES);
    let mut disk = Disk::new(1, Keep::Exclusive);
    let mut clock = Clock::new();
    disk.read(&mut engine, &vm, 0, 0, 100);
    clock.intervals(&mut engine, 2);
    // The guest clears some pages for another use, and reads other blocks over some.
    (0..30).for_each(|page| vm.write(page, 7 << 40));
    clock.intervals(&mut engine, 1);
    assert_eq!(engine.cache_statistics().blocks_cached, 30);
    disk.read(&mut engine, &vm, 1000, 50, 20);
    let statistics = engine.cache_statistics();
    assert_eq!((statistics.blocks_cached, statistics.demoted_mapped, disk.reads), (50, 50, 120));
    audit(&mut engine);
    let plan = disk.read(&mut engine, &vm, 0, 200, 30);
    assert_eq!((plan.from_host, disk.reads), (30, 120));
    assert_eq!(engine.cache_statistics().blocks_cached, 20, "what a guest holds the host does not");
    check(&vm, &disk, 0, 200, 30);
    let plan = disk.read(&mut engine, &vm, 50, 300, 20);
    assert_eq!((plan.from_host, disk.reads), (20, 120));
    assert_eq!(engine.cache_statistics().blocks_cached, 0);
    check(&vm, &disk, 50, 300, 20);
    check(&vm, &disk, 1000, 50, 20);
    audit(&mut engine);
}

#[test]
fn a_page_that_a_block_was_copied_to_has_to_prove_that_it_still_holds_it() {
    let mut engine = engine(&settings(1000));
    let vms = [Vm::start(&mut engine, PAGES), Vm::start(&mut engine, PAGES)];
    let mut disk = Disk::new(1, Keep::Exclusive);
    let scattered: Vec<_> = (0..20).map(|page| Some(3 * page)).collect();
    disk.read_to(&mut engine, &vms[0], 0, scattered.clone());
    // The guest lies about some, and clears others.
    (0..5).for_each(|page| vms[0].write(3 * page, 9 << 40));
    (5..10).for_each(|page| vms[0].write(3 * page, 0));
    disk.read_to(&mut engine, &vms[0], 100, scattered.clone());
    let statistics = engine.cache_statistics();
    assert_eq!((statistics.demoted_copied, statistics.refuted, statistics.blocks_cached), (10, 10, 10));
    audit(&mut engine);
    let plan = disk.read(&mut engine, &vms[1], 0, 0, 20);
    assert_eq!((plan.from_host, disk.reads), (10, 50));
    check(&vms[1], &disk, 0, 0, 20);
    // Another VM's page must prove it as well.
    vms[0].write(0, 11 << 40);
    let plan = disk.read(&mut engine, &vms[1], 100, 100, 20);
    assert_eq!((plan.from_guests, disk.reads), (19, 51));
    check(&vms[1], &disk, 100, 100, 20);
    audit(&mut engine);
}

#[test]
fn a_discard_of_much_is_told_in_parts_and_counts_at_once() {
    const BLOCKS: u32 = 3000;
    let mut engine = engine(&settings(10_000));
    let vm = Vm::start(&mut engine, BLOCKS + 100);
    let mut disk = Disk::new(1, Keep::Exclusive);
    for first in (0..BLOCKS).step_by(100) {
        disk.read(&mut engine, &vm, first.into(), first, 100);
    }
    let known = |engine: &Engine| {
        let statistics = engine.cache_statistics();
        statistics.blocks_cached + statistics.blocks_in_guests + statistics.blocks_noted
    };
    assert_eq!(known(&engine), u64::from(BLOCKS));
    let discarded = 100..1 << 40;
    let mut rest = engine.announce_write(disk.image, &discarded);
    assert_eq!(known(&engine), u64::from(BLOCKS), "nothing was gone over");
    let before = disk.reads;
    disk.read(&mut engine, &vm, 2900, BLOCKS, 100);
    assert_eq!(disk.reads - before, 100, "none of the blocks is served any more");
    let mut left = known(&engine);
    while engine.forget_next(&mut rest) {
        assert!(left - known(&engine) <= 512, "{} blocks at once", left - known(&engine));
        left = known(&engine);
    }
    assert_eq!(known(&engine), 100, "those before the first that is discarded");
    engine.end_write(disk.image, &discarded);
    audit(&mut engine);
}

#[test]
fn a_write_takes_the_block_away_from_all_who_could_serve_it() {
    let mut engine = engine(&settings(1000));
    let vms = [Vm::start(&mut engine, PAGES), Vm::start(&mut engine, PAGES)];
    let mut disk = Disk::new(1, Keep::Exclusive);
    let mut clock = Clock::new();
    disk.read(&mut engine, &vms[0], 0, 0, 16);
    disk.read_to(&mut engine, &vms[0], 16, vec![Some(100), Some(102), Some(104)]);
    disk.read_to(&mut engine, &vms[1], 16, vec![Some(100), Some(102), Some(104)]);
    disk.read(&mut engine, &vms[0], 32, 32, 16);
    clock.intervals(&mut engine, 2);
    (32..48).for_each(|page| vms[0].write(page, 5 << 40));
    clock.intervals(&mut engine, 1);
    assert_eq!(engine.cache_statistics().blocks_cached, 16);
    let reads = disk.reads;
    for block in [3, 17, 40] {
        disk.write(&mut engine, block, 77 << 40 | block);
        disk.read(&mut engine, &vms[1], block, 200, 1);
        vms[1].guest.check(200, disk.seed(block));
    }
    assert_eq!(disk.reads, reads + 3);
    // The guests' pages are as they were.
    vms[0].guest.check(3, (1 << 32) + 4);
    vms[0].guest.check(102, (1 << 32) + 18);
    audit(&mut engine);
    engine.begin_write(disk.image, &(0..1 << 40));
    engine.end_write(disk.image, &(0..1 << 40));
    let statistics = engine.cache_statistics();
    assert_eq!((statistics.blocks_cached, statistics.blocks_in_guests, statistics.blocks_noted), (0, 0, 0));
    audit(&mut engine);
}

#[test]
fn what_is_read_while_it_is_written_is_not_kept() {
    let mut engine = engine(&settings(1000));
    let vm = Vm::start(&mut engine, PAGES);
    let mut disk = Disk::new(1, Keep::Exclusive);
    let reading = disk.begin(&mut engine, &vm, 0, (0..32).map(Some).collect());
    disk.write(&mut engine, 7, 5 << 40);
    disk.end(&mut engine, &vm, reading, true);
    vm.guest.check(7, (1 << 32) + 8);
    let plan = disk.read(&mut engine, &vm, 7, 100, 1);
    assert_eq!((plan.fetches.len(), plan.from_guests), (1, 0));
    vm.guest.check(100, 5 << 40);

    // And the other way round: the write began first.
    engine.begin_write(disk.image, &(10..11));
    let plan = disk.read(&mut engine, &vm, 8, 200, 5);
    assert_eq!((plan.from_guests, plan.fetches.len()), (4, 1));
    vm.guest.check(202, (1 << 32) + 11);
    disk.set(10, 6 << 40);
    engine.end_write(disk.image, &(10..11));
    disk.read(&mut engine, &vm, 10, 300, 1);
    vm.guest.check(300, 6 << 40);
    audit(&mut engine);
}

#[test]
fn fetches_that_fail_or_outlive_their_vm_leave_nothing() {
    let mut engine = engine(&settings(1000));
    let vms = [Vm::start(&mut engine, PAGES), Vm::start(&mut engine, PAGES)];
    let mut disk = Disk::new(1, Keep::Exclusive);
    let failed = disk.begin(&mut engine, &vms[0], 0, (0..32).map(Some).collect());
    disk.end(&mut engine, &vms[0], failed, false);
    vms[0].guest.check(0, 0);
    let late = disk.begin(&mut engine, &vms[1], 0, (0..32).map(Some).collect());
    engine.remove(vms[1].slot).unwrap();
    // Another VM has its slot by now.
    let third = Vm::start(&mut engine, PAGES);
    assert_eq!(third.slot, vms[1].slot);
    disk.end(&mut engine, &vms[1], late, true);
    third.guest.check(0, 0);
    assert_eq!((engine.statistics().frames, engine.cache_statistics().blocks_cached), (0, 0));
    audit(&mut engine);
}

#[test]
fn a_vm_that_has_gone_leaves_its_blocks_to_the_host() {
    let mut engine = engine(&settings(1000));
    let vm = Vm::start(&mut engine, PAGES);
    let mut disk = Disk::new(1, Keep::Exclusive);
    disk.read(&mut engine, &vm, 0, 0, 200);
    engine.remove(vm.slot).unwrap();
    assert_eq!(engine.cache_statistics().blocks_cached, 200);
    let next = Vm::start(&mut engine, PAGES);
    let plan = disk.read(&mut engine, &next, 0, 100, 200);
    assert_eq!((plan.from_host, disk.reads), (200, 200));
    check(&next, &disk, 0, 100, 200);
    audit(&mut engine);
}

#[test]
fn the_cache_keeps_its_size() {
    let mut engine = engine(&settings(64));
    let vm = Vm::start(&mut engine, PAGES);
    let mut disk = Disk::new(1, Keep::Exclusive);
    for round in 0..20 {
        disk.read(&mut engine, &vm, round * 128, 0, 128);
        assert!(engine.cache_statistics().blocks_cached <= 64);
    }
    let statistics = engine.cache_statistics();
    assert_eq!((statistics.blocks_cached, statistics.evicted), (64, 19 * 128 - 64));
    assert_eq!(engine.statistics().frames, 64 + 128);
    audit(&mut engine);

    let mut none = common::engine(&settings(0));
    let vm = Vm::start(&mut none, PAGES);
    for round in 0..5 {
        disk.read(&mut none, &vm, round * 128, 0, 128);
        assert_eq!(none.cache_statistics().blocks_cached, 0);
    }
    audit(&mut none);
}

#[test]
fn a_cache_that_is_made_smaller_drops_what_is_too_much_though_no_vm_is_left() {
    let sharing = Sharing::start(settings(5000)).unwrap();
    let guest = common::Guest::new(4000);
    let membership = sharing.add(guest.ram.clone(), None, &SharingSpec::default(), losses().1).unwrap();
    let blocks = membership.blocks();
    let targets: Vec<_> = (0..4000).map(Some).collect();
    let read = BlockRead { keep: Keep::Exclusive, image: Image([1; 4]), first: 0, targets: &targets };
    for fetch in blocks.begin_read(&read, |_, _| {}).fetches {
        common::disks::land(&fetch);
        assert_eq!(blocks.end_fetch(fetch.token, true, |_, _| {}), Fetched::Delivered);
    }
    drop(membership);
    assert_eq!(sharing.cache().blocks_cached, 4000);
    sharing.set_cache_size(CacheSize::Bytes(100 * 4096));
    assert_eq!(sharing.cache().blocks_cached, 100);
    sharing.set_cache_size(CacheSize::Bytes(0));
    assert_eq!(sharing.statistics().frames, 0);
}

#[test]
fn what_one_group_reads_evicts_nothing_of_another() {
    let sharing = Sharing::start(settings(100)).unwrap();
    let join = |group: &str| {
        let guest = common::Guest::new(1000);
        let participation = SharingSpec { group: group.to_owned(), ..SharingSpec::default() };
        sharing.add(guest.ram, None, &participation, losses().1).unwrap()
    };
    let [watcher, reader] = ["watcher", "reader"].map(join);
    let read = |membership: &Membership, first: u64, count: usize| {
        let blocks = membership.blocks();
        let read =
            BlockRead { keep: Keep::Inclusive, image: Image([1; 4]), first, targets: &vec![None; count] };
        let plan = blocks.begin_read(&read, |_, _| {});
        for fetch in plan.fetches {
            common::disks::land(&fetch);
            assert_eq!(blocks.end_fetch(fetch.token, true, |_, _| {}), Fetched::Delivered);
        }
        plan.from_host
    };
    read(&watcher, 0, 40);
    for round in 0..20 {
        read(&reader, 100 * round, 100);
    }
    assert_eq!(read(&watcher, 0, 40), 40, "it can tell that somebody reads");
    assert_eq!(sharing.cache().blocks_cached, 90, "the reader has its half");
    // A group that is gone leaves its share to the others.
    drop(reader);
    read(&watcher, 0, 90);
    assert_eq!(read(&watcher, 0, 90), 90);
}

#[test]
fn inclusive_and_scrubbed_blocks_stay_with_the_host() {
    for (keep, cached) in [(Keep::Inclusive, 100), (Keep::Scrub, 0)] {
        let mut engine = engine(&settings(1000));
        let vm = Vm::start(&mut engine, PAGES);
        let mut disk = Disk::new(1, keep);
        disk.read(&mut engine, &vm, 0, 0, 100);
        let plan = disk.read(&mut engine, &vm, 0, 200, 100);
        assert_eq!((plan.from_host, disk.reads), (100, 100), "{keep:?}");
        assert_eq!(engine.cache_statistics().blocks_cached, 100, "{keep:?}");
        let mut clock = Clock::new();
        clock.intervals(&mut engine, 3);
        assert_eq!(engine.cache_statistics().blocks_cached, cached, "{keep:?}");
        check(&vm, &disk, 0, 0, 100);
        check(&vm, &disk, 0, 200, 100);
        (0..100).chain(200..300).for_each(|page| vm.write(page, 3 << 40));
        clock.intervals(&mut engine, 2);
        assert_eq!(engine.cache_statistics().blocks_cached, cached, "{keep:?}");
        audit(&mut engine);
    }
}

#[test]
fn a_vm_that_does_not_share_gets_copies_and_gives_none_away() {
    let mut engine = engine(&settings(1000));
    let vms = [Vm::start(&mut engine, PAGES), Vm::start(&mut engine, PAGES)];
    engine.set_mode(vms[0].slot, Mode::Off);
    let mut disk = Disk::new(1, Keep::Exclusive);
    disk.read(&mut engine, &vms[0], 0, 0, 64);
    assert_eq!(engine.cache_statistics().delivered_copied, 64);
    let plan = disk.read(&mut engine, &vms[1], 0, 0, 64);
    assert_eq!((plan.from_guests, disk.reads), (0, 128));
    let plan = disk.read(&mut engine, &vms[0], 0, 100, 64);
    assert_eq!((plan.from_guests, disk.reads), (64, 128));
    check(&vms[0], &disk, 0, 0, 64);
    check(&vms[0], &disk, 0, 100, 64);
    assert_eq!(engine.vm_statistics(vms[0].slot).unwrap().unwrap().pages_merged, 0);
    audit(&mut engine);
}

#[test]
fn blocks_of_one_content_are_in_memory_once() {
    let mut engine = engine(&settings(1000));
    let vm = Vm::start(&mut engine, PAGES);
    let mut disk = Disk::new(1, Keep::Exclusive);
    (0..64).for_each(|block| disk.set(block, block % 8));
    disk.read(&mut engine, &vm, 0, 0, 64);
    check(&vm, &disk, 0, 0, 64);
    disk.read(&mut engine, &vm, 0, 100, 64);
    check(&vm, &disk, 0, 100, 64);
    (0..164).for_each(|page| vm.write(page, 3 << 40));
    Clock::new().intervals(&mut engine, 3);
    check_twice(&mut engine, &mut disk, &vm);
    audit(&mut engine);
}

fn check_twice(engine: &mut Engine, disk: &mut Disk, vm: &Vm) {
    for _ in 0..2 {
        disk.read(engine, vm, 0, 200, 64);
        check(vm, disk, 0, 200, 64);
    }
}

/// All that can happen, in any order, with refused calls or without: each read has the disk's content.
fn at_random(seed: u64, faults: bool) {
    let mut luck = Numbers(seed);
    let calm = Arc::new(AtomicBool::new(true));
    let now = Arc::clone(&calm);
    let refuse = move |call: &str| {
        // Where these two fail memory is lost, and with it the VM.
        let harmless = call != "map again" && call != "unprotect";
        let refused = faults && harmless && !now.load(Ordering::Relaxed) && luck.below(20) == 0;
        if refused { Fault::Refuse } else { Fault::None }
    };
    let mut engine = faulty_engine(&settings(150), refuse);
    let mut numbers = Numbers(seed ^ 0x5555);
    let keeps = [Keep::Exclusive, Keep::Exclusive, Keep::Scrub, Keep::Inclusive];
    let mut disks: Vec<_> = (1..).zip(keeps).map(|(number, keep)| Disk::new(number, keep)).collect();
    let mut vms: Vec<_> = (0..3).map(|_| Vm::start(&mut engine, PAGES)).collect();
    let mut clock = Clock::new();
    calm.store(false, Ordering::Relaxed);
    for step in 0..600_u64 {
        let vm = numbers.below(3) as usize;
        let which = numbers.below(4) as usize;
        let disk = &mut disks[which];
        let (first, count) = (numbers.below(300), 1 + numbers.below(40) as u32);
        let targets: Vec<_> = if numbers.below(2) == 0 {
            let page = numbers.below(u64::from(PAGES - count)) as u32;
            (page..page + count).map(Some).collect()
        } else {
            // Each page once: what a guest reads to one page twice at once is its own affair.
            let stride = 1 + numbers.below(4) as u32;
            (0..count).map(|index| Some((index * stride + 7) % PAGES)).collect()
        };
        match numbers.below(12) {
            0..5 => {
                let reading = disk.begin(&mut engine, &vms[vm], first, targets.clone());
                let written = (numbers.below(3) == 0).then(|| first + numbers.below(count.into()));
                if let Some(block) = written {
                    disk.write(&mut engine, block, 1 << 50 | step);
                }
                if numbers.below(3) == 0 {
                    clock.end_interval(&mut engine);
                }
                disk.end(&mut engine, &vms[vm], reading, true);
                for (block, page) in (first..).zip(targets.into_iter().flatten()) {
                    if written != Some(block) {
                        vms[vm].guest.check(page, disk.seed(block));
                    }
                }
            }
            5 => disk.write(&mut engine, first, 1 << 51 | step),
            6 => (0..count).for_each(|page| vms[vm].write(page * 3, numbers.below(4) << 48)),
            7 => {
                let mode = [Mode::Full, Mode::Zero, Mode::Off][numbers.below(3) as usize];
                engine.set_mode(vms[vm].slot, mode);
            }
            8 if numbers.below(5) == 0 => {
                let removed = engine.remove(vms[vm].slot);
                calm.store(true, Ordering::Relaxed);
                // What was refused is begun again.
                removed.or_else(|_| engine.remove(vms[vm].slot)).unwrap();
                vms[vm] = Vm::start(&mut engine, PAGES);
                calm.store(false, Ordering::Relaxed);
            }
            9 => {
                let reading = disk.begin(&mut engine, &vms[vm], first, targets);
                disk.end(&mut engine, &vms[vm], reading, false);
            }
            _ => clock.intervals(&mut engine, 2),
        }
        if step % 100 == 99 {
            audit(&mut engine);
        }
    }
}

#[test]
fn every_read_has_the_content_of_the_disk() {
    (1..9).for_each(|seed| at_random(seed, false));
}

#[test]
fn every_read_has_the_content_of_the_disk_when_calls_are_refused() {
    (1..9).for_each(|seed| at_random(seed << 8, true));
}

/// A guest writes to its pages without pause: while blocks are read into them, while they are given up, and
/// while another guest reads the same blocks. It may spoil what it has itself, and nothing else.
fn beside_a_writer(keep: Keep, seed: u64) {
    let mut engine = engine(&settings(200));
    let [writer, reader] = [Vm::start(&mut engine, PAGES), Vm::start(&mut engine, PAGES)];
    let mut disk = Disk::new(1, keep);
    let mut clock = Clock::new();
    let stop = AtomicBool::new(false);
    let (mut checked, mut spared) = (0, 0);
    std::thread::scope(|scope| {
        let handle = scope.spawn(|| {
            let mut numbers = Numbers(seed ^ 0x7777);
            while !stop.load(Ordering::Relaxed) {
                let page = numbers.below(u64::from(PAGES)) as u32;
                // Often what other blocks hold: a page that pretends to be one.
                writer.write(
                    page,
                    [numbers.below(8) << 40, (1 << 32) + 1 + numbers.below(300)][page as usize % 2],
                );
            }
        });
        let mut numbers = Numbers(seed);
        for step in 0..400_u64 {
            let (first, count) = (numbers.below(300), 1 + numbers.below(40) as u32);
            let page = numbers.below(u64::from(PAGES - 4 * count)) as u32;
            let stride = [1, 3][numbers.below(2) as usize];
            let targets = |count: u32| (0..count).map(|index| Some(page + index * stride)).collect();
            if numbers.below(2) == 0 {
                let reading = disk.begin(&mut engine, &writer, first, targets(count));
                if step % 5 == 0 {
                    disk.write(&mut engine, first, 1 << 50 | step);
                }
                disk.end(&mut engine, &writer, reading, true);
            }
            let plan = disk.read_to(&mut engine, &reader, first, targets(count));
            spared += plan.from_guests + plan.from_host;
            for index in 0..count {
                reader.guest.check(page + index * stride, disk.seed(first + u64::from(index)));
                checked += 1;
            }
            if step % 4 == 0 {
                clock.end_interval(&mut engine);
            }
        }
        stop.store(true, Ordering::Relaxed);
        handle.join().expect("the writer");
    });
    assert!(checked > 4000 && spared > 100, "{checked} blocks checked, {spared} of them without the disk");
    audit(&mut engine);
}

#[test]
fn a_guest_that_never_stops_writing_gives_others_no_false_block() {
    for (seed, keep) in (1..).zip([Keep::Exclusive, Keep::Exclusive, Keep::Scrub, Keep::Inclusive]) {
        beside_a_writer(keep, seed);
    }
}

#[test]
fn what_a_vm_reads_again_tells_what_more_memory_would_bring() {
    let mut engine = engine(&settings(0));
    let vm = Vm::start(&mut engine, PAGES);
    let mut disk = Disk::new(1, Keep::Exclusive);
    // The guest goes over 600 blocks again and again, and has memory for 200.
    for round in 0..60_u64 {
        let first = round % 12 * 50;
        disk.read(&mut engine, &vm, first, (round % 4 * 50) as u32, 50);
    }
    let curve = engine.working_set(vm.slot).unwrap();
    assert_eq!(curve.miss_ratio(300), 1.0, "{curve:?}");
    assert!(curve.miss_ratio(450) < 0.4, "{curve:?}");
    assert!((350..=450).contains(&curve.working_set()), "{curve:?}");
}
