//! Guests in huge pages: hot huge pages stay, cold ones are split and shared, and no guest finds a corrupt
//! page.

use std::process::ExitCode;
use std::sync::Arc;

use samepage_machine::{HugePages, huge_pages};
use samepage_resources::demo::layout::Arena;
use samepage_resources::demo::plan::{Plan, Rate};
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use samepage_tests::guests::{Guest, aggressive, hypervisor, sharing};
use samepage_tests::harness;
use samepage_tests::shared::{MEMORY, audit, churn, wait_ready, wait_until};

fn main() -> ExitCode {
    harness::run(&[
        ("cold_huge_pages_are_split_and_shared", cold),
        ("no_page_is_corrupt_while_huge_pages_are_split", busy),
    ])
}

fn start_all(settings: Settings, plan: &Plan) -> (Arc<Sharing>, Vec<Guest>) {
    let hypervisor = hypervisor();
    let sharing = sharing(settings);
    let guests: Vec<_> = (0..3)
        .map(|vm| {
            let plan = Plan { vm, ..plan.clone() };
            let mut config = Guest::config(&format!("huge-{vm}"), &plan, MEMORY, Some(&sharing));
            config.spec.hugepages = HugePages::Thp;
            Guest::start(&hypervisor, config)
        })
        .collect();
    guests.iter().for_each(wait_ready);
    (sharing, guests)
}

fn cold() {
    let plan = Plan { rounds: 0, every_ms: 20, pages: Some(4096), ..Plan::default() };
    let (sharing, guests) =
        start_all(Settings { cpu_percent: 150.0, rest_ms: 50, ..Settings::default() }, &plan);
    let counts = Arena::on_map(&plan, std::iter::once(0..MEMORY)).unwrap().counts();
    let vm = |index: usize| guests[index].vm.membership().unwrap().statistics().unwrap();
    wait_until(&sharing, "sharing of cold memory", || {
        (0..guests.len()).all(|index| vm(index).pages_merged >= counts.alike / 2)
    });
    if huge_pages::unavailable().is_none() {
        assert!(sharing.statistics().huge_split > 0, "{:?}", sharing.statistics());
    }
    assert_eq!(sharing.statistics().refusals, 0);
    audit(&sharing);
    guests.into_iter().for_each(Guest::finish);
    let statistics = sharing.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes), (0, 0));
}

fn busy() {
    // Slow enough for a huge page to become cold sometimes.
    let plan = Plan { rate: Rate::PerSecond(200), every_ms: 10, pages: Some(4096), ..churn() };
    for settings in [aggressive(), Settings { cpu_percent: 100.0, rest_ms: 2, ..Settings::default() }] {
        let (sharing, guests) = start_all(settings, &plan);
        wait_until(&sharing, "merges", || sharing.statistics().merges > 1000);
        for _ in 0..3 {
            let round = guests[0].console.round();
            guests[0].console.wait_for_round(round + 2);
            audit(&sharing);
        }
        guests.into_iter().for_each(Guest::finish);
    }
}
