//! A process that is killed does not end the VMs of its workers, and the next process with the same folder for its
//! state adopts them.

#[path = "adoption/giving.rs"]
mod giving;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, Uid, geteuid, kill_process};
use rustix::thread::set_thread_res_uid;
use samepage_client::socket::Client;
use samepage_resources::demo::client::ClientPlan;
use samepage_resources::demo::plan::{DiskOp, DiskOps, DiskPlan, Plan, Rate};
use samepage_tests::api::Host;
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::disks::{FIRST_DISK, with_client, write_image};
use samepage_tests::harness;
use samepage_tests::program::{Running, command};
use samepage_tests::progress::{assert_sound, round_in, wait_until};
use samepage_tests::shared::churn;
use serde_json::{Value, json};
use tempfile::TempDir;

/// How often the process is killed, unless the environment says otherwise.
const KILLS: u32 = 4;
/// A user without rights.
const SOMEBODY: u32 = 54_322;
/// The folder for the state, in a server's folder.
const STATE: &str = "state";

fn main() -> ExitCode {
    harness::run(&[
        ("vms_outlive_their_process_and_are_adopted_with_what_they_wrote_meanwhile", killed),
        ("disks_that_were_read_through_the_cache_are_read_directly", killed_reading),
        ("a_vm_that_ends_meanwhile_is_reported_with_its_reason", ended),
        ("vms_that_nobody_adopts_leave_a_report", reported),
        ("states_and_descriptions_of_vms_are_those_of_before", described),
        ("guests_that_give_pages_back_keep_theirs_when_their_process_is_killed", giving::killed),
        ("whatever_vms_are_asked_for_when_their_process_is_killed", at_work),
        ("a_process_that_cannot_start_leaves_vms_as_they_are", failed_start),
        ("an_adopted_worker_that_is_killed_takes_its_vms_along", worker_killed),
        ("a_worker_speaks_to_no_other_user", another_user),
        ("a_worker_of_another_version_is_left_alone", another_version),
        ("a_folder_for_the_state_has_one_process", refused),
    ])
}

/// The folders of a server, one after another. Workers that a test has left behind are killed.
struct Nest {
    folder: Option<TempDir>,
    state: PathBuf,
}

impl Nest {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("make a folder");
        fs::write(folder.path().join("demo.elf"), samepage_resources::DEMO_GUEST).expect("write the guest");
        let state = folder.path().join(STATE);
        Self { folder: Some(folder), state }
    }

    /// Starts a process, which adopts what another one has left.
    fn serve(&mut self, more: &[&str]) -> Host {
        let folder = self.folder.take().expect("no process has the folder");
        let mut arguments = vec!["--state", STATE, "--sharing-cpu", "100", "--audit"];
        arguments.extend_from_slice(more);
        Host::serve_in(folder, &arguments)
    }

    /// Kills a process that this value has started.
    fn kill(&mut self, server: Host) {
        self.folder = Some(server.kill());
    }

    /// Ends a process that this value has started, and its VMs.
    fn end(&mut self, server: Host) {
        self.folder = Some(server.end_sound(0));
    }

    /// The files in the folder for the state.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.state).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// The workers that have a lock in the folder.
    fn workers(&self) -> BTreeSet<i32> {
        let files = self.files();
        let id = |name: &String| name.strip_prefix("worker-")?.strip_suffix(".lock")?.parse().ok();
        files.iter().filter_map(id).collect()
    }
}

impl Drop for Nest {
    fn drop(&mut self) {
        for worker in self.workers().into_iter().filter(|id| lives(*id)) {
            let _ = kill_process(Pid::from_raw(worker).expect("a process"), Signal::KILL);
        }
    }
}

/// Whether a worker's process is there, and not only its status.
fn lives(id: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
    let field = |name| status.lines().find_map(|line| line.strip_prefix(name).map(str::trim));
    field("Name:") == Some("samepage") && field("State:").is_some_and(|state| !state.starts_with('Z'))
}

/// The console's file of a VM.
fn log(folder: &Path, vm: &str) -> PathBuf {
    folder.join(format!("{vm}.log"))
}

fn written(file: &Path) -> String {
    String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned()
}

/// Creates a VM with a console that has a file, and starts it.
fn create(server: &Host, name: &str, plan: &Plan) -> PathBuf {
    create_with(server, name, plan, &json!([]))
}

