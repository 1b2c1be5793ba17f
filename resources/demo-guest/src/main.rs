//! A guest that fills, rewrites and verifies its memory, for demonstrations and tests of samepage.
//!
//! The command line contains the plan, and reports on the serial port contain the results; see README.md. All
//! but a few dozen instructions run in ring 3.

#![no_std]
#![no_main]

mod balloon;
mod boot;
mod cache;
mod client;
mod clock;
mod crash;
#[path = "../../src/demo/mod.rs"]
#[expect(dead_code, reason = "the host uses the other half")]
mod demo;
mod disk;
mod hole;
mod hostile;
mod memory;
mod pages;
mod paging;
mod port;
mod processors;
mod start_info;
mod virtio;

use core::hint;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use balloon::Balloon;
use clock::Clock;
use demo::layout::{Arena, LayoutError, Ram};
use demo::plan::{Crash, Plan};
use demo::report::{Hex, Report, Text};
use disk::Disk;
use hole::Claims;
use pages::Pages;
use processors::{Task, Team, World};
use start_info::{Handover, LONGEST_COMMAND_LINE};

/// The start of ring 3, called by the boot code with the monitor's address from `ebx`.
#[unsafe(no_mangle)]
extern "C" fn ring3_main(start_info: usize) -> ! {
    // SAFETY: this is the first code in ring 3.
    unsafe {
        boot::set_up_floating_point();
        boot::install_gates();
        paging::map_low();
    }
    port::init();
    // SAFETY: the first 4 GiB are mapped, where PVH puts the structure, and nothing has been written there.
    match unsafe { Handover::at(start_info) } {
        Some(handover) => run(&handover),
        None => fail("no-start-info-with-memory-map", start_info as u64),
    }
}

fn run(handover: &Handover) -> ! {
    let mut buffer = [0; LONGEST_COMMAND_LINE];
    let command_line = handover.command_line(&mut buffer);
    let plan = Plan::parse(command_line, |word| {
        // The monitor describes all devices to kernels, also those for which this guest has no driver.
        if !word.starts_with("virtio_mmio.device=") {
            port::print(Report::Ignored { option: Text::new(word.as_bytes()) });
        }
    });
    let arena = match Ram::new(handover.ram()).and_then(|ram| Arena::new(&plan, ram)) {
        Ok(arena) => arena,
        Err(LayoutError::TooManyRanges) => fail("too-many-ranges-of-memory", 0),
        Err(LayoutError::TooSmall { needed, .. }) => fail("too-little-memory-for-tables", needed),
    };
    // SAFETY: the directories are in the lowest usable memory, below 4 GiB and otherwise unused. The
    // monitor's data has been copied.
    unsafe { paging::map_high(&arena) };
    let clock = Clock::start(plan.tsc_khz);
    port::print(Report::Start {
        ram: arena.ram().pages(),
        tsc_khz: clock.tsc_khz,
        timer_khz: clock.timer_khz,
    });

    let start = clock::now();
    let world = World { plan: &plan, arena: &arena, clock: &clock };
    // SAFETY: all usable memory is mapped now, and this function does not return.
    let team = unsafe { Team::start(&world) };
    // SAFETY: nothing else uses this part of the arena and of its table.
    let mut pages = unsafe { Pages::new(&world, team.first_part(&arena), 0, team.size()) };
    team.begin(Task::Fill);
    pages.fill();
    team.finish(|| {});
    let counts = arena.counts();
    if plan.misbehaviour() == Some(Crash::Hang) {
        // Behave like a driver that finds a keyboard and then ignores it.
        port::look_at_keyboard();
    }
    port::print(Report::Ready {
        pages: arena.pages(),
        alike: counts.alike,
        own: counts.own,
        zero: counts.zero,
        arena: Hex(arena.address(0).unwrap_or(0)),
        us: clock.elapsed_us(start),
    });

    if let Some(crash) = plan.misbehaviour() {
        crash::misbehave(crash, plan.every_ms, arena.ram(), &clock);
    }
    // SAFETY: this is the only disk, and nothing else uses its buffers.
    let mut disk = plan.disk.as_ref().map(|disk| unsafe {
        Disk::open(&plan, disk, &arena, &clock).unwrap_or_else(|error| fail(error.reason(), disk.base))
    });
    let mut claims = plan.hole_mode.map(|mode| {
        // SAFETY: the monitor has given the place of the hole, and nothing else writes there.
        unsafe { Claims::open(&plan, mode, &clock) }.unwrap_or_else(|reason| fail(reason, 0))
    });
    let mut balloon = plan.balloon.map(|base| {
        // SAFETY: there is no disk beside it, so nothing else uses the queue's memory.
        unsafe { Balloon::open(&plan, base, &clock) }.unwrap_or_else(|reason| fail(reason, base))
    });
    let rounds = rounds(&world, &team, &mut pages, disk.as_mut(), (claims.as_mut(), balloon.as_mut()));
    if claims.is_none_or(|claims| claims.is_honest()) {
        team.begin(Task::VerifyLast);
        pages.verify(false);
        team.finish(|| {});
    }
    let corrupt = pages.corrupt + processors::others_corrupt() + disk.map_or(0, Disk::finish);
    port::print(Report::Done { rounds, corrupt });
    stop()
}

