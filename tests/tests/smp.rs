//! Guests with several vCPUs: all work at once while their memory is shared, and none is left behind by its VM.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use samepage_machine::VmEnd;
use samepage_resources::demo::plan::{Plan, Rate};
use samepage_resources::demo::report::Report;
use samepage_sharing::engine::Settings;
use samepage_tests::api::Host;
use samepage_tests::console::{Console, TIME_LIMIT};
use samepage_tests::guests::{Guest, aggressive, hypervisor, sharing};
use samepage_tests::harness::{self, Need};
use samepage_tests::process::Holdings;
use samepage_tests::shared::{MEMORY, churn, merge_and_break, start_all, wait_ready};
use serde_json::json;

fn main() -> ExitCode {
    harness::run_all(&[
        ("no_page_is_corrupt_when_four_vcpus_write_while_it_is_merged", &[Need::Kvm], integrity),
        ("vms_start_and_stop_at_any_moment_and_leave_nothing_behind", &[Need::Kvm], start_and_stop),
        ("a_guest_is_paused_and_reset_while_its_vcpus_start", &[Need::Kvm], pause_and_reset),
        ("a_guest_without_enough_vcpus_works_with_one", &[Need::Kvm], works_alone),
    ])
}

const VCPUS: u32 = 4;
/// The variables with the number of merges and of starts.
const MERGES: &str = "SAMEPAGE_TEST_MERGES";
const STARTS: &str = "SAMEPAGE_TEST_STARTS";

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|number| number.parse().ok()).unwrap_or(otherwise)
}

/// Waits until a guest's vCPUs have started, and returns how many work.
fn working(console: &Console) -> u64 {
    console.wait_for_report("the start of vCPUs", |report| match report {
        Report::Processors { working, .. } => Some(*working),
        _ => None,
    })
}

fn integrity() {
    let wanted = number(MERGES, 10_000);
    let hypervisor = hypervisor();
    let sharing = sharing(aggressive());
    let guests = start_all(&hypervisor, &sharing, 2, &Plan { cpus: VCPUS, ..churn() });
    for guest in &guests {
        assert_eq!((working(&guest.console), guest.vm.vcpus()), (u64::from(VCPUS), VCPUS));
        wait_ready(guest);
    }
    merge_and_break(&sharing, guests, wanted);
}

fn start_and_stop() {
    let starts = number(STARTS, 30);
    let hypervisor = hypervisor();
    let sharing = sharing(Settings { cpu_percent: 100.0, ..Settings::default() });
    let plan = Plan { rounds: 0, pages: Some(256), rate: Rate::Max, cpus: VCPUS, ..Plan::default() };
    let start = |vm: u64| {
        let plan = Plan { vm: vm as u32, ..plan.clone() };
        Guest::start(&hypervisor, Guest::config(&format!("s{vm}"), &plan, MEMORY, Some(&sharing)))
    };
    // How long the start takes, from the machine to the last vCPU.
    let begun = Instant::now();
    let first = start(0);
    assert_eq!(working(&first.console), u64::from(VCPUS));
    let whole = begun.elapsed().min(Duration::from_millis(50));
    first.finish();
    let before = Holdings::now();
    for number in 1..=starts {
        let guest = start(number);
        match number % 4 {
            // At some moment of the start.
            0..3 => {
                let moment = whole * (number % 64) as u32 / 32;
                std::thread::sleep(moment);
                if number % 4 == 2 {
                    guest.vm.pause();
                }
                assert_eq!(guest.vm.stop(), VmEnd::Stopped);
            }
            // In the middle of its work, and by the guest.
            _ => {
                guest.console.wait_for_round(1);
                guest.finish();
            }
        }
    }
    sharing.pause();
    Holdings::assert_back_to(&before, 4 << 20);
    let statistics = sharing.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes), (0, 0), "{statistics:?}");
}

fn pause_and_reset() {
    let host = Host::serve(&[]);
    let plan =
        Plan { rounds: 0, pages: Some(256), rate: Rate::PerSecond(100), cpus: VCPUS, ..Plan::default() };
    host.done("POST", "/vms", Some(&host.vm("a", &plan, true)));
    for _ in 0..6 {
        for action in ["pause", "resume", "reset"] {
            host.act("a", action);
        }
    }
    let vm = host.done("GET", "/vms/a", None);
    assert_eq!(
        (&vm["state"], &vm["vcpus"], &vm["config"]["smt"]),
        (&json!("running"), &json!(4), &json!(false))
    );
    let metrics = host.client.raw("GET".parse().expect("a method"), "/metrics", Vec::new()).expect("metrics");
    let metrics = String::from_utf8_lossy(&metrics.body).into_owned();
    assert!(metrics.contains("samepage_vm_vcpus{vm=\"a\"} 4"), "{metrics}");
    let deadline = Instant::now() + TIME_LIMIT;
    loop {
        let console = host.client.raw("GET".parse().expect("a method"), "/vms/a/console", Vec::new());
        let console = String::from_utf8_lossy(&console.expect("the backlog").body).into_owned();
        if console.contains("processors asked=4 working=4") && console.contains("round=1 ") {
            break;
        }
        assert!(Instant::now() < deadline, "{console}");
        std::thread::sleep(Duration::from_millis(20));
    }
    host.act("a", "pause");
    host.act("a", "kill");
    host.end().assert_code(0);
}

fn works_alone() {
    let hypervisor = hypervisor();
    let plan = Plan { rounds: 1, pages: Some(64), cpus: 3, ..Plan::default() };
    let mut config = Guest::config("alone", &plan, MEMORY, None);
    config.spec.vcpus = 2;
    let guest = Guest::start(&hypervisor, config);
    assert_eq!(working(&guest.console), 1);
    guest.console.wait_for_round(1);
    assert_eq!(guest.vm.wait(), VmEnd::Reset);
}
