//! Statistics: `--stats`, `--audit` and `samepage demo --json`.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use samepage_resources::demo::layout::Arena;
use samepage_resources::demo::plan::Plan;
use samepage_tests::program::{Running, Transcript};
use serde_json::Value;

use crate::scratch::{Scratch, endless, short};

const PAGE: u64 = 4096;
const MEMORY: u64 = 16 << 20;

/// The figures of the process and of each VM that are in pages, with KSM's names.
const PAGES: [&str; 5] = ["pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "zero_pages"];

fn parse(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line:?}"))
}

fn number(object: &Value, name: &str) -> u64 {
    object[name].as_u64().unwrap_or_else(|| panic!("no number {name} in {object}"))
}

fn vms(sample: &Value) -> &[Value] {
    sample["vms"].as_array().expect("a list of VMs")
}

fn limit_of_mappings() -> u64 {
    fs::read_to_string("/proc/sys/vm/max_map_count").expect("the limit").trim().parse().expect("a number")
}

fn seconds_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs_f64()
}

/// Asserts the conditions that hold for every sample.
fn check(sample: &Value) {
    let sum = |name| vms(sample).iter().map(|vm| number(vm, name)).sum::<u64>();
    assert_eq!(number(sample, "guest_bytes"), sum("memory_bytes"), "{sample}");
    let (private, store) = (number(sample, "private_bytes"), number(sample, "store_bytes"));
    assert_eq!(number(sample, "resident_bytes"), private + store, "{sample}");
    assert!(store >= number(sample, "frames") * PAGE, "{sample}");
    assert!(number(sample, "pages_shared") <= number(sample, "frames"), "{sample}");
    let saved = (number(sample, "pages_sharing") + number(sample, "zero_pages")) * PAGE;
    assert!(sample["saved_bytes"].as_i64().expect("a number") <= saved as i64, "{sample}");
    let mappings = number(sample, "mappings");
    assert!((1..=number(sample, "mappings_limit")).contains(&mappings), "{sample}");
    assert_eq!(number(sample, "mappings_limit"), limit_of_mappings());
    for name in PAGES {
        number(sample, name);
    }
    for vm in vms(sample) {
        let pages = number(vm, "pages");
        assert_eq!(number(vm, "memory_bytes"), pages * PAGE);
        assert!(number(vm, "resident_bytes") <= number(vm, "memory_bytes"), "{vm}");
        assert!(number(vm, "pages_merged") + number(vm, "pages_private") <= pages, "{vm}");
        assert!(number(vm, "pages_sharing") <= number(vm, "pages_merged"), "{vm}");
        for name in PAGES {
            assert!(number(vm, name) <= pages, "{name} in {vm}");
        }
    }
}

/// Waits for a sample for which `found` returns true. Checks all samples before it, and their order.
fn wait_for_sample(samples: &Transcript, found: impl Fn(&Value) -> bool) -> Value {
    let last = std::cell::RefCell::new(Value::Null);
    samples.wait_for(|line| {
        let sample = parse(line);
        check(&sample);
        let before = last.replace(sample.clone());
        if !before.is_null() {
            let step = |name: &str| sample[name].as_f64().unwrap() - before[name].as_f64().unwrap();
            assert!(step("time_seconds") > 0.0 && step("full_scans") >= 0.0, "{before} then {sample}");
            assert!(
                (0.0..=step("time_seconds") + 0.1).contains(&step("cpu_seconds")),
                "{before} then {sample}"
            );
        }
        found(&sample).then_some(sample)
    })
}

pub(crate) fn while_sharing() {
    let plan = Plan { pages: Some(2048), rounds: 0, every_ms: 100, ..Plan::default() };
    let counts = Arena::on_map(&plan, std::iter::once(0..MEMORY)).unwrap().counts();
    let started = seconds_now();
    let scratch = Scratch::new();
    let running = scratch
        .start(format!("{plan} vm={{index}}"), &["--count=2", "--name=s", "--console=off", "--stats=-"]);
    let saved = |sample: &Value| number(sample, "pages_sharing") + number(sample, "zero_pages");
    let sample = wait_for_sample(running.stdout(), |sample| saved(sample) >= counts.reclaimable(2));
    let time = sample["time_seconds"].as_f64().unwrap();
    assert!((started..=seconds_now()).contains(&time), "{time}");
    assert_eq!(sample["sharing"], true);
    assert_eq!(number(&sample, "guest_bytes"), 2 * MEMORY);
    assert!(number(&sample, "full_scans") > 0, "{sample}");
    assert!(number(&sample, "pages_shared") >= counts.alike, "{sample}");
    // Both guests' memory was touched, and most of it is freed.
    let resident = number(&sample, "resident_bytes");
    assert!((counts.own * 2 * PAGE..2 * MEMORY).contains(&resident), "{sample}");
    // The figures of the VMs add up to those of the process, apart from rounding.
    for name in ["pages_sharing", "zero_pages"] {
        let parts: u64 = vms(&sample).iter().map(|vm| number(vm, name)).sum();
        assert!(parts.abs_diff(number(&sample, name)) <= 2, "{name} in {sample}");
    }
    for (index, vm) in vms(&sample).iter().enumerate() {
        assert_eq!((&vm["name"], &vm["state"]), (&format!("s-{index}").into(), &"running".into()));
        assert!(number(vm, "pages_merged") >= counts.alike, "{vm}");
        assert!(number(vm, "zero_pages") >= counts.zero, "{vm}");
        assert!(number(vm, "pages_private") >= counts.own, "{vm}");
    }
    running.signal(Signal::TERM);
    let end = running.wait();
    end.assert_code(0);
    end.stdout.lines().for_each(|line| check(&parse(line)));
}