/// Does the plan's rounds. Returns the number of finished rounds.
fn rounds(
    world: &World<'_>,
    team: &Team<'_>,
    pages: &mut Pages<'_>,
    mut disk: Option<&mut Disk<'_>>,
    (mut claims, mut balloon): (Option<&mut Claims<'_>>, Option<&mut Balloon<'_>>),
) -> u64 {
    let World { plan, clock, .. } = *world;
    let mut round = 0;
    let mut reported = 0;
    loop {
        if let Some(claims) = claims.as_mut().filter(|claims| !claims.is_honest()) {
            port::print(claims.lie(pages));
            round += 1;
            if pages.quit || round == plan.rounds {
                return round;
            }
            continue;
        }
        if let Some(Err(error)) = disk.as_mut().map(|disk| disk.round()) {
            fail(error.reason(), round + 1);
        }
        if plan.walk > 0 {
            let start = clock::now();
            let steps = pages.walk(plan.walk);
            port::print(Report::Walk { steps, us: clock.elapsed_us(start) });
        }
        let start = clock::now();
        team.begin(Task::Verify);
        let own = pages.verify(true);
        if pages.quit {
            team.quit();
        }
        let others = team.finish(|| {
            pages.attend(1);
            if pages.quit {
                team.quit();
            }
        });
        let Some(own) = own.filter(|_| !pages.quit) else { return round };
        round += 1;
        let us = clock.elapsed_us(start);
        let writes = pages.writes + processors::others_writes();
        port::print(Report::Round { round, verified: own + others, writes: writes - reported, us });
        reported = writes;
        if round == plan.rounds {
            return round;
        }
        match (&mut claims, &mut balloon) {
            (Some(claims), _) => port::print(claims.tell(pages, plan.every_ms)),
            (None, Some(balloon)) => match balloon.play(pages, plan.every_ms) {
                Ok(report) => port::print(report),
                Err(reason) => fail(reason, round),
            },
            (None, None) => pages.pause(plan.every_ms),
        }
        if pages.quit {
            return round;
        }
    }
}

/// Resets the machine, or idles for ever if that fails.
fn stop() -> ! {
    port::reset();
    clock::sleep_forever()
}

fn fail(reason: &str, value: u64) -> ! {
    port::print(Report::Error { reason: Text::new(reason.as_bytes()), value: Hex(value) });
    stop()
}

/// Handles an exception in ring 3, on a fresh stack.
#[unsafe(no_mangle)]
extern "C" fn ring3_fault(vector: u64, error: u64, rip: u64, address: u64) -> ! {
    static FAULTED: AtomicBool = AtomicBool::new(false);
    if FAULTED.swap(true, Ordering::Relaxed) {
        // The report itself faults, so nothing can be reported.
        loop {
            hint::spin_loop();
        }
    }
    port::print(Report::Fault { vector, error: Hex(error), rip: Hex(rip), address: Hex(address) });
    stop()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    fail("panic-at-line", info.location().map_or(0, |location| location.line().into()))
}
