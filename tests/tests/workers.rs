//! VMs in worker processes: they share memory with VMs of other workers, and a worker that is killed takes nobody
//! else's VMs along.

use std::collections::BTreeSet;
use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use samepage_resources::demo::client::ClientPlan;
use samepage_resources::demo::plan::{HoleMode, Plan, Rate};
use samepage_tests::api::Host;
use samepage_tests::disks::{with_client, write_image};
use samepage_tests::harness;
use samepage_tests::progress::wait_until;
use samepage_tests::shared::churn;
use serde_json::{Value, json};

/// How often workers are killed, unless the environment says otherwise.
const KILLS: u32 = 6;

fn main() -> ExitCode {
    harness::run(&[
        ("vms_of_several_workers_share_and_end_as_others_do", share_and_end),
        ("a_worker_that_is_killed_takes_its_vms_along_and_nobody_else", killed),
        ("a_worker_that_does_not_answer_holds_up_nobody_else", silent),
        ("a_guest_in_a_worker_tells_what_its_pages_are_for", types),
        ("a_console_in_a_worker_is_read_and_typed_to", console),
        ("disks_of_a_vm_in_a_worker_are_read_directly", disks),
        ("disks_of_vms_in_several_workers_have_one_cache", cached_disks),
        ("a_worker_may_be_killed_while_its_disks_are_read", killed_reading),
    ])
}

/// Guest-physical address of a balloon that comes after the entropy device alone.
const BALLOON: u64 = 0xd000_1000;

/// The worker processes of a server.
fn workers(server: &Host) -> BTreeSet<i32> {
    let parent = server.running.pid().as_raw_nonzero().get();
    let processes = fs::read_dir("/proc").expect("list the processes");
    let ids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_worker = |id: &i32| {
        let Ok(status) = fs::read_to_string(format!("/proc/{id}/status")) else { return false };
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name).map(str::trim));
        field("PPid:").and_then(|text| text.parse().ok()) == Some(parent)
            && field("State:").is_some_and(|state| !state.starts_with('Z'))
    };
    ids.filter(is_worker).collect()
}

/// The worker process that has a VM: one of its threads is named after the VM.
fn worker_of(server: &Host, vm: &str) -> Pid {
    let has_vm = |id: &i32| {
        let threads = fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
        let names = threads.filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok());
        names.into_iter().any(|name| name.trim() == format!("vcpu-{vm}-0"))
    };
    let workers: Vec<_> = workers(server).into_iter().filter(has_vm).collect();
    let [worker] = workers[..] else { panic!("{workers:?} have VM {vm}") };
    Pid::from_raw(worker).expect("a process")
}

fn quiet(vm: u32) -> Plan {
    Plan { vm, rounds: 0, pages: Some(2048), ..Plan::default() }
}

