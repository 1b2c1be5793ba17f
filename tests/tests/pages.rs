//! Page types and maps of memory, as clients of the control socket get them.

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use samepage_api_types::by_type::{ByType, TypeSample};
use samepage_hole::PageType;
use samepage_resources::demo::plan::Plan;
use samepage_tests::api::{Host, MEMORY};
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::harness::{self, Need};
use samepage_tests::program::{Finished, Running, command};
use serde_json::{Value, json};
use xtask::artifacts::{Artifacts, COMMAND_LINE};

fn main() -> ExitCode {
    harness::run_all(&[
        ("pages_of_guests_without_an_agent_are_unknown_and_are_counted", &[Need::Kvm], without_agent),
        ("memory_is_a_picture_of_any_fineness", &[Need::Kvm], maps),
        ("a_vm_that_has_ended_has_no_pages", &[Need::Kvm], ended),
        ("memory_that_is_not_shared_has_a_map_as_well", &[Need::Kvm], without_sharing),
        (
            "linux_guests_say_what_their_pages_are_for_and_what_is_shared_is_told_by_type",
            &[Need::Kvm, Need::LinuxGuest],
            with_agents,
        ),
    ])
}

const PAGES: u64 = MEMORY / 4096;

/// A guest that continues until it is asked to finish.
fn endless(vm: u32) -> Plan {
    Plan { vm, rounds: 0, every_ms: 20, pages: Some(4096), ..Plan::default() }
}

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or_else(|| panic!("no number {name} in {value}"))
}

/// Returns the sum of a figure over all types.
fn sum(types: &Value, name: &str) -> u64 {
    let types = types.as_object().unwrap();
    assert_eq!(types.len(), PageType::ALL.len());
    types.values().map(|one| number(one, name)).sum()
}

/// Returns the sums of a map's states.
fn states(map: &Value) -> [u64; 4] {
    ["shared", "private", "zero", "absent"]
        .map(|state| map["cells"].as_array().unwrap().iter().map(|cell| number(&cell["states"], state)).sum())
}

/// Checks that cells cover all memory, in order and with equal lengths.
fn assert_map(map: &Value, pages: u64, most: usize) {
    let cells = map["cells"].as_array().unwrap();
    assert!((1..=most).contains(&cells.len()), "{} cells", cells.len());
    let mut next = 0;
    for (at, cell) in cells.iter().enumerate() {
        assert_eq!(number(cell, "first_page"), next, "{cell}");
        assert!(at + 1 == cells.len() || cell["pages"] == cells[0]["pages"], "{cell}");
        let counted = ["shared", "private", "zero", "absent"].map(|state| number(&cell["states"], state));
        assert_eq!(counted.iter().sum::<u64>(), number(cell, "pages"), "{cell}");
        next += number(cell, "pages");
    }
    assert_eq!(next, pages);
}

fn start_two(host: &Host) {
    for (vm, name) in (0..).zip(["a", "b"]) {
        host.done("POST", "/vms", Some(&host.vm(name, &endless(vm), true)));
    }
    host.wait_for("/sharing/pairs", "two VMs that share", |pairs| pairs[0]["pages"].as_u64() > Some(0));
}

fn without_agent() {
    let host = Host::serve(&["--sharing-cpu", "100"]);
    start_two(&host);
    let vm = host.wait_for("/vms/a/pages", "pages on frames", |vm| {
        vm["types"]["unknown"]["pages_merged"].as_u64() > Some(0)
    });
    assert_eq!(
        (&vm["publishing"], &vm["agent"], &vm["given_back_bytes"]),
        (&json!(false), &Value::Null, &json!(0))
    );
    let unknown = &vm["types"]["unknown"];
    assert_eq!((number(unknown, "pages"), sum(&vm["types"], "pages")), (PAGES, PAGES));
    assert_eq!(number(unknown, "bytes"), MEMORY);
    assert_eq!(number(unknown, "shared_bytes"), number(unknown, "pages_merged") * 4096);
    assert!(number(unknown, "pages_merged") + number(unknown, "pages_private") <= PAGES, "{unknown}");
    let all = host.done("GET", "/pages", None);
    assert_eq!((number(&all, "vms"), number(&all, "publishing")), (2, 0));
    assert_eq!(sum(&all["types"], "pages"), 2 * PAGES);
    // Metrics by type exist only for guests with an agent.
    let metrics = host.client.raw("GET".parse().unwrap(), "/metrics", Vec::new()).unwrap();
    assert!(!String::from_utf8(metrics.body).unwrap().contains("samepage_vm_type_pages{"));
    let report = report(&host, &[]);
    report.assert_code(0);
    assert!(report.stdout.contains("0 of 2 guests publish"), "{}", report.stdout);
    host.end().assert_code(0);
}