/// The same with disks.
fn create_with(server: &Host, name: &str, plan: &Plan, disks: &Value) -> PathBuf {
    let file = log(server.folder.path(), name);
    let mut vm = server.vm(name, plan, true);
    vm["console"] = json!({ "file": file });
    vm["disks"] = disks.clone();
    server.done("POST", "/vms", Some(&vm));
    file
}

fn quiet(vm: u32) -> Plan {
    Plan { vm, rounds: 0, pages: Some(1024), ..Plan::default() }
}

/// What ends by itself after a moment.
fn short(vm: u32) -> Plan {
    Plan { vm, rounds: 3, every_ms: 300, rate: Rate::PerSecond(0), pages: Some(64), ..Plan::default() }
}

/// Waits for an event, from the first one on.
fn event(server: &Host, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
    let (begun, mut text, mut found) = (Instant::now(), String::new(), None);
    let follow = |bytes: &[u8]| {
        text.push_str(std::str::from_utf8(bytes).expect("events are text"));
        let data = text.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok());
        found = data.into_iter().find(|event| is_it(event));
        if found.is_some() || begun.elapsed() > TIME_LIMIT {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    server.client.stream("/events?since=0", follow).expect("events");
    found.unwrap_or_else(|| panic!("{what} was not told: {text}"))
}

fn adopted(server: &Host, vm: &str) -> Value {
    event(server, "the adoption", |event| event["event"] == "adopted" && event["vm"] == vm)
}

fn killed() {
    let kills = std::env::var("SAMEPAGE_TEST_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number"));
    let mut nest = Nest::new();
    let options = ["--vms-per-worker", "1"];
    let mut server = nest.serve(&options);
    // Each round also writes to a disk and reads it again.
    let ops = DiskOps::new(&[DiskOp::Write, DiskOp::Flush, DiskOp::Verify]);
    let disk = DiskPlan { ops, depth: 4, window: 4, ..DiskPlan::new(FIRST_DISK) };
    let plan = |vm| Plan { vm, pages: Some(1024), disk: Some(disk), ..churn() };
    let names = ["a", "b"];
    let logs = [(0, "a"), (1, "b")].map(|(vm, name)| {
        let image = server.folder.path().join(format!("{name}.img"));
        fs::File::create(&image).and_then(|file| file.set_len(1 << 20)).expect("make an image");
        create_with(&server, name, &plan(vm), &json!([{ "path": image, "format": "raw" }]))
    });
    let mut seen = BTreeSet::new();
    for kill in 0..kills {
        // Every third time the guests still are those that were adopted before.
        let is_shared = kill % 3 != 2;
        if is_shared {
            wait_until("sharing", || server.shared() > 0);
        }
        let workers = nest.workers();
        seen.extend(&workers);
        // At any point of whatever it does.
        std::thread::sleep(Duration::from_micros(u64::from(kill) * 1_717 % 20_000));
        nest.kill(server);
        let before = logs.each_ref().map(|log| round_in(&written(log)));
        wait_until("rounds of guests that nobody manages", || {
            logs.iter().zip(before).all(|(log, before)| round_in(&written(log)) > before + 1)
        });
        for log in logs.each_ref().map(|log| written(log)) {
            assert!(log.contains("blk mode=verify") && !log.contains("blk-corrupt"), "{log}");
        }
        let meanwhile = logs.each_ref().map(|log| written(log).lines().last().expect("a line").to_owned());
        server = nest.serve(&options);
        let (mut holding, mut rounds) = (BTreeSet::new(), [0; 2]);
        for (number, name) in names.into_iter().enumerate() {
            let worker = adopted(&server, name)["worker"].as_i64().expect("a number");
            holding.insert(i32::try_from(worker).expect("a process"));
            let shown = server.done("GET", &format!("/vms/{name}"), None);
            assert_eq!(shown["state"], "running", "{shown}");
            assert!(shown["sharing_stopped"].as_str().is_some_and(|why| why.contains("adopted")), "{shown}");
            assert!(shown["cpu_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{shown}");
            let console = server.console(name);
            assert!(console.contains(&meanwhile[number]), "{} is missing in {console}", meanwhile[number]);
            rounds[number] = server.round(name);
        }
        assert!(holding.is_subset(&workers), "{holding:?} of {workers:?}");
        for (name, before) in names.into_iter().zip(rounds) {
            wait_until("a round of an adopted guest", || server.round(name) > before);
            assert_sound(&server.console(name));
            if kill % 3 != 1 {
                assert_eq!(server.act(name, "reset"), "running");
                assert!(server.done("GET", &format!("/vms/{name}"), None)["sharing_stopped"].is_null());
            }
        }
    }
    seen.extend(nest.workers());
    nest.end(server);
    wait_until("the end of all workers", || !seen.iter().any(|id| lives(*id)));
    assert_eq!(nest.files(), [""; 0]);
    logs.iter().for_each(|log| assert_sound(&written(log)));
}

fn killed_reading() {
    let kills = std::env::var("SAMEPAGE_TEST_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number"));
    let mut nest = Nest::new();
    let options = ["--vms-per-worker", "1", "--worker-block-cache"];
    let mut server = nest.serve(&options);
    let image = server.folder.path().join("disk.img");
    write_image(&image, 640);
    let disks = json!([{ "path": image, "format": "raw", "readonly": true }]);
    // Runs are mapped. An order to map that comes too late would cover what the guest has read into the page since.
    let client = ClientPlan { pages: 128, blocks: 640, run: 16, units: 200, ..ClientPlan::default() };
    let logs = [(0, "a"), (1, "b")].map(|(vm, name)| {
        let plan = with_client(Plan { vm, pages: Some(512), ..churn() }, client);
        create_with(&server, name, &plan, &disks)
    });
    let reads = |server: &Host, vm: &str| {
        let disk = &server.done("GET", &format!("/vms/{vm}"), None)["disks"][0];
        let count = |name: &str| disk["statistics"][name].as_u64().expect("a counter");
        count("blocks_from_guests") + count("blocks_from_host") + count("blocks_fetched")
    };
    let mut seen = BTreeSet::new();
    for kill in 0..kills {
        let before = ["a", "b"].map(|vm| reads(&server, vm));
        wait_until("reads through the cache", || {
            ["a", "b"].iter().zip(before).all(|(vm, before)| reads(&server, vm) > before)
        });
        seen.extend(nest.workers());
        // At any point of whatever it does.
        std::thread::sleep(Duration::from_micros(u64::from(kill) * 1_717 % 20_000));
        nest.kill(server);
        let before = logs.each_ref().map(|log| round_in(&written(log)));
        wait_until("rounds of guests that nobody manages", || {
            logs.iter().zip(before).all(|(log, before)| round_in(&written(log)) > before + 1)
        });
        logs.iter().for_each(|log| assert_sound(&written(log)));
        server = nest.serve(&options);
        for vm in ["a", "b"] {
            adopted(&server, vm);
            let before = reads(&server, vm);
            let round = server.round(vm);
            wait_until("a round of an adopted guest", || server.round(vm) > round);
            assert_eq!(reads(&server, vm), before, "nobody serves its disk");
            assert_eq!(server.act(vm, "reset"), "running");
        }
    }
    seen.extend(nest.workers());
    nest.end(server);
    wait_until("the end of all workers", || !seen.iter().any(|id| lives(*id)));
    logs.iter().for_each(|log| assert_sound(&written(log)));
}

