//! The control socket: VMs that clients create, watch and control, and malicious clients.

#[path = "api/balloon.rs"]
mod balloon;
#[path = "api/commands.rs"]
mod commands;
#[path = "api/queries.rs"]
mod queries;
#[path = "api/stops.rs"]
mod stops;

use std::fs;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use samepage_api_types::events::{Event, Happening};
use samepage_api_types::lifecycle::State;
use samepage_resources::demo::layout::{Arena, PageCounts};
use samepage_resources::demo::plan::{Crash, Plan};
use samepage_tests::api::{Host, MEMORY, connect};
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::harness;
use samepage_tests::program::{Running, command};
use serde_json::{Value, json};

use commands::client_command;

fn main() -> ExitCode {
    harness::run(&[
        ("clients_create_steer_and_delete_vms_and_nothing_is_left", many_vms),
        ("people_do_the_same_by_commands_and_nothing_is_left", many_vms_by_commands),
        ("what_cannot_be_is_refused_and_leaves_nothing", refusals),
        ("broken_slow_and_greedy_clients_harm_nobody", broken_clients),
        ("events_tell_what_happens", events),
        ("metrics_can_be_read", metrics),
        ("metrics_come_in_the_format_that_is_asked_for", queries::metrics),
        ("lists_are_of_the_vms_that_are_asked_for", queries::filters),
        ("parameters_that_nobody_knows_are_refused_everywhere", queries::unknown),
        ("a_console_is_read_along_and_typed_to", console),
        ("a_console_ends_with_its_guest_and_not_with_a_reset", queries::console),
        ("the_socket_is_its_owners_and_replaced_when_stale", socket),
        ("a_disk_is_limited_while_it_is_used", disks),
        ("a_balloon_is_sized_wherever_its_vm_is", balloon::balloon),
        ("guests_are_asked_to_end_and_killed_where_they_do_not", stops::asked),
        ("all_that_run_or_are_paused_are_stopped_at_once", stops::all),
        ("people_use_the_same_by_commands", commands::commands),
        ("vms_are_created_with_options_and_overlays", commands::created),
        ("a_console_is_attached_to_a_terminal_and_left", commands::terminal),
        ("top_shows_vms_steers_them_and_leaves_the_terminal_as_it_was", commands::top),
        ("run_opens_a_socket_and_starts_what_a_file_describes", commands::run_with_socket),
    ])
}

/// The variable with the number of VMs in tests with many VMs.
const VMS: &str = "SAMEPAGE_TEST_API_VMS";

/// A guest that continues until it is asked to finish.
fn endless(vm: u32) -> Plan {
    Plan { vm, rounds: 0, every_ms: 20, pages: Some(4096), ..Plan::default() }
}

/// Returns the number of VMs in tests with many VMs.
fn many() -> u32 {
    std::env::var(VMS).ok().and_then(|count| count.parse().ok()).unwrap_or(32)
}

/// Memory of each guest in tests with many VMs, in bytes.
const SMALL: u64 = 16 << 20;
/// Pages that each of these guests uses: few, because there are many guests.
const SMALL_PAGES: u64 = 512;

/// Returns the plan of such a guest.
fn small(vm: u32) -> Plan {
    Plan { every_ms: 500, pages: Some(SMALL_PAGES), ..endless(vm) }
}

/// Returns the page counts of such a guest.
fn alike() -> PageCounts {
    Arena::on_map(&small(0), std::iter::once(0..SMALL)).unwrap().counts()
}

fn many_vms() {
    let host = Host::serve(&["--sharing-cpu", "100"]);
    // Allocators keep arenas and stacks for the largest number of threads so far.
    cycle(&host, many());
    let before = host.holdings();
    cycle(&host, many());
    host.assert_back_to(&before);
    host.end().assert_code(0);
}

