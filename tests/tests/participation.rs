//! Groups that share nothing with each other, and sharing modes that change while guests run.

use std::process::ExitCode;

use samepage_resources::demo::layout::Arena;
use samepage_resources::demo::plan::Plan;
use samepage_sharing::engine::{Mode, Order, Settings};
use samepage_sharing::service::DEFAULT_GROUP;
use samepage_tests::guests::{Guest, aggressive, hypervisor, sharing};
use samepage_tests::harness;
use samepage_tests::shared::{MEMORY, audit, churn, start_all, wait_ready, wait_until};

fn main() -> ExitCode {
    harness::run(&[
        ("guests_share_within_their_groups_only", groups),
        ("sharing_is_switched_off_and_on_while_guests_run", modes),
        ("no_page_is_corrupt_when_the_engine_works_as_ksm_does", as_ksm_does),
    ])
}

fn groups() {
    let hypervisor = hypervisor();
    let sharing = sharing(Settings { cpu_percent: 150.0, ..Settings::default() });
    let plan = Plan { rounds: 0, every_ms: 20, pages: Some(4096), ..Plan::default() };
    let guests: Vec<_> = [("red", 0), ("red", 1), ("blue", 2)]
        .map(|(group, vm)| {
            let plan = Plan { vm, ..plan.clone() };
            let mut config = Guest::config(&format!("{group}-{vm}"), &plan, MEMORY, Some(&sharing));
            config.spec.sharing.group = group.into();
            Guest::start(&hypervisor, config)
        })
        .into();
    guests.iter().for_each(wait_ready);
    let counts = Arena::on_map(&plan, std::iter::once(0..MEMORY)).unwrap().counts();
    let vm = |index: usize| guests[index].vm.membership().unwrap().statistics().unwrap();
    wait_until(&sharing, "sharing within the group", || {
        (0..2).all(|index| vm(index).pages_merged >= counts.alike)
            && (0..3).all(|index| vm(index).zero_pages >= counts.zero)
    });
    let all = sharing.groups();
    let names: Vec<_> = all.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["blue", DEFAULT_GROUP, "red"]);
    // Identical pages within one guest may be merged; those of two guests may not.
    assert!(vm(2).pages_merged < counts.alike / 2, "{:?}", vm(2));
    let sum = sharing.statistics();
    assert_eq!(sum.pages_sharing, all.iter().map(|(_, group)| group.pages_sharing).sum::<u64>());
    assert_eq!(guests[2].vm.membership().unwrap().participation().group, "blue");
    audit(&sharing);
    guests.into_iter().for_each(Guest::finish);
    assert_eq!(sharing.groups().len(), 1, "groups end with their last VM");
    let statistics = sharing.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes), (0, 0));
    assert!(statistics.merges >= sum.merges, "what groups counted that are gone still counts");
}

fn modes() {
    let hypervisor = hypervisor();
    let sharing = sharing(Settings { cpu_percent: 100.0, rest_ms: 2, ..Settings::default() });
    let guests = start_all(&hypervisor, &sharing, 3, &churn());
    guests.iter().for_each(wait_ready);
    let toggled = guests[0].vm.membership().unwrap();
    for mode in [Mode::Off, Mode::Full, Mode::Zero, Mode::Full, Mode::Off, Mode::Full] {
        toggled.set_mode(mode);
        assert_eq!(toggled.participation().mode, mode);
        let now = || toggled.statistics().unwrap();
        wait_until(&sharing, &format!("mode {mode:?}"), || match mode {
            // Guests unmerge pages as fast as possible, so on a busy host few are merged at a time.
            Mode::Full => now().pages_merged > 0,
            Mode::Zero => now().pages_merged == 0 && now().zero_pages > 0,
            Mode::Off => now().pages_merged == 0 && now().mappings == 1,
        });
        let round = guests[0].console.round();
        guests[0].console.wait_for_round(round + 2);
        if mode != Mode::Full {
            assert_eq!(now().pages_merged, 0);
        }
        audit(&sharing);
    }
    let statistics = sharing.statistics();
    assert!(statistics.pages_undone > 0 && statistics.refusals == 0, "{statistics:?}");
    guests.into_iter().for_each(Guest::finish);
}

fn as_ksm_does() {
    let hypervisor = hypervisor();
    let settings = Settings { lookahead: false, order: Order::Content, ..aggressive() };
    let sharing = sharing(settings);
    let guests = start_all(&hypervisor, &sharing, 3, &churn());
    wait_until(&sharing, "merges", || sharing.statistics().merges > 3000);
    let statistics = sharing.statistics();
    assert_eq!(statistics.merges_lookahead, 0);
    assert!(statistics.search_steps > 5 * statistics.merges, "{statistics:?}");
    audit(&sharing);
    guests.into_iter().for_each(Guest::finish);
}