pub(crate) fn groups_and_modes() {
    let plan = Plan { pages: Some(2048), rounds: 0, every_ms: 100, ..Plan::default() };
    let scratch = Scratch::new();
    let arguments =
        ["--count=2", "--name=s", "--console=off", "--stats=-", "--share-group={name}", "--sharing=zero"];
    let running = scratch.start(format!("{plan} vm={{index}}"), &arguments);
    let sample = wait_for_sample(running.stdout(), |sample| {
        sample["groups"]
            .as_array()
            .expect("a list of groups")
            .iter()
            .filter(|group| number(group, "zero_pages") > 0)
            .count()
            == 2
    });
    let names = |list: &str, field: &str| -> Vec<_> {
        sample[list].as_array().expect(list).iter().map(|item| item[field].clone()).collect()
    };
    assert_eq!(names("groups", "name"), ["default", "s-0", "s-1"], "{sample}");
    assert_eq!(
        (names("vms", "group"), names("vms", "mode")),
        (vec!["s-0".into(), "s-1".into()], vec!["zero".into(); 2])
    );
    assert_eq!((number(&sample, "pages_sharing"), number(&sample, "merges")), (0, 0), "{sample}");
    running.signal(Signal::TERM);
    running.wait().assert_code(0);
}

pub(crate) fn without_sharing() {
    let scratch = Scratch::new();
    let running = scratch.start(endless(), &["--sharing=off", "--console=off", "--stats=-"]);
    let sample = wait_for_sample(running.stdout(), |sample| number(&vms(sample)[0], "pages_private") >= 256);
    assert_eq!(sample["sharing"], false);
    for name in ["pages_sharing", "zero_pages", "frames", "store_bytes", "full_scans"] {
        assert_eq!(number(&sample, name), 0, "{name} in {sample}");
    }
    assert_eq!(sample["saved_bytes"], 0);
    assert!(!running.threads().iter().any(|name| name.starts_with("sharing-")), "{:?}", running.threads());
    running.signal(Signal::TERM);
    running.wait().assert_code(0);
}

pub(crate) fn appended() {
    let scratch = Scratch::new();
    let mut lines = 0;
    for _ in 0..2 {
        let end = scratch.start(short(), &["--stats=stats.jsonl", "--audit"]).wait();
        end.assert_code(0);
        let audit = end.stderr.lines().find(|line| line.contains("audit of")).expect(&end.stderr);
        assert!(audit.contains("audit of 4096 pages and ") && audit.ends_with(" passed"), "{audit}");
        // There is a line for the end, even if the run was too short for others.
        let text = scratch.read_text("stats.jsonl");
        text.lines().for_each(|line| check(&parse(line)));
        assert_eq!(vms(&parse(text.lines().last().unwrap()))[0]["state"], "ended");
        assert!(text.lines().count() > lines, "{text}");
        lines = text.lines().count();
    }
}

pub(crate) fn demo() {
    let end = Running::start(Scratch::new().samepage(&["demo", "--json", "--vms=2", "--cpu=100"])).wait();
    end.assert_code(0);
    assert_eq!(end.stderr, "");
    let summary = parse(&end.stdout);
    assert_eq!(number(&summary, "vms"), 2);
    assert_eq!(number(&summary, "corrupt"), 0);
    assert_eq!(summary["unfinished"], Value::Array(Vec::new()));
    assert!(number(&summary, "can_save_at_least_bytes") > 0, "{summary}");
    assert!(number(&summary, "saved_bytes") >= number(&summary, "can_save_at_least_bytes"), "{summary}");
    assert!(
        number(&summary, "resident_after_bytes") < number(&summary, "resident_before_bytes"),
        "{summary}"
    );
    assert!(number(&summary, "pages_verified") > 0 && number(&summary, "pages_written") > 0, "{summary}");
}
