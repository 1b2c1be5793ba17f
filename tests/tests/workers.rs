//! VMs in worker processes: they share memory with VMs of other workers, and a worker that is killed takes nobody
//! else's VMs along.

use std::collections::BTreeSet;
use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use samepage_resources::demo::plan::{HoleMode, Plan, Rate};
use samepage_tests::api::Host;
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::harness;
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
    ])
}

/// Waits until a condition holds.
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < TIME_LIMIT, "{what} did not come about");
        // Other processes have no events for this one.
        std::thread::sleep(Duration::from_millis(20));
    }
    if begun.elapsed() > Duration::from_secs(10) {
        println!("{what} took {} s", begun.elapsed().as_secs());
    }
}

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

fn state(server: &Host, vm: &str) -> String {
    server.done("GET", &format!("/vms/{vm}"), None)["state"].as_str().expect("a state").to_owned()
}

fn shared(server: &Host) -> u64 {
    server.done("GET", "/sharing", None)["statistics"]["pages_sharing"].as_u64().expect("a number")
}

/// The last round in which a guest has verified all its memory.
fn round(server: &Host, vm: &str) -> u64 {
    let console = server.console(vm);
    let number = |line: &str| line.strip_prefix("round=")?.split(' ').next()?.parse().ok();
    console.lines().rev().find_map(number).unwrap_or(0)
}

/// Ends the process, whose guests have found no wrong byte, and whose books were right at each end.
fn end(server: Host, status: i32) {
    for vm in server.done("GET", "/vms", None).as_array().expect("a list") {
        let console = server.console(vm["name"].as_str().expect("a name"));
        assert!(!console.contains("corrupt=") || console.contains("corrupt=0"), "{console}");
    }
    let finished = server.end();
    assert_eq!(finished.status.code(), Some(status), "{}", finished.stderr);
    let audits: Vec<_> = finished.stderr.lines().filter(|line| line.contains("audit of")).collect();
    assert!(!audits.is_empty() && audits.iter().all(|line| line.ends_with("passed")), "{}", finished.stderr);
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
    assert!(shared(&server) > 0);
    assert_eq!(server.act("a", "pause"), "paused");
    assert_eq!(server.act("a", "resume"), "running");
    assert_eq!(server.act("b", "reset"), "running");
    let before = round(&server, "a");
    wait_until("more rounds", || round(&server, "a") != before);
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
    end(server, 0);
}

fn killed() {
    let kills = std::env::var("SAMEPAGE_TEST_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number"));
    let server = Host::serve(&["--vms-per-worker", "1", "--sharing-cpu", "100", "--audit"]);
    let plan = |vm| Plan { vm, pages: Some(1024), ..churn() };
    server.done("POST", "/vms", Some(&server.vm("witness", &plan(0), true)));
    server.done("POST", "/vms", Some(&server.vm("victim", &plan(1), true)));
    for kill in 0..kills {
        wait_until("sharing", || shared(&server) > 0);
        let before = round(&server, "witness");
        let victim = worker_of(&server, "victim");
        // At any point of whatever it does.
        std::thread::sleep(Duration::from_micros(u64::from(kill) * 1_717 % 20_000));
        kill_process(victim, Signal::KILL).expect("kill the worker");
        wait_until("the end of the VM", || state(&server, "victim") == "failed");
        let shown = server.done("GET", "/vms/victim", None);
        let reason = shown["reason"].as_str().expect("a reason");
        assert!(reason.contains("worker") && reason.contains("signal 9"), "{reason}");
        wait_until("its frames", || shared(&server) == 0);
        wait_until("a round of the other VM", || round(&server, "witness") > before);
        assert_eq!(server.act("victim", "start"), "running");
    }
    assert_eq!(state(&server, "witness"), "running");
    // The process says that VMs have failed.
    end(server, 1);
}

fn console() {
    let server = Host::serve(&["--vms-per-worker", "8", "--audit"]);
    let plan = Plan { rounds: 1, rate: Rate::PerSecond(0), pages: Some(64), ..Plan::default() };
    server.done("POST", "/vms", Some(&server.vm("a", &plan, true)));
    wait_until("the end of the guest", || state(&server, "a") == "stopped");
    let text = server.console("a");
    // The last line came before the end.
    assert!(text.trim_end().ends_with("corrupt=0"), "{text}");
    let (status, answer): (u16, Value) = server.ask("POST", "/vms/a/console/input", None);
    assert!(status >= 400, "{answer}");
    end(server, 0);
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
    end(server, 0);
}

fn silent() {
    let server = Host::serve(&["--vms-per-worker", "1", "--no-sharing"]);
    server.done("POST", "/vms", Some(&server.vm("other", &quiet(0), true)));
    server.done("POST", "/vms", Some(&server.vm("stuck", &quiet(1), true)));
    wait_until("a round", || round(&server, "stuck") > 0);
    let stuck = worker_of(&server, "stuck");
    let signal = |signal| kill_process(stuck, signal).expect("signal it");
    signal(Signal::STOP);
    // All of this ends while the worker does not answer.
    assert_eq!(server.done("GET", "/vms", None).as_array().map(Vec::len), Some(2));
    assert_eq!(state(&server, "stuck"), "running");
    assert_eq!(server.act("other", "pause"), "paused");
    assert_eq!(server.act("other", "resume"), "running");
    let (before, seen) = (round(&server, "stuck"), round(&server, "other"));
    wait_until("a round of the other VM", || round(&server, "other") > seen);
    assert_eq!(round(&server, "stuck"), before);
    signal(Signal::CONT);
    wait_until("a round of the VM that was stuck", || round(&server, "stuck") > before);
    let finished = server.end();
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
}