/// Creates, controls and deletes VMs that share memory.
fn cycle(host: &Host, count: u32) {
    let name = |vm: u32| format!("vm-{vm}");
    thread::scope(|scope| {
        for vm in 0..count {
            scope.spawn(move || {
                let mut body = host.vm(&name(vm), &small(vm), true);
                body["memory"] = json!(SMALL);
                let (status, created) = host.ask("POST", "/vms", Some(&body));
                assert_eq!((status, created["state"].as_str()), (201, Some("running")), "{created}");
            });
        }
    });
    let all = host.done("GET", "/vms", None);
    assert_eq!(all.as_array().map(Vec::len), Some(count as usize), "{all}");
    (0..count).for_each(|vm| host.wait_for_console(&name(vm), "round="));
    wait_for_sharing(host, count);
    host.wait_for("/vms/vm-0/sharing", "statistics of a VM", |vm| {
        vm["statistics"]["pages_merged"].as_u64().is_some_and(|merged| merged >= alike().alike)
    });
    // Any two VMs share all alike pages, and the list has all pairs.
    let pairs = host.wait_for("/sharing/pairs?limit=496", "what pairs have in common", |pairs| {
        let pairs = pairs.as_array().unwrap();
        pairs.len() == (count * (count - 1) / 2) as usize
            && pairs.iter().all(|pair| {
                let [pages, error] = ["pages", "pages_error"].map(|field| pair[field].as_u64().unwrap());
                pages + 4 * error >= alike().alike
            })
    });
    assert_ne!(pairs[0]["vms"][0], pairs[0]["vms"][1]);
    let told = host.done("GET", "/sharing", None)["pairs"].as_array().unwrap().len();
    assert_eq!(told, pairs.as_array().unwrap().len().min(10));
    assert_eq!(host.done("GET", "/sharing/pairs?limit=1", None).as_array().unwrap().len(), 1);
    let listed = host.done("GET", "/vms", None);
    assert!(listed[0]["cpu_seconds"].as_f64().unwrap() > 0.0, "{listed}");
    assert!(listed[0]["shared_bytes"].as_u64().unwrap() >= alike().alike * 4096, "{listed}");

    // Control many VMs at the same time, and some of them in other ways.
    thread::scope(|scope| {
        for vm in 2..count {
            scope.spawn(move || {
                assert_eq!(host.act(&name(vm), "pause"), "paused");
                let next = if vm % 3 == 0 { "reset" } else { "resume" };
                assert_eq!(host.act(&name(vm), next), "running");
            });
        }
    });
    assert_eq!(host.act("vm-0", "pause"), "paused");
    assert_eq!(host.act("vm-1", "reset"), "running");
    assert_eq!(host.act("vm-0", "resume"), "running");
    assert_eq!(host.act("vm-1", "kill"), "stopped");
    let stopped = host.done("GET", "/vms/vm-1", None);
    assert_eq!((&stopped["reason"], &stopped["actions"]), (&json!("it was killed"), &json!(["start"])));
    assert_eq!(host.act("vm-1", "start"), "running");
    // A guest verifies all of its memory before it ends by itself.
    host.done("POST", "/vms/vm-0/console/input", Some(&json!("q")));
    let ended = host.wait_for("/vms/vm-0", "the guest's end", |vm| vm["state"] == "stopped");
    assert!(ended["reason"].as_str().unwrap().contains("reset"), "{ended}");
    assert!(host.console("vm-0").contains("corrupt=0"), "{}", host.console("vm-0"));

    thread::scope(|scope| {
        for vm in 0..count {
            scope.spawn(move || assert_eq!(host.ask("DELETE", &format!("/vms/{}", name(vm)), None).0, 204));
        }
    });
    wait_for_nothing(host);
}

/// Waits until this number of small guests share all identical pages.
fn wait_for_sharing(host: &Host, count: u32) {
    let wanted = alike().reclaimable(count.into());
    host.wait_for("/sharing", "sharing all identical pages", |sharing| {
        let counted = &sharing["statistics"];
        counted["pages_sharing"].as_u64().unwrap() + counted["zero_pages"].as_u64().unwrap() >= wanted
    });
}