fn ended() {
    let mut nest = Nest::new();
    let options = ["--vms-per-worker", "2"];
    let server = nest.serve(&options);
    let log = create(&server, "short", &short(0));
    create(&server, "long", &quiet(1));
    let workers = nest.workers();
    nest.kill(server);
    wait_until("the end of the guest", || written(&log).contains("corrupt=0"));
    let server = nest.serve(&options);
    let worker = adopted(&server, "short")["worker"].as_i64();
    assert_eq!(adopted(&server, "long")["worker"].as_i64(), worker);
    let worker = i32::try_from(worker.expect("a number")).expect("a process");
    assert!(workers.contains(&worker), "{workers:?}");
    let told = event(&server, "the end", |event| event["vm"] == "short" && event["event"] == "state");
    assert_eq!(told["state"], "stopped");
    let shown = server.done("GET", "/vms/short", None);
    assert_eq!(shown["state"], "stopped", "{shown}");
    assert_eq!(shown["reason"], told["reason"], "{shown}");
    assert!(shown["reason"].as_str().is_some_and(|reason| reason.contains("guest")), "{shown}");
    let console = server.console("short");
    assert!(console.trim_end().ends_with("corrupt=0"), "{console}");
    assert_eq!(server.state("long"), "running");
    server.done("DELETE", "/vms/short", None);
    // The other VM has the worker for itself.
    assert!(lives(worker) && nest.workers().contains(&worker));
    server.done("DELETE", "/vms/long", None);
    wait_until("the end of the worker", || !lives(worker) && !nest.workers().contains(&worker));
    nest.end(server);
    assert_eq!(nest.files(), [""; 0]);
}

