//! Disks of which a sample alone goes through the cache, and everything else past it.

mod common;

use common::disks::Disk;
use common::followed::{Clock, Vm, following};
use common::{Numbers, audit, engine};
use samepage_sharing::blocks::{CacheSize, Keep};
use samepage_sharing::engine::Settings;

const PAGES: u32 = 512;

fn settings(blocks: u64) -> Settings {
    Settings { block_cache: CacheSize::Bytes(blocks * 4096), ..following() }
}

#[test]
fn what_goes_past_shows_that_a_sampled_block_was_given_up() {
    let mut engine = engine(&settings(100));
    let vm = Vm::start(&mut engine, PAGES);
    let mut disk = Disk::new(1, Keep::Exclusive);
    disk.sampled = true;
    // A single block is mapped too: its page tells that it was left.
    disk.read(&mut engine, &vm, 8, 10, 1);
    let statistics = engine.cache_statistics();
    assert_eq!((statistics.delivered_mapped, statistics.blocks_noted), (1, 0));
    disk.pass(&vm, 1000, 10, 1);
    Clock::new().intervals(&mut engine, 2);
    assert_eq!(engine.cache_statistics().blocks_cached, 1);
    let plan = disk.read(&mut engine, &vm, 8, 20, 1);
    assert_eq!((plan.from_host, disk.reads), (1, 2));
    vm.guest.check(20, disk.seed(8));
    vm.guest.check(10, disk.seed(1000));
    audit(&mut engine);
}

#[test]
fn whatever_goes_past_or_through_guests_read_what_the_disk_holds() {
    let mut engine = engine(&settings(60));
    let vms = [Vm::start(&mut engine, PAGES), Vm::start(&mut engine, PAGES)];
    let mut disk = Disk::new(1, Keep::Exclusive);
    let mut clock = Clock::new();
    let mut numbers = Numbers(0x5a3e);
    for round in 0..6000_u64 {
        let vm = &vms[(numbers.below(2)) as usize];
        let (block, page) = (numbers.below(200), (numbers.below(60)) as u32 * 4);
        let count = 1 + (numbers.below(4)) as u32;
        match numbers.below(8) {
            0 => disk.write(&mut engine, block, (9 << 40) + round),
            1 => vm.write(page, (8 << 40) + round),
            2 | 3 => {
                disk.pass(vm, block, page, count);
                (0..count).for_each(|at| vm.guest.check(page + at, disk.seed(block + u64::from(at))));
            }
            how => {
                disk.sampled = how < 6;
                disk.read(&mut engine, vm, block, page, count);
                (0..count).for_each(|at| vm.guest.check(page + at, disk.seed(block + u64::from(at))));
            }
        }
        if round % 50 == 0 {
            clock.intervals(&mut engine, 1);
        }
        if round % 1000 == 0 {
            audit(&mut engine);
        }
    }
    audit(&mut engine);
    let statistics = engine.cache_statistics();
    assert!(statistics.demoted_mapped > 0 && statistics.served_from_guests > 0, "{statistics:?}");
}