/// Waits until nothing is left of any VM.
fn wait_for_nothing(host: &Host) {
    assert_eq!(host.done("GET", "/vms", None), json!([]));
    assert_eq!(host.vm_threads(), 0, "{:?}", host.running.threads());
    host.wait_for("/sharing", "an empty process", |sharing| {
        sharing["guest_bytes"] == 0 && sharing["statistics"]["frames"] == 0
    });
}

/// The same by commands.
fn many_vms_by_commands() {
    let host = Host::serve(&["--sharing-cpu", "100"]);
    command_cycle(&host, many());
    let before = host.holdings();
    command_cycle(&host, many());
    host.assert_back_to(&before);
    host.end().assert_code(0);
}

fn command_cycle(host: &Host, count: u32) {
    let run = |arguments: &[&str]| {
        let finished = Running::start(client_command(host, arguments)).wait();
        finished.assert_code(0);
        finished.stdout
    };
    let text = format!(
        "[[vms]]\nname = 'vm'\ncount = {count}\nkernel = 'demo.elf'\nmemory = {SMALL}\ncmdline = '{}'\n",
        small(0)
    );
    fs::write(host.folder.path().join("many.toml"), text).unwrap();
    let states = || -> Vec<String> {
        let listed: Vec<Value> = serde_json::from_str(&run(&["ps", "--json"])).unwrap();
        listed.iter().map(|vm| vm["state"].as_str().unwrap().to_owned()).collect()
    };
    let all = |state: &str| vec![state.to_owned(); count as usize];
    run(&["create", "many.toml"]);
    assert_eq!(states(), all("running"));
    (0..count).for_each(|vm| host.wait_for_console(&format!("vm-{vm}"), "ready "));
    wait_for_sharing(host, count);
    run(&["pause", "--all"]);
    assert_eq!(states(), all("paused"));
    run(&["resume", "--all"]);
    run(&["reset", "vm-0", "vm-1"]);
    assert_eq!(states(), all("running"));
    run(&["kill", "vm-1"]);
    (0..count).filter(|vm| *vm != 1).for_each(|vm| host.wait_for_console(&format!("vm-{vm}"), "round="));
    run(&["start", "vm-1"]);
    host.wait_for("/vms/vm-1", "its console", |vm| vm["console"]["sent_bytes"] != 0);
    run(&["stop", "--all", "--timeout", "60"]);
    assert_eq!(states(), all("stopped"));
    // Each guest has verified its memory and then ended by itself.
    (0..count).for_each(|vm| {
        let console = host.console(&format!("vm-{vm}"));
        assert!(console.trim_end().ends_with("corrupt=0"), "{console}");
    });
    run(&["rm", "--all"]);
    wait_for_nothing(host);
}

