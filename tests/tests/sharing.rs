//! Guests that fill, write and verify their memory while the memory is shared.

use std::process::ExitCode;
use std::sync::mpsc;

use samepage_resources::demo::layout::Arena;
use samepage_resources::demo::plan::{Plan, Rate};
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::{Notice, Sharing};
use samepage_tests::guests::{Guest, aggressive, hypervisor, sharing};
use samepage_tests::harness;
use samepage_tests::process::{Holdings, Meter};
use samepage_tests::shared::{MEMORY, audit, churn, merge_and_break, start_all, wait_ready, wait_until};

fn main() -> ExitCode {
    harness::run(&[
        ("guests_share_what_is_alike_and_read_what_they_wrote", share_what_is_alike),
        ("no_page_is_corrupt_under_the_most_aggressive_merging", integrity),
        ("no_page_is_corrupt_when_pages_are_merged_as_soon_as_they_rest", integrity_at_rest),
        ("vms_that_come_and_go_leave_nothing_behind", come_and_go),
        ("vms_come_and_go_at_the_reserve_of_mappings", come_and_go_at_the_reserve),
        ("what_is_saved_is_free_on_the_host", host_sees_savings),
        ("a_paused_guest_is_shared_and_goes_on", pause_and_resume),
        ("a_vm_without_the_engine_is_as_it_ever_was", without_the_engine),
    ])
}

fn pages(sharing: &Sharing) -> u64 {
    let statistics = sharing.statistics();
    statistics.pages_sharing + statistics.zero_pages
}

fn share_what_is_alike() {
    let hypervisor = hypervisor();
    let sharing = sharing(Settings { cpu_percent: 50.0, ..Settings::default() });
    let plan = Plan { rounds: 0, every_ms: 20, pages: Some(8192), ..Plan::default() };
    let guests = start_all(&hypervisor, &sharing, 2, &plan);
    let counts = Arena::on_map(&plan, std::iter::once(0..MEMORY)).unwrap().counts();
    for guest in &guests {
        wait_until(&sharing, "sharing all identical pages", || {
            let statistics = guest.vm.membership().unwrap().statistics().unwrap();
            statistics.pages_merged >= counts.alike && statistics.zero_pages >= counts.zero
        });
    }
    assert!(pages(&sharing) >= counts.reclaimable(2), "{:?}", sharing.statistics());
    for guest in &guests {
        guest.console.wait_for_round(guest.console.round() + 2);
    }
    audit(&sharing);
    guests.into_iter().for_each(Guest::finish);
    let statistics = sharing.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes), (0, 0), "{statistics:?}");
}

/// The variable with the number of merges in the test of integrity.
const MERGES: &str = "SAMEPAGE_TEST_MERGES";

fn integrity() {
    let wanted = std::env::var(MERGES).ok().and_then(|merges| merges.parse().ok()).unwrap_or(20_000);
    integrity_with(aggressive(), wanted);
}

fn integrity_at_rest() {
    // The engine soon leaves frequently changing pages alone, so this number of merges comes quickly.
    integrity_with(Settings { cpu_percent: 100.0, rest_ms: 2, ..Settings::default() }, 2000);
}

fn integrity_with(settings: Settings, wanted: u64) {
    let hypervisor = hypervisor();
    let sharing = sharing(settings);
    let guests = start_all(&hypervisor, &sharing, 4, &churn());
    guests.iter().for_each(wait_ready);
    merge_and_break(&sharing, guests, wanted);
}

/// Returns the notices for users.
fn come_and_go_with(settings: Settings, vms: u32, cycles: u32) -> Vec<Notice> {
    let hypervisor = hypervisor();
    let before_all = Holdings::now();
    let sharing = sharing(settings);
    let (told, notices) = mpsc::channel();
    sharing.on_notice(move |notice| told.send(notice).expect("the test listens"));
    let plan = Plan { rounds: 0, pages: Some(4096), run: 2, ..Plan::default() };
    let stay = start_all(&hypervisor, &sharing, 2, &Plan { every_ms: 50, ..plan.clone() });
    stay.iter().for_each(wait_ready);
    let cycle = |number: u32| {
        let guests: Vec<_> = (0..vms)
            .map(|vm| {
                let plan = Plan { vm: 100 + vm, ..plan.clone() };
                let config = Guest::config(&format!("c{number}-{vm}"), &plan, MEMORY, Some(&sharing));
                Guest::start(&hypervisor, config)
            })
            .collect();
        for guest in &guests {
            guest.console.wait_for_round(1);
        }
        // Half of them end by themselves, half in the middle of their work.
        for (index, guest) in guests.into_iter().enumerate() {
            if index.is_multiple_of(2) { guest.finish() } else { drop(guest) }
        }
    };
    cycle(0);
    wait_until(&sharing, "rest", || stay.iter().all(|guest| guest.console.round() > 1));
    sharing.pause();
    let (before, frames_before) = (Holdings::now(), sharing.statistics().frames);
    sharing.resume();
    (1..=cycles).for_each(cycle);
    for guest in &stay {
        guest.console.wait_for_round(guest.console.round() + 1);
    }
    sharing.pause();
    let statistics = sharing.statistics();
    Holdings::assert_back_to(&Holdings { mappings: before.mappings + 8192, ..before }, 4 << 20);
    let most = 2 * plan.pages.unwrap() + 1024;
    assert!(statistics.frames <= frames_before.max(most), "{frames_before} frames before, {statistics:?}");
    audit(&sharing);
    sharing.resume();
    stay.into_iter().for_each(Guest::finish);
    let statistics = sharing.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes), (0, 0), "{statistics:?}");
    drop(sharing);
    Holdings::assert_back_to(&before_all, 4 << 20);
    notices.try_iter().collect()
}