fn maps() {
    let host = Host::serve(&["--sharing-cpu", "100"]);
    start_two(&host);
    for cells in [1_u32, 7, 1000, 1024, 16_384] {
        let map = host.done("GET", &format!("/vms/a/pages/map?cells={cells}"), None);
        assert_map(&map, PAGES, cells as usize);
        assert_eq!(map["publishing"], false);
        assert_eq!(map["cells"][0]["types"], Value::Null, "nobody says anything: {map}");
    }
    let map = host.done("GET", "/vms/a/pages/map", None);
    assert_map(&map, PAGES, 1024);
    let [shared, private, _, absent] = states(&map);
    assert!(shared > 0 && private > 0 && absent > 0, "{shared} {private} {absent}");
    // A later map is new, and requests at the same time get the same map.
    let first = number_of_looks(&map);
    let again = host.wait_for("/vms/a/pages/map", "another look", |map| number_of_looks(map) > first);
    assert_map(&again, PAGES, 1024);
    for wrong in ["0", "16385", "-1", "x", "", "1&cells=2", "1&more=1", "99999999999"] {
        let (status, problem) = host.ask("GET", &format!("/vms/a/pages/map?cells={wrong}"), None);
        assert_eq!((status, &problem["type"]), (400, &json!("urn:samepage:problem:bad-request")), "{wrong}");
    }
    assert_eq!(host.ask("GET", "/vms/nobody/pages", None).0, 404);
    assert_eq!(host.ask("GET", "/vms/nobody/pages/map", None).0, 404);
    host.end().assert_code(0);
}

/// Returns the time of a map.
fn number_of_looks(map: &Value) -> f64 {
    map["time_seconds"].as_f64().unwrap()
}

fn ended() {
    let host = Host::serve(&[]);
    host.done("POST", "/vms", Some(&host.vm("a", &endless(0), true)));
    host.wait_for("/vms/a/pages", "pages", |vm| vm["types"].is_object());
    assert_map(&host.done("GET", "/vms/a/pages/map?cells=64", None), PAGES, 64);
    assert_eq!(host.act("a", "kill"), "stopped");
    let vm = host.done("GET", "/vms/a/pages", None);
    assert_eq!(vm, json!({ "publishing": false, "given_back_bytes": 0 }));
    let map = host.done("GET", "/vms/a/pages/map", None);
    assert_eq!(map, json!({ "publishing": false, "cells": [] }));
    let report = report(&host, &[]);
    report.assert_code(1);
    assert!(report.stderr.contains("there are no VMs with memory"), "{}", report.stderr);
    // After a new boot, the VM has a map immediately, and not an old one.
    assert_eq!(host.act("a", "start"), "running");
    assert_map(&host.done("GET", "/vms/a/pages/map?cells=64", None), PAGES, 64);
    host.end().assert_code(0);
}

fn without_sharing() {
    let host = Host::serve(&["--no-sharing"]);
    host.done("POST", "/vms", Some(&host.vm("a", &endless(0), true)));
    host.wait_for_console("a", "round=");
    let map = host.wait_for("/vms/a/pages/map", "memory that was touched", |map| states(map)[1] > 1000);
    assert_map(&map, PAGES, 1024);
    let [shared, _, zero, absent] = states(&map);
    assert!(shared == 0 && zero == 0 && absent > 0, "{map}");
    let vm = host.wait_for("/vms/a/pages", "pages", |vm| {
        vm["types"]["unknown"]["pages_private"].as_u64() > Some(1000)
    });
    assert_eq!(sum(&vm["types"], "pages"), PAGES);
    host.end().assert_code(0);
}

/// Runs `samepage report types` for a process.
fn report(host: &Host, arguments: &[&str]) -> Finished {
    let mut report = command(["report", "types"]);
    report.args(arguments).env("SAMEPAGE_SOCKET", host.socket()).current_dir(host.folder.path());
    Running::start(report).wait()
}

/// Returns a VM with Linux that fills memory, and repeatedly changes a part of it when it is idle.
fn linux(artifacts: &Artifacts, name: &str) -> Value {
    let changes: String = (1..40).map(|round| format!(",sleep:6000,change:8:{round}")).collect();
    json!({
        "name": name,
        "kernel": artifacts.kernel,
        "initrd": artifacts.initramfs,
        "memory": MEMORY,
        "cmdline": format!(
            "{COMMAND_LINE} agent=mount:/dev/vda:/mnt:ro,sum:/mnt/small,fill:8M:7,publish:30000{changes},idle"
        ),
        "disks": [{ "path": artifacts.disk, "id": "data", "readonly": true }],
        "start": true,
    })
}