fn share_and_end() {
    let server = Host::serve(&["--vms-per-worker", "2", "--sharing-cpu", "100", "--audit"]);
    wait_until("a spare worker", || workers(&server).len() == 1);
    for (index, name) in ["a", "b", "c"].into_iter().enumerate() {
        server.done("POST", "/vms", Some(&server.vm(name, &quiet(index as u32), true)));
    }
    assert_ne!(worker_of(&server, "b"), worker_of(&server, "c"));
    wait_until("two workers and a spare one", || workers(&server).len() == 3);
    // More than the VMs of one worker have in common.
    wait_until("sharing between workers", || {
        let all = server.done("GET", "/sharing", None);
        all["pairs"].as_array().is_some_and(|pairs| pairs.len() == 3)
    });
    assert!(server.shared() > 0);
    let all = server.done("GET", "/sharing", None);
    let processes: Vec<_> = workers(&server).into_iter().collect();
    let mut listed = BTreeSet::new();
    for worker in all["workers"].as_array().expect("workers") {
        assert!(worker["private_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{worker}");
        assert!(worker["cpu_seconds"].as_f64().is_some(), "{worker}");
        listed.extend(worker["process"].as_i64().map(|id| id as i32));
    }
    assert!(processes.iter().all(|id| listed.contains(id)), "{processes:?} in {listed:?}");
    assert_eq!(server.done("GET", "/vms/b", None)["worker"], worker_of(&server, "b").as_raw_nonzero().get());
    assert_eq!(server.act("a", "pause"), "paused");
    assert_eq!(server.act("a", "resume"), "running");
    assert_eq!(server.act("b", "reset"), "running");
    let before = server.round("a");
    wait_until("more rounds", || server.round("a") != before);
    assert_eq!(server.act("c", "stop"), "stopped");
    let shown = server.done("GET", "/vms/a", None);
    assert!(shown["cpu_seconds"].as_f64().expect("CPU time") > 0.0, "{shown}");
    assert!(shown["console"]["sent_bytes"].as_u64().expect("output") > 0, "{shown}");
    let refused = json!({ "name": "d", "kernel": "/dev/null" });
    assert!(server.ask("POST", "/vms", Some(&refused)).0 >= 400);
    let mut tap = server.vm("d", &quiet(3), false);
    tap["networks"] = json!([{ "fd": 9 }]);
    let (status, refused) = server.ask("POST", "/vms", Some(&tap));
    assert!(
        status >= 400 && refused["detail"].as_str().is_some_and(|text| text.contains("fd=")),
        "{refused}"
    );
    server.done("DELETE", "/vms/c", None);
    // It was alone in its worker.
    wait_until("the end of a worker without VMs", || workers(&server).len() == 2);
    drop(server.end_sound(0));
}

fn killed() {
    let kills = std::env::var("SAMEPAGE_TEST_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number"));
    let server = Host::serve(&["--vms-per-worker", "1", "--sharing-cpu", "100", "--audit"]);
    // They give pages back all the while.
    let plan = |vm| Plan { vm, pages: Some(1024), every_ms: 20, balloon: Some(BALLOON), ..churn() };
    for (vm, name) in [(0, "witness"), (1, "victim")] {
        let mut body = server.vm(name, &plan(vm), true);
        body["balloon"] = json!({});
        server.done("POST", "/vms", Some(&body));
    }
    for kill in 0..kills {
        wait_until("sharing", || server.shared() > 0);
        let before = server.round("witness");
        let victim = worker_of(&server, "victim");
        // At any point of whatever it does.
        std::thread::sleep(Duration::from_micros(u64::from(kill) * 1_717 % 20_000));
        kill_process(victim, Signal::KILL).expect("kill the worker");
        wait_until("the end of the VM", || server.state("victim") == "failed");
        let shown = server.done("GET", "/vms/victim", None);
        let reason = shown["reason"].as_str().expect("a reason");
        assert!(reason.contains("worker") && reason.contains("signal 9"), "{reason}");
        wait_until("its frames", || server.shared() == 0);
        wait_until("a round of the other VM", || server.round("witness") > before);
        assert_eq!(server.act("victim", "start"), "running");
    }
    assert_eq!(server.state("witness"), "running");
    let balloon = server.done("GET", "/vms/witness/balloon", None);
    let count = |name: &str| balloon["statistics"][name].as_u64().expect("a number");
    assert!(count("freed_pages") > 1000 && count("errors") == 0, "{balloon}");
    // The process says that VMs have failed.
    drop(server.end_sound(1));
}

fn console() {
    let server = Host::serve(&["--vms-per-worker", "8", "--audit"]);
    let plan = Plan { rounds: 1, rate: Rate::PerSecond(0), pages: Some(64), ..Plan::default() };
    server.done("POST", "/vms", Some(&server.vm("a", &plan, true)));
    wait_until("the end of the guest", || server.state("a") == "stopped");
    let text = server.console("a");
    // The last line came before the end.
    assert!(text.trim_end().ends_with("corrupt=0"), "{text}");
    let (status, answer): (u16, Value) = server.ask("POST", "/vms/a/console/input", None);
    assert!(status >= 400, "{answer}");
    drop(server.end_sound(0));
}