fn come_and_go() {
    assert_eq!(come_and_go_with(aggressive(), 2, 8), []);
}

fn come_and_go_at_the_reserve() {
    // With runs of two pages, the two guests that stay reach a limit of 6,000.
    let settings = Settings { mappings_limit: Some(6000), ..aggressive() };
    let notices = come_and_go_with(settings, 2, 4);
    assert!(matches!(notices[..], [Notice::ShortOfMappings { limit: 6000, .. }]), "{notices:?}");
}

fn host_sees_savings() {
    let meter = Meter::start();
    let hypervisor = hypervisor();
    let sharing = sharing(Settings { cpu_percent: 100.0, ..Settings::default() });
    sharing.pause();
    let memory = 320 << 20;
    let plan =
        Plan { rounds: 0, every_ms: 50, alike: 60, own: 20, zero: 20, pages: Some(65536), ..Plan::default() };
    let guests: Vec<_> = (0..3)
        .map(|vm| {
            let plan = Plan { vm, ..plan.clone() };
            Guest::start(&hypervisor, Guest::config(&format!("m{vm}"), &plan, memory, Some(&sharing)))
        })
        .collect();
    guests.iter().for_each(wait_ready);
    let before = meter.used();
    sharing.resume();
    let counts = Arena::on_map(&plan, std::iter::once(0..memory)).unwrap().counts();
    wait_until(&sharing, "sharing", || pages(&sharing) >= counts.reclaimable(3));
    sharing.pause();
    let reported = pages(&sharing) * PAGE_SIZE as u64;
    let freed = before - meter.used();
    println!("reported {} MiB saved, the kernel charges {} MiB less", reported >> 20, freed >> 20);
    assert!(freed.abs_diff(reported as i64) < reported / 10, "reported {reported}, freed {freed} bytes");
    guests.into_iter().for_each(Guest::finish);
}

fn pause_and_resume() {
    let hypervisor = hypervisor();
    let sharing = sharing(Settings { cpu_percent: 100.0, ..Settings::default() });
    // KVM's log may count reads through new mappings as writes. A guest that is idle between its rounds must
    // not count as busy on any host.
    let rate = Rate::PerSecond(100);
    let plan = Plan { rounds: 0, pages: Some(4096), every_ms: 1000, rate, ..Plan::default() };
    let guests = start_all(&hypervisor, &sharing, 2, &plan);
    guests.iter().for_each(|guest| guest.console.wait_for_round(1));
    guests[0].vm.pause();
    let paused_at = guests[0].console.round();
    let scans = sharing.statistics().full_scans;
    guests[1].console.wait_for_round(guests[1].console.round() + 2);
    wait_until(&sharing, "two passes", || sharing.statistics().full_scans > scans + 2);
    assert_eq!(guests[0].console.round(), paused_at, "a paused guest did something");
    wait_until(&sharing, "sharing", || sharing.statistics().pages_sharing > 1000);
    audit(&sharing);
    guests[0].vm.resume();
    guests[0].console.wait_for_round(paused_at + 2);
    guests.into_iter().for_each(Guest::finish);
}

fn without_the_engine() {
    let hypervisor = hypervisor();
    let before = Holdings::now();
    let plan = Plan { rounds: 0, pages: Some(4096), ..Plan::default() };
    let guest = Guest::start(&hypervisor, Guest::config("alone", &plan, MEMORY, None));
    guest.console.wait_for_round(2);
    assert!(guest.vm.membership().is_none());
    let kvm = |name: &String| name.starts_with("kvm-") || before.threads.contains(name);
    let threads: Vec<_> = Holdings::now().threads.into_iter().filter(|name| !kvm(name)).collect();
    assert_eq!(threads, ["vcpu-alone-0"]);
    guest.finish();
    Holdings::assert_back_to(&before, 2 << 20);
}