fn with_agents() {
    let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
    let folder = tempfile::tempdir().unwrap();
    let stats = folder.path().join("stats.jsonl");
    let host = Host::serve_in(folder, &["--sharing-cpu", "100", "--stats", &stats.display().to_string()]);
    for name in ["linux1", "linux2"] {
        host.done("POST", "/vms", Some(&linux(&artifacts, name)));
    }
    // The pages that both fill identically are shared, and the changed ones were shared before. A pass takes
    // many seconds if the guest's kernel is interpreted. The host believes it for three times the published
    // time of the next pass.
    const FILLED: u64 = (8 << 20) / 4096;
    let is_told = |vm: &Value| {
        let anonymous = &vm["types"]["anonymous"];
        vm["publishing"] == true
            && anonymous["pages_merged"].as_u64() > Some(FILLED / 2)
            && anonymous["broken"].as_u64() >= Some(FILLED / 16)
    };
    let begun = Instant::now();
    for vm in ["linux1", "linux2"] {
        while !is_told(&host.done("GET", &format!("/vms/{vm}/pages"), None)) {
            assert!(begun.elapsed() < 5 * TIME_LIMIT, "{}", host.console(vm));
            // Statistics have no events, so poll.
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    let vm = host.done("GET", "/vms/linux1/pages", None);
    let types = &vm["types"];
    for name in ["anonymous", "slab", "page_table", "free", "unknown"] {
        assert!(number(&types[name], "pages") > 0, "{name} in {types}");
    }
    let files = number(&types["file_mapped"], "pages") + number(&types["file_unmapped"], "pages");
    assert!(files > 0, "{types}");
    assert!(number(&types["anonymous"], "pages") >= FILLED, "{types}");
    assert_eq!(sum(types, "pages"), PAGES);
    // A life longer than the time of observation has no figure.
    let watched = types["anonymous"]["watched_seconds"].as_f64().unwrap();
    let life = types["anonymous"]["mean_life_seconds"].as_f64();
    assert!(watched > 1.0 && life.is_none_or(|life| (1.0..=watched).contains(&life)), "{types}");
    assert!(vm["agent"]["passes"].as_u64() > Some(0), "{vm}");
    let all = host.done("GET", "/pages", None);
    assert_eq!((number(&all, "vms"), number(&all, "publishing")), (2, 2));

    let map = host.done("GET", "/vms/linux1/pages/map?cells=4096", None);
    assert_map(&map, PAGES, 4096);
    assert_eq!(map["publishing"], true);
    let cells = map["cells"].as_array().unwrap();
    let anonymous: u64 = cells.iter().filter_map(|cell| cell["types"]["anonymous"].as_u64()).sum();
    assert!(anonymous >= FILLED, "{anonymous}");
    let counted = cells.iter().flat_map(|cell| cell["types"].as_object().unwrap().values());
    assert_eq!(counted.map(|pages| pages.as_u64().unwrap()).sum::<u64>(), PAGES);

    let metrics = host.client.raw("GET".parse().unwrap(), "/metrics", Vec::new()).unwrap();
    let metrics = String::from_utf8(metrics.body).unwrap();
    for line in [
        "samepage_vm_type_pages{vm=\"linux1\",type=\"anonymous\"} ",
        "samepage_vm_type_merged_pages{vm=\"linux2\",type=\"file_mapped\"} ",
        "samepage_vm_type_breaks_total{vm=\"linux1\",type=\"anonymous\"} ",
        "samepage_vm_given_back_pages_total{vm=\"linux1\"} ",
    ] {
        assert!(metrics.contains(line), "{line} is missing:\n{metrics}");
    }
    reports(&host, &stats.display().to_string());
    host.end().assert_code(0);
}

/// Checks the reports about two Linux guests, live and from a file.
fn reports(host: &Host, stats: &str) {
    let live = report(host, &[]);
    live.assert_code(0);
    println!("{}", live.stdout);
    let row = |line: &&str| line.contains("anonymous");
    assert_eq!(live.stdout.lines().filter(row).count(), 3, "{}", live.stdout);
    assert!(live.stdout.contains("2 of 2 guests publish"), "{}", live.stdout);
    let one = report(host, &["--vm", "linux2"]);
    assert_eq!(one.stdout.lines().filter(row).count(), 1, "{}", one.stdout);
    report(host, &["--vm", "nobody"]).assert_code(1);

    let picture = report(host, &["--stats", stats, "--json", "--output", "types.svg"]);
    picture.assert_code(0);
    let json: Value = serde_json::from_str(&picture.stdout).unwrap();
    assert_eq!(json["vms"].as_array().unwrap().len(), 2, "{json}");
    let all: ByType<Value> = serde_json::from_value(json["all"].clone()).unwrap();
    let watched = all.anonymous["watched_seconds"].as_f64();
    let life = all.anonymous["mean_life_seconds"].as_f64();
    // Pages may have been merged before the agent's first message, and none may be broken at the last sample.
    assert!(life <= watched && watched > Some(0.0), "{json}");
    let moments = json["moments"].as_array().unwrap();
    assert!(moments.len() > 10, "{}", moments.len());
    let last = &moments[moments.len() - 1]["types"]["anonymous"];
    assert!(number(last, "shared_bytes") > 0, "{last}");
    let svg = fs::read_to_string(host.folder.path().join("types.svg")).unwrap();
    assert!(svg.starts_with("<?xml") && svg.contains("<path class=\"anonymous shared\""), "{svg}");
    // The lines of the file use the same names.
    let text = fs::read_to_string(stats).unwrap();
    let samples = text.lines().filter_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        let anonymous = line["vms"][0]["claimed"]["types"]["anonymous"].clone();
        serde_json::from_value::<TypeSample>(anonymous).ok()
    });
    let samples: Vec<_> = samples.collect();
    let any = samples.iter().any(|sample| sample.pages > 0 && sample.pages_merged > 0);
    assert!(any, "{samples:?}");
}