fn disks() {
    let server = Host::serve(&["--vms-per-worker", "8"]);
    let image = server.folder.path().join("disk.img");
    fs::write(&image, [0; 1 << 16]).expect("write an image");
    let policies = ["exclusive", "scrub", "inclusive", "none", "buffered"];
    let disk = |policy: &&str| json!({ "path": image, "readonly": true, "format": "raw", "cache": policy });
    let mut vm = server.vm("a", &quiet(0), true);
    vm["disks"] = policies.iter().map(disk).collect();
    let made = server.done("POST", "/vms", Some(&vm));
    let disks = made["disks"].as_array().expect("disks");
    for (disk, wanted) in disks.iter().zip(policies) {
        let notices: Vec<_> =
            disk["notices"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let told = notices.iter().any(|notice| notice.contains("--vms-per-worker"));
        let has_another = !["none", "buffered"].contains(&wanted);
        assert_eq!(told, has_another, "{disk}");
        assert_eq!(disk["cache"], if has_another { "none" } else { wanted }, "{disk}");
        assert!(!notices.iter().any(|notice| notice.contains("does not run")), "{disk}");
    }
    assert_eq!(disks.len(), policies.len());
    server.end().assert_code(0);
}

/// Options for VMs whose disks are served from the block cache.
const CACHED: [&str; 6] =
    ["--vms-per-worker", "1", "--worker-block-cache", "--sharing-cpu", "100", "--audit"];

/// How guests read an image of so many blocks: runs, which are mapped, or single blocks, which are copied.
fn client(blocks: u32, run: u32) -> ClientPlan {
    ClientPlan { pages: 300, blocks, run, units: u64::from(600 / run), ..ClientPlan::default() }
}

fn cached_disks() {
    let server = Host::serve(&CACHED);
    let folder = server.folder.path();
    write_image(&folder.join("disk.img"), 640);
    // An overlay holds nothing, so all of it is its base's.
    let base = json!({ "path": folder.join("disk.img"), "format": "raw", "readonly": true });
    let overlay = json!({ "path": folder.join("top.qcow2"), "backing": folder.join("disk.img"), "backing_format": "raw", "create": true });
    let others = json!([{ "path": folder.join("own.img"), "format": "raw" }]);
    fs::write(folder.join("own.img"), [0; 1 << 16]).expect("write an image");
    let counters = |vm: &str| {
        let disk = &server.done("GET", &format!("/vms/{vm}"), None)["disks"][0];
        let count = |name: &str| disk["statistics"][name].as_u64().expect("a counter");
        assert_eq!(disk["statistics"]["errors"], 0, "{disk}");
        (count("blocks_from_guests") + count("blocks_from_host"), count("blocks_fetched"))
    };
    for (vm, run, disk) in [(0, 16, &base), (1, 16, &overlay), (2, 1, &base)] {
        let name = format!("vm{vm}");
        let plan = Plan { pages: Some(256), ..quiet(vm) };
        let mut vm = server.vm(&name, &with_client(plan, client(640, run)), true);
        vm["disks"] = json!([disk, others[0]]);
        // One writer.
        if run != 16 || disk != &base {
            vm["disks"].as_array_mut().expect("disks").pop();
        }
        let made = server.done("POST", "/vms", Some(&vm));
        assert_eq!(made["disks"][0]["cache"], "exclusive", "{made}");
        assert!(made["disks"][0]["notices"].is_null(), "{made}");
        if let Some(own) = made["disks"].get(1) {
            assert_eq!(own["cache"], "none");
            assert!(own["notices"][0].as_str().is_some_and(|notice| notice.contains("backing=")), "{own}");
        }
        wait_until("rounds", || server.round(&name) > 2);
    }
    let counted = ["vm0", "vm1", "vm2"].map(counters);
    // The first guest has no use of others, and its own pages are read over and over.
    assert!(counted[0].1 > 0, "{counted:?}");
    assert!(counted[1].0 > 0 && counted[2].0 > 0, "{counted:?}");
    // The policy can be changed.
    let path = "/vms/vm0/disks/disk0";
    server.done("PATCH", path, Some(&json!({ "cache": "none" })));
    let round = server.round("vm0");
    wait_until("a round without the cache", || server.round("vm0") > round + 1);
    let before = counters("vm0");
    let round = server.round("vm0");
    wait_until("another one", || server.round("vm0") > round + 1);
    assert_eq!(counters("vm0"), before);
    server.done("PATCH", path, Some(&json!({ "cache": "inclusive" })));
    wait_until("blocks from the cache", || counters("vm0") > before);
    drop(server.end_sound(0));
}

fn killed_reading() {
    let kills = std::env::var("SAMEPAGE_TEST_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number"));
    let server = Host::serve(&CACHED);
    let image = server.folder.path().join("disk.img");
    write_image(&image, 640);
    let disk = json!([{ "path": image, "format": "raw", "readonly": true }]);
    for (number, name, run) in [(0, "witness", 1), (1, "victim", 16)] {
        let plan = Plan { vm: number, pages: Some(1024), ..churn() };
        let mut vm = server.vm(name, &with_client(plan, client(640, run)), true);
        vm["disks"] = disk.clone();
        server.done("POST", "/vms", Some(&vm));
    }
    let holdings = || server.open_files();
    wait_until("a round", || server.round("victim") > 0 && server.round("witness") > 0);
    let mut files = None;
    for kill in 0..kills {
        let (before, round) = (server.round("witness"), server.round("victim"));
        wait_until("a round of the victim", || server.round("victim") > round);
        let victim = worker_of(&server, "victim");
        // At any point of whatever it does.
        std::thread::sleep(Duration::from_micros(u64::from(kill) * 1_717 % 20_000));
        kill_process(victim, Signal::KILL).expect("kill the worker");
        wait_until("the end of the VM", || server.state("victim") == "failed");
        wait_until("a round of the other VM", || server.round("witness") > before);
        assert_eq!(server.act("victim", "start"), "running");
        let now = holdings();
        // Nothing piles up: a spare worker comes and goes.
        assert!(now <= *files.get_or_insert(now) + 16, "{now} files after {kill} kills, {files:?} before");
        wait_until("a round", || server.round("victim") > 0);
    }
    assert_eq!(server.state("witness"), "running");
    // The process says that VMs have failed.
    drop(server.end_sound(1));
}

