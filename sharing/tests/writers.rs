//! Writers that never pause while the engine merges as fast as it can: no write is lost, no page
//! shows another's content, and the auditor agrees.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{Guest, Numbers, audit, engine, losses, no_rest, pass, take_off};
use proptest::prelude::*;
use samepage_sharing::engine::{Mode, Order, Settings};

/// Writes contents that are often alike to the pages `first..first + model.len()`, checking each
/// before it is overwritten.
fn write_on(guest: &Guest, first: u32, model: &mut [u64], numbers: &mut Numbers, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..64 {
            let index = numbers.below(model.len() as u64);
            let page = first + index as u32;
            let seed = &mut model[index as usize];
            guest.check(page, *seed);
            *seed = numbers.below(6) * (1 + index / 8);
            guest.write(page, *seed);
        }
    }
}

#[test]
fn no_write_is_lost_while_pages_are_merged_under_it() {
    const PAGES: u32 = 1024;
    let guests: Vec<_> = (0..4).map(|_| Guest::new(PAGES)).collect();
    let mut engine = engine(&no_rest(false));
    for guest in &guests {
        engine.add(guest.ram.clone(), None, losses().1).unwrap();
    }
    let stop = AtomicBool::new(false);
    let models: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let writers: Vec<_> = (1..)
            .zip(&guests)
            .flat_map(|(vm, guest)| [(vm * 2, guest, 0), (vm * 2 + 1, guest, PAGES / 2)])
            .map(|(number, guest, first)| {
                let stop = &stop;
                scope.spawn(move || {
                    let mut model = vec![0; PAGES as usize / 2];
                    write_on(guest, first, &mut model, &mut Numbers(number), stop);
                    model
                })
            })
            .collect();
        while engine.statistics().merges < 20_000 && writers.iter().all(|writer| !writer.is_finished()) {
            pass(&mut engine);
        }
        audit(&mut engine);
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().map(|writer| writer.join().expect("a writer found another's content")).collect()
    });
    let check = || {
        for (index, model) in models.iter().enumerate() {
            let first = index as u32 % 2 * PAGES / 2;
            (first..).zip(model).for_each(|(page, &seed)| guests[index / 2].check(page, seed));
        }
    };
    check();
    for _ in 0..3 {
        pass(&mut engine);
    }
    check();
    audit(&mut engine);
    let statistics = engine.statistics();
    assert!(statistics.merges >= 20_000 && statistics.breaks > 1000, "{statistics:?}");
    assert_eq!(statistics.refusals, 0);
}

/// One step of a made-up history.
#[derive(Clone, Debug)]
enum Event {
    Write { vm: usize, page: u32, count: u32, seed: u64 },
    Pass,
    Mode { vm: usize, mode: Mode },
    Restart { vm: usize },
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..3_usize, 0..120_u32, 1..40_u32, 0..8_u64)
            .prop_map(|(vm, page, count, seed)| Event::Write { vm, page, count, seed }),
        3 => Just(Event::Pass),
        1 => (0..3_usize, prop_oneof![Just(Mode::Off), Just(Mode::Zero), Just(Mode::Full)])
            .prop_map(|(vm, mode)| Event::Mode { vm, mode }),
        1 => (0..3_usize).prop_map(|vm| Event::Restart { vm }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn guests_read_what_they_wrote(
        settle: bool,
        lookahead: bool,
        content: bool,
        events in prop::collection::vec(event(), 1..60),
    ) {
        const PAGES: u32 = 128;
        let order = if content { Order::Content } else { Order::Digest };
        let mut engine = engine(&Settings { lookahead, order, ..no_rest(settle) });
        let mut vms: Vec<_> = (0..3)
            .map(|_| {
                let guest = Guest::new(PAGES);
                let slot = engine.add(guest.ram.clone(), None, losses().1).unwrap();
                (guest, slot, vec![0; PAGES as usize])
            })
            .collect();
        for event in events {
            match event {
                Event::Write { vm, page, count, seed } => {
                    let (guest, _, model) = &mut vms[vm];
                    for page in page..(page + count).min(PAGES) {
                        // Runs of distinct pages, alike in all VMs; seed 0 is zeros.
                        let seed = if seed == 0 { 0 } else { seed * 1000 + u64::from(page / 2) };
                        guest.write(page, seed);
                        model[page as usize] = seed;
                    }
                }
                Event::Pass => {
                    pass(&mut engine);
                    take_off(&mut engine);
                }
                Event::Mode { vm, mode } => engine.set_mode(vms[vm].1, mode),
                Event::Restart { vm } => {
                    let guest = Guest::new(PAGES);
                    engine.remove(vms[vm].1).unwrap();
                    let slot = engine.add(guest.ram.clone(), None, losses().1).unwrap();
                    vms[vm] = (guest, slot, vec![0; PAGES as usize]);
                }
            }
            for (guest, _, model) in &vms {
                (0..).zip(model).for_each(|(page, &seed)| guest.check(page, seed));
            }
        }
        audit(&mut engine);
    }
}