fn reported() {
    let mut nest = Nest::new();
    let options = ["--vms-per-worker", "1", "--adoption-timeout", "1"];
    let server = nest.serve(&options);
    create(&server, "short", &short(0));
    let workers = nest.workers();
    create(&server, "long", &quiet(1));
    nest.kill(server);
    let is_report = |name: &String| name.starts_with("ended-") && name.ends_with(".json");
    wait_until("a report", || nest.files().iter().any(is_report));
    wait_until("the end of its worker", || workers.iter().any(|id| !lives(*id)));
    let server = nest.serve(&options);
    let shown = server.done("GET", "/vms/short", None);
    assert_eq!(shown["state"], "stopped", "{shown}");
    assert!(shown["reason"].as_str().is_some_and(|reason| reason.contains("guest")), "{shown}");
    assert!(!nest.files().iter().any(is_report));
    assert_eq!(server.state("long"), "running");
    assert_eq!(server.act("short", "start"), "running");
    nest.end(server);
    assert_eq!(nest.files(), [""; 0]);
}

fn described() {
    let mut nest = Nest::new();
    let options = ["--vms-per-worker", "2"];
    let server = nest.serve(&options);
    let mut held = server.vm("held", &quiet(0), false);
    held["sharing"] = json!({ "group": "blue" });
    server.done("POST", "/vms", Some(&held));
    create(&server, "paused", &quiet(1));
    create(&server, "changed", &quiet(2));
    let started = |server: &Host, vm: &str| server.wait_for_console(vm, "round=");
    started(&server, "paused");
    assert_eq!(server.act("paused", "pause"), "paused");
    server.done("PATCH", "/vms/changed/sharing", Some(&json!({ "mode": "zero" })));
    let names = ["held", "paused", "changed"];
    let before = names.map(|name| server.done("GET", &format!("/vms/{name}"), None));
    nest.kill(server);
    // The configuration file of a service names them as well.
    let kernel = nest.state.with_file_name("demo.elf");
    let file = format!("[[vms]]\nname = \"paused\"\nkernel = {kernel:?}\nmemory = \"64M\"\n");
    fs::write(nest.state.with_file_name("vms.toml"), file).expect("write the file");
    let server = nest.serve(&["--vms-per-worker", "2", "--config", "vms.toml"]);
    for (name, before) in names.into_iter().zip(before) {
        let now = server.done("GET", &format!("/vms/{name}"), None);
        for field in ["state", "group", "mode", "config", "memory_bytes", "actions"] {
            assert_eq!(now[field], before[field], "{field} of {name}");
        }
        let since = |shown: &Value| shown["since_time_seconds"].as_f64().expect("a time");
        assert!((since(&now) - since(&before)).abs() < 5.0, "{now} since {before}");
    }
    assert_eq!(server.act("paused", "resume"), "running");
    assert_eq!(server.act("held", "start"), "running");
    started(&server, "held");
    assert_eq!(server.act("changed", "kill"), "stopped");
    let list = server.done("GET", "/vms", None);
    assert_eq!(list.as_array().map(Vec::len), Some(3), "{list}");
    let mut show = command(["ps", "--socket"]);
    show.arg(server.socket());
    let table = Running::start(show).wait();
    assert!(table.stdout.contains("adopted"), "{}", table.stdout);
    nest.end(server);
    assert_eq!(nest.files(), [""; 0]);
}

/// Asks for all kinds of things until the server is gone. `vms` are bodies that create VMs.
fn ask_for_everything(socket: &Path, vms: &[Value], mut random: u64) {
    let client = Client::new(socket.to_owned());
    let ask = |method: &str, path: &str, body: Value| {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        client.raw(method.parse().expect("a method"), path, body).is_ok()
    };
    loop {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let choice = (random >> 33) as usize;
        let vm = &vms[choice % vms.len()];
        let path = format!("/vms/{}", vm["name"].as_str().expect("a name"));
        let act = |action: &str| ask("POST", &format!("{path}/actions"), json!({ "action": action }));
        let is_there = match choice / vms.len() % 8 {
            0 | 1 => ask("POST", "/vms", vm.clone()),
            2 => ask("DELETE", &path, Value::Null),
            3 => act("reset"),
            4 => act("pause"),
            5 => act("resume"),
            6 => act("kill"),
            _ => act("start"),
        };
        if !is_there {
            return;
        }
    }
}