fn types() {
    let server = Host::serve(&["--vms-per-worker", "1", "--sharing-cpu", "100", "--audit"]);
    for (vm, name) in [(0, "a"), (1, "b")] {
        let plan =
            Plan { vm, hole_mode: Some(HoleMode::Honest), rounds: 0, every_ms: 200, ..Plan::default() };
        server.done("POST", "/vms", Some(&server.vm(name, &plan, true)));
    }
    let publishing = |pages: &Value| pages["publishing"] == true;
    server.wait_for("/vms/a/pages", "page types", publishing);
    // Free pages come back only if the guest sees what the engine asks for, and answers.
    let freed = |pages: &Value| pages["given_back_bytes"].as_u64().is_some_and(|bytes| bytes > 0);
    server.wait_for("/vms/b/pages", "free memory", freed);
    drop(server.end_sound(0));
}

fn silent() {
    let server = Host::serve(&["--vms-per-worker", "1", "--no-sharing"]);
    server.done("POST", "/vms", Some(&server.vm("other", &quiet(0), true)));
    server.done("POST", "/vms", Some(&server.vm("stuck", &quiet(1), true)));
    wait_until("a round", || server.round("stuck") > 0);
    let stuck = worker_of(&server, "stuck");
    let signal = |signal| kill_process(stuck, signal).expect("signal it");
    signal(Signal::STOP);
    // All of this ends while the worker does not answer.
    assert_eq!(server.done("GET", "/vms", None).as_array().map(Vec::len), Some(2));
    assert_eq!(server.state("stuck"), "running");
    assert_eq!(server.act("other", "pause"), "paused");
    assert_eq!(server.act("other", "resume"), "running");
    let (before, seen) = (server.round("stuck"), server.round("other"));
    wait_until("a round of the other VM", || server.round("other") > seen);
    assert_eq!(server.round("stuck"), before);
    signal(Signal::CONT);
    wait_until("a round of the VM that was stuck", || server.round("stuck") > before);
    let finished = server.end();
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
}
