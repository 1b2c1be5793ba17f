//! Guests that give memory back by a balloon.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use samepage_machine::Hypervisor;
use samepage_machine::config::BalloonSpec;
use samepage_machine::x86::layout::MMIO_START;
use samepage_resources::demo::plan::Plan;
use samepage_resources::demo::report::Report;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use samepage_tests::guests::{Guest, hypervisor, sharing};
use samepage_tests::harness;
use samepage_tests::progress::wait_until;
use samepage_tests::shared::{MEMORY, audit, churn, wait_ready};

fn main() -> ExitCode {
    harness::run(&[
        ("pages_that_guests_give_back_are_freed_and_used_again", give),
        ("a_guest_without_an_engine_gives_pages_back", alone),
    ])
}

fn settings() -> Settings {
    Settings { cpu_percent: 100.0, rest_ms: 20, ..Settings::default() }
}

/// Starts a demo guest that gives pages away and uses them again, as fast as it can.
fn giver(hypervisor: &Hypervisor, sharing: Option<&Arc<Sharing>>, vm: u32) -> Guest {
    let plan = Plan { vm, every_ms: 50, balloon: Some(MMIO_START), ..churn() };
    let mut config = Guest::config(&format!("g{vm}"), &plan, MEMORY, sharing);
    config.spec.balloon = Some(BalloonSpec::default());
    Guest::start(hypervisor, config)
}

/// The counters of a guest's last report: requests, pages given, pages found freed, and the longest time in µs.
fn given(guest: &Guest) -> (u64, u64, u64, u64) {
    let given = |line: &String| match Report::parse(line) {
        Ok(Report::Given { requests, given, returned, us }) => Some((requests, given, returned, us)),
        _ => None,
    };
    guest.console.lines().iter().rev().find_map(given).unwrap_or_default()
}

/// Pages that each demo guest has to find freed.
const RETURNED: u64 = 2000;

/// Ends a demo guest whose host has heard of all that it gave.
fn finish_giver(guest: Guest) {
    let balloon = guest.vm.balloon().expect("the VM has a balloon").clone();
    let (requests, given, returned, us) = given(&guest);
    guest.finish();
    let stats = balloon.stats();
    println!(
        "{requests} requests, {given} pages, {returned} found freed, {us} µs for the slowest: {stats:?}"
    );
    assert!(stats.inflated.load(Relaxed) >= given && stats.freed.load(Relaxed) >= returned, "{stats:?}");
    assert_eq!((stats.invalid.load(Relaxed), stats.errors.load(Relaxed)), (0, 0), "{stats:?}");
}

fn give() {
    let hypervisor = hypervisor();
    let sharing = sharing(settings());
    let guests = [0, 1, 2].map(|vm| giver(&hypervisor, Some(&sharing), vm));
    guests.iter().for_each(wait_ready);
    for guest in &guests {
        wait_until("pages that the host has freed", || given(guest).2 >= RETURNED);
        audit(&sharing);
    }
    // Each round verifies the used pages, and they are merged meanwhile.
    wait_until("merged pages that were written again", || sharing.statistics().breaks > 100);
    for guest in &guests {
        guest.console.wait_for_round(guest.console.round() + 2);
    }
    audit(&sharing);
    guests.into_iter().for_each(finish_giver);
    let statistics = sharing.statistics();
    assert_eq!((statistics.frames, statistics.refusals), (0, 0), "{statistics:?}");
}

fn alone() {
    let guest = giver(&hypervisor(), None, 0);
    wait_ready(&guest);
    wait_until("pages that the host has freed", || given(&guest).2 >= RETURNED);
    finish_giver(guest);
}