fn at_work() {
    let kills = std::env::var("SAMEPAGE_TEST_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number"));
    let mut nest = Nest::new();
    let options = ["--vms-per-worker", "2"];
    let mut server = nest.serve(&options);
    let plan = |vm| Plan { vm, pages: Some(256), ..churn() };
    let vms: Vec<_> = (0..5).map(|vm| server.vm(&format!("vm{vm}"), &plan(vm), true)).collect();
    for kill in 0..kills {
        let socket = server.socket();
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (socket, vms) = (&socket, &vms);
                scope.spawn(move || ask_for_everything(socket, vms, u64::from(2 * kill + thread)));
            }
            std::thread::sleep(Duration::from_micros(100_000 + u64::from(kill) * 171_717 % 1_000_000));
            nest.kill(server);
        });
        server = nest.serve(&options);
        let all = server.done("GET", "/vms", None);
        let all = all.as_array().expect("a list");
        let workers: BTreeSet<_> = all
            .iter()
            .map(|vm| adopted(&server, text(vm, "name"))["worker"].as_i64().expect("a number"))
            .collect();
        // A worker without VMs has ended. The new process has one to spare.
        wait_until("the end of other workers", || {
            let idle = |id: &i32| !workers.contains(&i64::from(*id));
            nest.workers().iter().filter(|id| idle(id)).count() <= 1
        });
        for vm in all {
            let name = text(vm, "name");
            assert_sound(&server.console(name));
            if vm["state"] == "running" {
                let before = server.round(name);
                wait_until("a round", || server.round(name) != before);
            }
            // Some are there when the next process is killed.
            if kill % 2 == 0 {
                server.done("DELETE", &format!("/vms/{name}"), None);
            }
        }
    }
    server.done("POST", "/vms", Some(&server.vm("last", &plan(9), true)));
    nest.end(server);
    assert_eq!(nest.files(), [""; 0]);
}

fn text<'a>(json: &'a Value, field: &str) -> &'a str {
    json[field].as_str().unwrap_or_else(|| panic!("{json} has no {field}"))
}

fn failed_start() {
    let mut nest = Nest::new();
    let options = ["--vms-per-worker", "2"];
    let server = nest.serve(&options);
    let log = create(&server, "a", &quiet(0));
    wait_until("a round", || round_in(&written(&log)) > 0);
    nest.kill(server);
    let folder = nest.state.parent().expect("a folder").to_owned();
    let mut serve =
        command(["serve", "--state", STATE, "--vms-per-worker", "2", "--socket", "missing/socket"]);
    serve.current_dir(&folder);
    let failed = Running::start(serve).wait();
    failed.assert_code(1);
    assert!(failed.stderr.contains("adopted 1 VM"), "{}", failed.stderr);
    let before = round_in(&written(&log));
    wait_until("rounds of a guest that nobody manages", || round_in(&written(&log)) > before + 1);
    let server = nest.serve(&options);
    assert_eq!(server.state("a"), "running");
    let metrics =
        server.client.raw("GET".parse().expect("a method"), "/metrics", Vec::new()).expect("metrics");
    assert!(String::from_utf8_lossy(&metrics.body).contains("vm=\"a\""));
    // The guest verifies all of its memory and ends.
    server.done("POST", "/vms/a/console/input", Some(&json!("q")));
    wait_until("the end of the guest", || server.state("a") == "stopped");
    server.done("DELETE", "/vms/a", None);
    server.done("POST", "/vms", Some(&server.vm("a", &quiet(0), true)));
    nest.end(server);
    assert_eq!(nest.files(), [""; 0]);
}

fn worker_killed() {
    let mut nest = Nest::new();
    let options = ["--vms-per-worker", "1"];
    let server = nest.serve(&options);
    for (vm, name) in [(0, "a"), (1, "b")] {
        create(&server, name, &quiet(vm));
    }
    nest.kill(server);
    let server = nest.serve(&options);
    let worker =
        i32::try_from(adopted(&server, "a")["worker"].as_i64().expect("a number")).expect("a process");
    kill_process(Pid::from_raw(worker).expect("a process"), Signal::KILL).expect("kill the worker");
    wait_until("the end of the VM", || server.state("a") == "failed");
    let shown = server.done("GET", "/vms/a", None);
    assert!(text(&shown, "reason").contains("worker"), "{shown}");
    assert_eq!(server.state("b"), "running");
    assert!(!nest.workers().contains(&worker));
    assert_eq!(server.act("a", "start"), "running");
    // The process says that a VM has failed.
    nest.folder = Some(server.end_sound(1));
    assert_eq!(nest.files(), [""; 0]);
}

