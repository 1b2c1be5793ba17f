//! Guests that all make their shared memory private at once, where that memory does not exist.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use samepage_resources::demo::content::Class;
use samepage_resources::demo::plan::{Classes, Plan};
use samepage_tests::api::Host;
use samepage_tests::harness;
use samepage_tests::limited::Limited;
use serde_json::{Value, json};

fn main() -> ExitCode {
    harness::run(&[
        ("a_storm_of_64_vms_in_half_more_than_they_have_kills_nobody", || {
            run(64, 16, Bound::OfResident(150), "s")
        }),
        ("four_vms_of_128_mib_run_to_their_end_in_256_mib", || run(4, 128, Bound::Mib(256), "q")),
    ])
}

/// The longest wait for anything here.
const PATIENCE: Duration = Duration::from_secs(240);
const PAGE: u64 = 4096;

/// The limit of the control group.
enum Bound {
    /// In percent of what is resident once memory is shared.
    OfResident(u64),
    Mib(u64),
}

/// VMs share nine tenths of their memory. Then each does what `word` says, verifies its memory and ends: it rewrites all of
/// what it shares, each page differently, for the word `s`.
fn run(vms: u32, mib: u64, bound: Bound, word: &str) {
    // The program may have to be built, which is not to count.
    samepage_tests::program::path();
    let Some(group) = Limited::enter("storm") else {
        println!("not run: this process may not make a control group with a limit of memory");
        return;
    };
    let host = Host::serve(&["--sharing-cpu", "100", "--overcommit", "8"]);
    group.leave();
    if let Bound::Mib(mib) = bound {
        limit(&host, &group, mib << 20);
    }
    for vm in 0..vms {
        let plan = Plan {
            vm,
            alike: 90,
            own: 10,
            zero: 0,
            write: Classes::new(&[Class::Alike]),
            rounds: 0,
            every_ms: 500,
            ..Plan::default()
        };
        let mut body = host.vm(&name(vm), &plan, true);
        body["memory"] = json!(mib << 20);
        host.done("POST", "/vms", Some(&body));
    }
    let wanted = u64::from(vms - 1) * (mib << 20) / PAGE * 70 / 100;
    wait(&host, "/sharing", |sharing| sharing["statistics"]["pages_sharing"].as_u64().unwrap_or(0) >= wanted);
    if let Bound::OfResident(percent) = bound {
        limit(&host, &group, group.usage() * percent / 100);
    }
    let began = Instant::now();
    for vm in 0..vms {
        host.done("POST", &format!("/vms/{}/console/input", name(vm)), Some(&json!(word)));
    }
    wait(&host, "/vms", |list| {
        let list = list.as_array().expect("a list of VMs");
        list.iter().all(|vm| vm["state"] == "stopped")
    });
    let took = began.elapsed();
    for vm in 0..vms {
        let console = host.console(&name(vm));
        assert!(console.contains("corrupt=0"), "{}: {console}", name(vm));
    }
    assert_eq!(group.kills(), 0, "the kernel has killed");
    let memory = host.done("GET", "/memory", None);
    println!("{vms} VMs of {mib} MiB: {:.1} s; {memory}", took.as_secs_f64());
    assert!(memory["changes"].as_u64().unwrap_or(0) > 0, "memory was never short: {memory}");
    host.end().assert_code(0);
}

/// Limits the memory, and waits until samepage has seen that.
fn limit(host: &Host, group: &Limited, bytes: u64) {
    group.limit(bytes);
    wait(host, "/memory", |memory| memory["of_bytes"].as_u64().unwrap_or(u64::MAX) <= bytes);
}

fn name(vm: u32) -> String {
    format!("vm-{vm}")
}

fn wait(host: &Host, path: &str, holds: impl Fn(&Value) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let json = host.done("GET", path, None);
        if holds(&json) {
            return;
        }
        assert!(Instant::now() < deadline, "{path}: {json}; {}", host.done("GET", "/memory", None));
        // Statistics have no events, so poll.
        std::thread::sleep(Duration::from_millis(50));
    }
}
