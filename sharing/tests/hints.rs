//! What devices say about pages: it is tried first, and lies cost nothing but the try.

mod common;

use common::followed::{Clock, Vm, following};
use common::{audit, engine};
use samepage_sharing::engine::{Engine, Mode};
use samepage_sharing::hints::Hint;

const PAGES: u32 = 1000;

/// A disk read that fills pages with the blocks from `block` on, and the hint about it.
fn read(engine: &Engine, vm: &Vm, page: u32, block: u32, count: u32) {
    (0..count).for_each(|index| vm.write(page + index, content(block + index)));
    hint(engine, vm, Hint { pages: page..page + count, image: 1, block: block.into() });
}

fn content(block: u32) -> u64 {
    7 << 40 | u64::from(block)
}

fn hint(engine: &Engine, vm: &Vm, hint: Hint) {
    engine.hints(vm.slot).unwrap().give(hint);
}

#[test]
fn a_block_that_another_guest_holds_is_shared_before_it_has_come_to_rest() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..3).map(|_| Vm::start(&mut engine, PAGES)).collect();
    let mut clock = Clock::new();
    clock.intervals(&mut engine, 1);
    read(&engine, &vms[0], 100, 5000, 64);
    read(&engine, &vms[1], 300, 5000, 64);
    // Not an interval passes.
    clock.intervals(&mut engine, 0);
    let statistics = engine.statistics();
    assert_eq!((statistics.pages_sharing, statistics.merges_hinted), (64, 1), "{statistics:?}");
    assert_eq!((statistics.search_steps, statistics.merges_lookahead), (0, 126));

    // The third shares the frames of the others, with its own neighbours.
    read(&engine, &vms[2], 500, 5010, 20);
    clock.intervals(&mut engine, 0);
    assert_eq!(engine.statistics().pages_sharing, 84);
    clock.intervals(&mut engine, 4);
    assert_eq!((engine.statistics().pages_sharing, engine.statistics().breaks), (84, 0));
    audit(&mut engine);
}

#[test]
fn a_block_that_a_guest_holds_which_does_not_share_is_left_to_it() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| Vm::start(&mut engine, PAGES)).collect();
    let mut clock = Clock::new();
    clock.intervals(&mut engine, 1);
    for (number, mode) in (0..).zip([Mode::Off, Mode::Zero]) {
        let block = 5000 + 100 * number;
        engine.set_mode(vms[0].slot, Mode::Full);
        read(&engine, &vms[0], 100, block, 64);
        clock.intervals(&mut engine, 0);
        engine.set_mode(vms[0].slot, mode);
        read(&engine, &vms[1], 300, block, 64);
        clock.intervals(&mut engine, 4);
        assert_eq!(engine.statistics().merges, 0, "{mode:?}");
    }
    audit(&mut engine);
}

#[test]
fn hints_that_are_wrong_share_nothing_that_differs() {
    let mut engine = engine(&following());
    let vms: Vec<_> = (0..2).map(|_| Vm::start(&mut engine, PAGES)).collect();
    let mut clock = Clock::new();
    clock.intervals(&mut engine, 1);
    read(&engine, &vms[0], 100, 5000, 64);
    // The pages hold something else, or were written again since, or are not there.
    vms[1].write(300, 1234);
    hint(&engine, &vms[1], Hint { pages: 300..310, image: 1, block: 5000 });
    read(&engine, &vms[1], 400, 5032, 8);
    vms[1].write(403, 99);
    hint(&engine, &vms[1], Hint { pages: 990..1010, image: 1, block: u64::MAX - 3 });
    hint(&engine, &vms[1], Hint { pages: 990..999, image: 1, block: u64::MAX - 3 });
    hint(&engine, &vms[1], Hint { pages: 20..u32::MAX, image: 1, block: 0 });
    #[expect(clippy::reversed_empty_ranges, reason = "a device that lies")]
    hint(&engine, &vms[1], Hint { pages: 20..3, image: 1, block: 0 });
    clock.intervals(&mut engine, 0);
    vms[1].guest.check(300, 1234);
    vms[1].guest.check(403, 99);
    vms[1].guest.check(402, content(5034));
    assert_eq!(engine.statistics().pages_sharing, 7);
    audit(&mut engine);
}
