//! Guests that share memory with each other, and conditions to wait for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use samepage_machine::Hypervisor;
use samepage_resources::demo::content::Class;
use samepage_resources::demo::plan::{Classes, Plan, Rate};
use samepage_resources::demo::report::Report;
use samepage_sharing::service::Sharing;

use crate::console::TIME_LIMIT;
use crate::guests::Guest;

/// Memory of each guest, in bytes.
pub const MEMORY: u64 = 64 << 20;

/// Waits until a condition holds.
///
/// # Panics
/// Panics if the condition does not become true.
pub fn wait_until(sharing: &Sharing, what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + TIME_LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come about: {:?}", sharing.statistics());
        // The engine's progress has no events, so poll.
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until a guest has filled its memory.
pub fn wait_ready(guest: &Guest) {
    guest.console.wait_for_report("ready", |report| matches!(report, Report::Ready { .. }).then_some(()));
}

/// Runs an audit of the engine's metadata.
///
/// # Panics
/// Panics if the metadata is wrong.
pub fn audit(sharing: &Sharing) {
    let report = sharing.audit().expect("an audit");
    assert!(report.passed(), "{report:#?}");
}

/// Starts guests with the same plan, numbered from 0 on.
#[must_use]
pub fn start_all(hypervisor: &Hypervisor, sharing: &Arc<Sharing>, count: u32, plan: &Plan) -> Vec<Guest> {
    (0..count)
        .map(|vm| {
            let plan = Plan { vm, ..plan.clone() };
            Guest::start(hypervisor, Guest::config(&format!("g{vm}"), &plan, MEMORY, Some(sharing)))
        })
        .collect()
}

/// Has guests rewrite their pages until so many pages were merged, with an audit after each quarter. Then it ends them,
/// and checks that pages were written again after they were merged.
///
/// # Panics
/// Panics if nothing is merged, a page is corrupt, or an audit fails.
pub fn merge_and_break(sharing: &Sharing, guests: Vec<Guest>, wanted: u64) {
    let (mut audited, mut merges, mut progress) = (0, 0, Instant::now());
    while merges < wanted {
        for guest in &guests {
            guest.console.wait_for_round(guest.console.round() + 1);
        }
        let statistics = sharing.statistics();
        if statistics.merges > merges {
            (merges, progress) = (statistics.merges, Instant::now());
        }
        // On a busy host, the engine may not merge anything within one round of the guests.
        assert!(progress.elapsed() < TIME_LIMIT, "guests write and nothing is merged: {statistics:?}");
        if merges / (wanted / 4).max(1) > audited {
            audited += 1;
            audit(sharing);
        }
    }
    audit(sharing);
    let rounds: Vec<_> = guests.iter().map(|guest| guest.console.round()).collect();
    let spent: Vec<_> = guests.iter().map(|guest| guest.vm.cpu_time()).collect();
    guests.into_iter().for_each(Guest::finish);
    let statistics = sharing.statistics();
    println!("{} merges, {} breaks, rounds {rounds:?}, {spent:?}", statistics.merges, statistics.breaks);
    assert!(statistics.breaks > wanted / 10, "{statistics:?}");
    assert_eq!(statistics.refusals, 0, "{statistics:?}");
}

/// Returns a plan that rewrites pages as fast as possible and restores half of them, so that they are merged
/// and broken repeatedly.
#[must_use]
pub fn churn() -> Plan {
    Plan {
        rounds: 0,
        pages: Some(2048),
        run: 8,
        rate: Rate::Max,
        write: Classes::new(&[Class::Alike, Class::Own, Class::Zero]),
        restore: 80,
        ..Plan::default()
    }
}