fn refusals() {
    let host = Host::serve(&[]);
    host.done("POST", "/vms", Some(&host.vm("taken", &endless(0), false)));
    let vm = |change: &dyn Fn(&mut Value)| {
        let mut vm = host.vm("new", &endless(0), true);
        change(&mut vm);
        vm
    };
    let not_a_kernel = host.folder.path().join("text");
    fs::write(&not_a_kernel, "no kernel").unwrap();
    let disk = host.folder.path().join("disk");
    fs::write(&disk, vec![0; 4096]).unwrap();
    let disk = json!([{ "path": disk }]);
    host.done(
        "POST",
        "/vms",
        Some(&vm(&|vm| {
            vm["name"] = json!("writer");
            vm["disks"] = disk.clone();
            vm["start"] = json!(false);
        })),
    );
    let cases: [(u16, &str, Value); 17] = [
        (409, "duplicate-name", vm(&|vm| vm["name"] = json!("taken"))),
        (422, "invalid-configuration", vm(&|vm| vm["name"] = json!("a/b"))),
        (422, "invalid-configuration", vm(&|vm| vm["name"] = json!(".."))),
        (422, "invalid-configuration", vm(&|vm| vm["kernel"] = json!("/nonexistent"))),
        (422, "invalid-configuration", vm(&|vm| vm["kernel"] = json!(not_a_kernel))),
        (422, "invalid-configuration", vm(&|vm| vm["kernel"] = json!("/"))),
        (422, "invalid-configuration", vm(&|vm| vm["memory"] = json!(4097))),
        (422, "invalid-configuration", vm(&|vm| vm["disks"] = json!([{ "path": "/nonexistent" }]))),
        (422, "invalid-configuration", vm(&|vm| vm["sharing"] = json!({ "group": "" }))),
        (422, "invalid-configuration", vm(&|vm| vm["console"] = json!({ "file": "/nonexistent/file" }))),
        (409, "in-use", vm(&|vm| vm["disks"] = disk.clone())),
        (409, "overcommitted", vm(&|vm| vm["memory"] = json!("4T"))),
        (400, "bad-request", vm(&|vm| vm["memory"] = json!("1X"))),
        (400, "bad-request", vm(&|vm| vm["cpus"] = json!(2))),
        (400, "bad-request", vm(&|vm| vm["name"] = json!(7))),
        (400, "bad-request", json!([1, 2])),
        (400, "bad-request", json!({})),
    ];
    for (expected, kind, body) in cases {
        let (status, problem) = host.ask("POST", "/vms", Some(&body));
        assert_eq!(
            (status, &problem["type"]),
            (expected, &json!(format!("urn:samepage:problem:{kind}"))),
            "{body}"
        );
        assert_eq!(problem["instance"], "/vms");
        assert_eq!(host.ask("GET", "/vms/new", None).0, 404);
    }
    let actions = "/vms/taken/actions";
    let others: [(u16, &str, &str, Option<Value>); 12] = [
        (404, "GET", "/vms/none", None),
        (404, "DELETE", "/vms/none", None),
        (404, "GET", "/nothing", None),
        (404, "GET", "/vms/taken/disks/none", None),
        (405, "PUT", "/vms", Some(json!({}))),
        (409, "POST", actions, Some(json!({ "action": "resume" }))),
        (409, "PUT", actions, Some(json!({ "action": "reset" }))),
        (400, "POST", actions, Some(json!({ "action": "explode" }))),
        (400, "PATCH", "/vms/taken/sharing", Some(json!({ "mode": "half" }))),
        (400, "GET", "/vms/taken/console?tail=many", None),
        (400, "GET", "/vms/%ff", None),
        (422, "PATCH", "/vms/writer/disks/disk0", Some(json!({ "limits": { "iops": 0 } }))),
    ];
    for (expected, method, path, body) in others {
        let (status, problem) = host.ask(method, path, body.as_ref());
        assert_eq!(status, expected, "{method} {path}: {problem}");
    }
    let (_, problem) = host.ask("POST", actions, Some(&json!({ "action": "resume" })));
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("created") && detail.contains("resume"), "{detail}");
    assert_eq!(host.done("GET", "/vms", None).as_array().unwrap().len(), 2);
    assert_eq!(host.vm_threads(), 2, "{:?}", host.running.threads());
    host.end().assert_code(0);
}

