//! `samepage bench` measures, and leaves the host as it was. The results are not judged.

use std::collections::BTreeMap;
use std::fs;

use rustix::process::Signal;
use samepage_machine::Hypervisor;
use samepage_tests::program::{Finished, Running, command};
use serde_json::Value;

/// KSM's settings.
const SETTINGS: [&str; 7] = [
    "run",
    "pages_to_scan",
    "sleep_millisecs",
    "smart_scan",
    "use_zero_pages",
    "advisor_mode",
    "advisor_target_scan_time",
];

fn settings() -> BTreeMap<&'static str, String> {
    let read = |name| Some((name, fs::read_to_string(format!("/sys/kernel/mm/ksm/{name}")).ok()?));
    SETTINGS.into_iter().filter_map(read).collect()
}

fn bench(arguments: &[&str]) -> Finished {
    Running::start(command([&["bench", "sharing"], arguments].concat())).wait()
}

/// Also measures VMs, if the host can run them.
fn vms_are_measured() {
    let finished = bench(&["--quick", "--only", "found", "--json"]);
    finished.assert_code(0);
    let result: Value = serde_json::from_str(&finished.stdout).expect("JSON");
    let found = &result["sections"][0];
    if Hypervisor::open().is_err() {
        assert!(
            found["notes"][0].as_str().is_some_and(|note| note.contains("virtual machines")),
            "{found:#}"
        );
        return;
    }
    let measurements = found["measurements"].as_array().expect("measurements");
    assert_eq!(measurements.len(), 4, "{found:#}");
    for measurement in measurements {
        assert!(measurement["ours"]["median"].as_f64().is_some_and(|time| time > 0.0), "{measurement:#}");
    }
}

/// A single test, because several would set KSM at the same time.
#[test]
fn ratios_are_measured_and_ksm_is_put_back() {
    let before = settings();
    let finished = bench(&["--quick", "--only", "runs", "--json"]);
    finished.assert_code(0);
    assert_eq!(settings(), before);
    let result: Value = serde_json::from_str(&finished.stdout).expect("JSON");
    let measurements: Vec<_> = result["sections"]
        .as_array()
        .expect("sections")
        .iter()
        .filter(|section| section["workload"] == "runs")
        .flat_map(|section| section["measurements"].as_array().expect("measurements"))
        .collect();
    assert!(!measurements.is_empty(), "{result:#}");
    for measurement in measurements {
        assert!(measurement["ours"]["median"].as_f64().is_some_and(|cpu| cpu > 0.0), "{measurement:#}");
        assert_eq!(measurement["ratio"].is_f64(), measurement["other"].is_object(), "{measurement:#}");
    }
    let ratios = |section: &Value| {
        let measurements = section["measurements"].as_array().expect("measurements");
        measurements.iter().all(|measurement| measurement["ratio"].is_f64())
    };
    // The first section is that of KSM at its fastest, which always finishes.
    assert!(!result["without_ksm"].is_null() || ratios(&result["sections"][0]), "{result:#}");

    vms_are_measured();
    assert_eq!(settings(), before);

    let running = Running::start(command(["bench", "sharing", "--only", "runs"]));
    running.stderr().wait_for_line("runs");
    running.signal(Signal::INT);
    let finished = running.wait();
    finished.assert_code(130);
    assert_eq!(finished.stdout, "");
    assert_eq!(settings(), before);
}

#[test]
fn wrong_usage_is_told() {
    for arguments in [&["--only", "nothing"][..], &["--runs", "0"], &["--series", "a,,b"]] {
        bench(arguments).assert_code(2);
    }
    for (arguments, what) in [
        (&["--only", "runs", "--svg", "x.svg"][..], "--only series"),
        (&["--only", "series", "--series", "/no/such/image"], "/no/such/image"),
    ] {
        let finished = bench(arguments);
        finished.assert_code(1);
        assert!(finished.stderr.contains(what), "{}", finished.stderr);
    }
}