fn another_user() {
    if !geteuid().is_root() {
        println!("only root can become somebody else");
        return;
    }
    let mut nest = Nest::new();
    let options = ["--vms-per-worker", "1"];
    let server = nest.serve(&options);
    create(&server, "a", &quiet(0));
    let worker = adopted_later(&mut nest, server);
    let socket = nest.state.join(format!("worker-{worker}.sock"));
    let mode = |path: &Path| fs::metadata(path).expect("look at it").permissions().mode() & 0o777;
    assert_eq!((mode(&nest.state), mode(&socket)), (0o700, 0o600));
    // Permissions keep others away already.
    for (path, mode) in
        [(nest.state.parent().expect("a folder"), 0o755), (&nest.state, 0o755), (&socket, 0o777)]
    {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("open it");
    }
    let greeting = |user: Option<u32>| {
        let greet = || {
            if let Some(user) = user.map(Uid::from_raw) {
                // This thread alone becomes somebody else.
                set_thread_res_uid(user, user, user).expect("become somebody else");
            }
            let mut stream = UnixStream::connect(&socket).expect("connect");
            stream.shutdown(Shutdown::Write).expect("say nothing");
            let mut greeting = Vec::new();
            // A connection that is reset has said all that it does.
            let _ = stream.read_to_end(&mut greeting);
            greeting.len()
        };
        std::thread::scope(|scope| scope.spawn(greet).join().expect("a thread"))
    };
    assert_eq!(greeting(Some(SOMEBODY)), 0);
    assert!(greeting(None) > 0);
    let server = nest.serve(&options);
    assert_eq!(server.state("a"), "running");
    nest.end(server);
    assert_eq!(nest.files(), [""; 0]);
}

/// Kills a process. Returns its worker, which waits for the next one.
fn adopted_later(nest: &mut Nest, server: Host) -> i32 {
    nest.kill(server);
    // The spare worker ends.
    wait_until("one worker", || nest.workers().len() == 1);
    nest.workers().into_iter().next().expect("a worker")
}

fn another_version() {
    let mut nest = Nest::new();
    fs::create_dir(&nest.state).expect("make the folder");
    fs::set_permissions(&nest.state, fs::Permissions::from_mode(0o700)).expect("close the folder");
    let id = std::process::id();
    let state = nest.state.clone();
    let file = |suffix: &str| state.join(format!("worker-{id}.{suffix}"));
    let lock = fs::File::create(file("lock")).expect("make the lock");
    lock.lock().expect("lock it");
    let listener = UnixListener::bind(file("sock")).expect("listen");
    let speaking = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        let greeting = json!({ "version": 999, "vms": ["old"], "more": [1] }).to_string();
        stream.write_all(&u32::try_from(greeting.len()).expect("a length").to_le_bytes()).expect("greet");
        stream.write_all(greeting.as_bytes()).expect("greet");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("the end of the connection");
        answer
    });
    let server = nest.serve(&["--vms-per-worker", "1"]);
    let left = event(&server, "the worker", |event| event["event"] == "left");
    assert_eq!(left["worker"], id);
    let message = left["message"].as_str().expect("a message");
    assert!(message.contains("version 999") && message.contains("old"), "{message}");
    assert!(speaking.join().expect("the worker").is_empty());
    server.done("POST", "/vms", Some(&server.vm("a", &quiet(0), true)));
    nest.end(server);
    // Its files are its own.
    assert_eq!(nest.files().len(), 2);
    for suffix in ["lock", "sock"] {
        fs::remove_file(file(suffix)).expect("remove it");
    }
}

fn refused() {
    let mut nest = Nest::new();
    let server = nest.serve(&["--vms-per-worker", "1"]);
    let serve = |more: &[&str]| {
        let mut serve = command(["serve", "--socket"]);
        serve.arg(server.folder.path().join("other")).args(more).current_dir(server.folder.path());
        Running::start(serve).wait()
    };
    let second = serve(&["--state", STATE, "--vms-per-worker", "1"]);
    let id = server.running.pid().as_raw_nonzero().to_string();
    assert!(
        second.stderr.contains("another samepage uses") && second.stderr.contains(&id),
        "{}",
        second.stderr
    );
    second.assert_code(1);
    let without = serve(&["--state", "elsewhere"]);
    assert!(without.stderr.contains("--vms-per-worker"), "{}", without.stderr);
    without.assert_code(1);
    let (finished, folder) = server.end_and_keep();
    finished.assert_code(0);
    nest.folder = Some(folder);
    assert_eq!(nest.files(), [""; 0]);
}