fn broken_clients() {
    let host = Host::serve(&[]);
    let head = "POST /vms HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n";
    let large = format!("{head}Content-Length: {}\r\n\r\n{}", 2 << 20, " ".repeat(2 << 20));
    assert!(host.raw(large.as_bytes(), false).starts_with("HTTP/1.1 413"));
    let wrong_type = head.replace("application/json", "text/plain") + "Content-Length: 2\r\n\r\n{}";
    assert!(host.raw(wrong_type.as_bytes(), false).starts_with("HTTP/1.1 415"));
    let garbage = host.raw(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", false);
    assert!(garbage.starts_with("HTTP/1.1 400"), "{garbage}");
    let endless = format!("GET /vms HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(1 << 20));
    assert!(host.raw(endless.as_bytes(), false).starts_with("HTTP/1.1 431"));
    // Half a body, then nothing more.
    let half = format!("{head}Content-Length: 100\r\n\r\n{{");
    let _ = host.raw(half.as_bytes(), true);
    let late = host.raw(half.as_bytes(), false);
    assert!(late.starts_with("HTTP/1.1 408"), "{late}");

    // Above the limit, the last connections are refused. Later there is room again.
    let idle: Vec<_> = (0..256).map(|_| connect(&host.socket())).collect();
    let refused = host.raw(b"GET /vms HTTP/1.1\r\nHost: x\r\n\r\n", false);
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("256 connections"), "{refused}");
    drop(idle);
    let deadline = Instant::now() + TIME_LIMIT;
    while host.client.get::<Value>("/version").is_err() {
        assert!(Instant::now() < deadline, "no connection is accepted any more");
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(host.done("GET", "/vms", None), json!([]));
    host.end().assert_code(0);
}

/// Follows events in the background, from the first event on.
fn listen(host: &Host) -> mpsc::Receiver<Event> {
    let client = host.client.clone();
    let (sender, events) = mpsc::channel();
    thread::spawn(move || {
        let mut text = String::new();
        // The stream ends with the server.
        let _ = client.stream("/events?since=0", |bytes| {
            text.push_str(std::str::from_utf8(bytes).expect("events are text"));
            while let Some(end) = text.find("\n\n") {
                let event: String = text.drain(..end + 2).collect();
                let data = event.lines().find_map(|line| line.strip_prefix("data: "));
                let data = data.map(|data| serde_json::from_str(data).expect("an event"));
                if data.is_some_and(|event| sender.send(event).is_err()) {
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        });
    });
    events
}

fn events() {
    let host = Host::serve(&[]);
    let events = listen(&host);
    host.done("POST", "/vms", Some(&host.vm("a", &endless(0), true)));
    host.act("a", "pause");
    let crash = Plan { crash: Some(Crash::Triple), ..endless(0) };
    host.done("POST", "/vms", Some(&host.vm("b", &crash, true)));
    host.wait_for("/vms/b", "a crash", |vm| vm["state"] == "crashed");
    assert_eq!(host.ask("DELETE", "/vms/b", None).0, 204);
    host.ask(
        "POST",
        "/vms",
        Some(&json!({ "name": "c", "kernel": host.folder.path().join("demo.elf"), "memory": "4T" })),
    );
    let state = |vm: &str, state| (vm.to_owned(), state);
    let mut seen = Vec::new();
    let (mut crashed, mut deleted, mut limited) = (false, false, false);
    let mut last = 0;
    while !limited {
        let event = events.recv_timeout(TIME_LIMIT).expect("an event");
        assert_eq!(event.id, last + 1);
        last = event.id;
        match event.what {
            Happening::State { vm, state, .. } => seen.push((vm, state)),
            Happening::Crash { vm, .. } => crashed = vm == "b",
            Happening::Deleted { vm } => deleted = vm == "b",
            Happening::Limit { .. } => limited = true,
            Happening::Memory { message, .. } => panic!("{message}"),
            Happening::Adopted { .. } | Happening::Left { .. } => panic!("there is no folder for the state"),
            Happening::Disk { vm, disk, message } => panic!("disk {disk} of VM {vm}: {message}"),
            Happening::Balloon { vm, .. } => panic!("VM {vm} has no balloon"),
            Happening::Missed { count } => panic!("{count} events were missed"),
        }
    }
    assert!(crashed && deleted);
    let expected = [
        state("a", State::Created),
        state("a", State::Running),
        state("a", State::Paused),
        state("b", State::Created),
        state("b", State::Running),
        state("b", State::Crashed),
    ];
    assert_eq!(seen, expected);
    host.end().assert_code(0);
    // A client that listens to the end receives the last events.
    let rest: Vec<_> = events.iter().map(|event| event.what).collect();
    let stopped =
        |what: &Happening| matches!(what, Happening::State { vm, state: State::Stopped, .. } if vm == "a");
    assert!(rest.iter().any(stopped), "{rest:?}");
}

fn metrics() {
    let host = Host::serve(&[]);
    let sockets = tempfile::tempdir().unwrap();
    let mut vm = host.vm("a", &endless(0), true);
    vm["vsock"] = json!({ "uds": sockets.path().join("a") });
    host.done("POST", "/vms", Some(&vm));
    host.wait_for("/vms/a/sharing", "a look at the VM", |vm| vm["statistics"].is_object());
    let answer = host.client.raw("GET".parse().unwrap(), "/metrics", Vec::new()).unwrap();
    assert!(answer.media_type.starts_with("application/openmetrics-text"), "{}", answer.media_type);
    let text = String::from_utf8(answer.body).unwrap();
    let mut described = Vec::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            described.push(help.split(' ').next().unwrap().to_owned());
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
            let name = series.split('{').next().unwrap();
            let name = name.strip_suffix("_total").unwrap_or(name);
            assert!(described.iter().any(|described| described == name), "{line} is not described");
        } else if line == "# EOF" {
            assert_eq!(lines.peek(), None);
        }
    }
    assert!(text.contains("samepage_vm_memory_bytes{vm=\"a\"} 67108864"), "{text}");
    assert!(text.contains("samepage_vms{state=\"running\"} 1"), "{text}");
    for series in [
        "samepage_vm_cpu_seconds_total{vm=\"a\"}",
        "samepage_vm_disk_read_bytes_total{vm=\"a\",source=\"disk\"} 0",
        "samepage_cache_read_bytes_total{source=\"guests\"} 0",
        "samepage_cache_limit_bytes",
        "samepage_rng_bytes_total{vm=\"a\"} 0",
        "samepage_vsock_timeouts_total{vm=\"a\"} 0",
    ] {
        assert!(text.contains(series), "{series} is missing:\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
    host.end().assert_code(0);
}

fn console() {
    let host = Host::serve(&[]);
    host.done("POST", "/vms", Some(&host.vm("a", &endless(0), true)));
    let (mut stream, first) = host.client.attach("a").unwrap();
    stream.set_read_timeout(Some(TIME_LIMIT)).unwrap();
    let mut seen = first;
    let read_until = |stream: &mut std::os::unix::net::UnixStream, seen: &mut Vec<u8>, text: &str| {
        let mut buffer = [0; 1024];
        while !String::from_utf8_lossy(seen).contains(text) {
            let count = stream.read(&mut buffer).expect("the console goes on");
            assert!(count > 0, "the console ended:\n{}", String::from_utf8_lossy(seen));
            seen.extend_from_slice(&buffer[..count]);
        }
    };
    read_until(&mut stream, &mut seen, "round=2");
    assert!(seen.starts_with(b"start "), "{}", String::from_utf8_lossy(&seen));
    // The stream and the backlog contain the same bytes.
    let mut along = Vec::new();
    let along_until = |bytes: &[u8]| {
        along.extend_from_slice(bytes);
        if String::from_utf8_lossy(&along).contains("round=2") {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    host.client.stream("/vms/a/console/stream", along_until).unwrap();
    assert!(host.console("a").contains("round=2"));
    stream.write_all(b"q").unwrap();
    read_until(&mut stream, &mut seen, "corrupt=0");
    host.wait_for("/vms/a", "the guest's end", |vm| vm["state"] == "stopped");
    // Nothing reads input now.
    assert_eq!(host.ask("POST", "/vms/a/console/input", Some(&json!("q"))).0, 409);
    // The stream ends with the machine. That of the next machine also ends when the VM is deleted.
    stream.read_to_end(&mut seen).unwrap();
    host.act("a", "start");
    let (mut stream, _) = host.client.attach("a").unwrap();
    stream.set_read_timeout(Some(TIME_LIMIT)).unwrap();
    seen.clear();
    read_until(&mut stream, &mut seen, "round=1 ");
    assert_eq!(host.ask("DELETE", "/vms/a", None).0, 204);
    stream.read_to_end(&mut seen).unwrap();
    host.end().assert_code(0);
}

fn socket() {
    let host = Host::serve(&["--socket-mode", "660"]);
    let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(host.socket()), 0o660);
    let mut second = command(["serve", "--socket"]);
    second.arg(host.socket());
    let refused = Running::start(second).wait();
    refused.assert_code(1);
    assert!(refused.stderr.contains("is the socket of a running process"), "{}", refused.stderr);
    // A killed process leaves its socket behind.
    host.running.signal(Signal::KILL);
    let Host { running, folder, .. } = host;
    let _ = running.wait();
    assert!(folder.path().join("socket").exists());
    let host = Host::serve_in(folder, &[]);
    assert_eq!(mode(host.socket()), 0o600);
    host.end().assert_code(0);
}

fn disks() {
    let host = Host::serve(&[]);
    let disk = host.folder.path().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut vm = host.vm("a", &endless(0), true);
    vm["disks"] = json!([{ "path": disk, "id": "data", "limits": { "rate": "1M" } }]);
    host.done("POST", "/vms", Some(&vm));
    let disk = host.done("GET", "/vms/a/disks/data", None);
    assert_eq!(disk["limits"], json!({ "rate": 1 << 20 }));
    assert!(disk["statistics"]["reads"].is_u64(), "{disk}");
    let change = json!({ "limits": { "rate": "2M", "iops": 100 } });
    assert_eq!(
        host.done("PATCH", "/vms/a/disks/data", Some(&change))["limits"],
        json!({ "rate": 2 << 20, "iops": 100 })
    );
    assert_eq!(host.done("GET", "/vms/a/disks", None)[0]["limits"]["iops"], 100);
    let cache = |policy: &str| host.ask("PATCH", "/vms/a/disks/data", Some(&json!({ "cache": policy })));
    for policy in ["none", "inclusive", "exclusive"] {
        let (status, disk) = cache(policy);
        assert_eq!((status, &disk["cache"], &disk["limits"]["iops"]), (200, &json!(policy), &json!(100)));
    }
    assert_eq!(cache("buffered").0, 409);
    let resized = |size| {
        let path = host.folder.path().join("disk.img");
        fs::File::options().write(true).open(path).unwrap().set_len(size).unwrap();
        host.ask("POST", "/vms/a/disks/data/resize", None)
    };
    for size in [3 << 20, 1 << 19] {
        let (status, disk) = resized(size);
        assert_eq!((status, &disk["size_bytes"]), (200, &json!(size)));
    }
    let by_command = Running::start(client_command(&host, &["resize", "a", "data"])).wait();
    by_command.assert_code(0);
    assert_eq!(by_command.stderr, "samepage: disk data has 524288 bytes now\n");
    let (status, problem) = resized(777);
    assert_eq!(status, 409);
    assert!(problem["detail"].as_str().unwrap().contains("777 bytes"), "{problem}");
    assert_eq!(host.done("GET", "/vms/a/disks/data", None)["size_bytes"], 1 << 19);
    assert_eq!(host.ask("PATCH", "/vms/a/disks/data", Some(&json!({}))).0, 400);
    let io = host.done("GET", "/vms", None)[0]["io"].clone();
    assert!(io["from_disk_bytes"].is_u64(), "{io}");
    assert!(host.done("GET", "/cache", None)["limit_bytes"].as_u64().unwrap() > 0);
    assert_eq!(host.done("GET", "/vms/a/working-set", None)["memory_bytes"], MEMORY);
    host.act("a", "kill");
    assert_eq!(host.ask("PATCH", "/vms/a/disks/data", Some(&change)).0, 409);
    assert_eq!(host.ask("POST", "/vms/a/disks/data/resize", None).0, 409);
    assert_eq!(host.done("GET", "/vms/a/working-set", None)["curve"], json!([]));
    host.end().assert_code(0);
}
