//! Guests that are asked to end, and VMs that are killed.

use std::thread;
use std::time::{Duration, Instant};

use samepage_resources::demo::plan::{Crash, Plan};
use samepage_tests::api::Host;
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::program::Running;
use serde_json::{Value, json};

use super::commands::client_command;
use super::endless;

pub(crate) fn asked() {
    let host = Host::serve(&[]);
    host.done("POST", "/vms", Some(&host.vm("hears", &endless(0), true)));
    let deaf = Plan { crash: Some(Crash::Hang), ..endless(1) };
    host.done("POST", "/vms", Some(&host.vm("deaf", &deaf, true)));
    host.wait_for_console("hears", "round=1 ");
    host.wait_for_console("deaf", "ready ");
    let ask = |vm: &str, body: Value| host.ask("POST", &format!("/vms/{vm}/actions"), Some(&body));
    let (status, vm) = ask("hears", json!({ "action": "stop", "timeout_seconds": 60 }));
    assert_eq!((status, vm["state"].as_str()), (200, Some("stopped")), "{vm}");
    assert!(vm["reason"].as_str().unwrap().contains("reset"), "{vm}");
    assert!(host.console("hears").contains("corrupt=0"));

    // A guest that ignores its keyboard takes two presses, and then no more.
    assert_eq!(host.act("deaf", "shutdown"), "running");
    assert_eq!(host.act("deaf", "shutdown"), "running");
    let (status, problem) = ask("deaf", json!({ "action": "shutdown" }));
    assert_eq!((status, &problem["type"]), (409, &json!("urn:samepage:problem:not-listening")));
    for wrong in [
        json!({ "action": "pause", "timeout_seconds": 1 }),
        json!({ "action": "stop", "timeout_seconds": -1 }),
        json!({ "action": "stop", "timeout_seconds": 100_000 }),
    ] {
        let (status, problem) = ask("deaf", wrong);
        assert_eq!((status, &problem["pointer"]), (400, &json!("/timeout_seconds")), "{problem}");
    }
    let (status, vm) = ask("deaf", json!({ "action": "stop", "timeout_seconds": 1 }));
    let reason = "it did not end within 1 s of being asked, and was killed";
    assert_eq!((status, &vm["reason"]), (200, &json!(reason)), "{vm}");
    assert_eq!(ask("deaf", json!({ "action": "stop" })).0, 409);
    // A kill overtakes a waiting stop.
    host.act("deaf", "start");
    host.wait_for_console("deaf", "ready ");
    thread::scope(|scope| {
        let stop = scope.spawn(|| ask("deaf", json!({ "action": "stop", "timeout_seconds": 3600 })));
        host.wait_for("/vms/deaf", "the stop or its end", |_| {
            ask("deaf", json!({ "action": "kill" }));
            stop.is_finished()
        });
        let (status, _) = stop.join().unwrap();
        assert!(matches!(status, 200 | 409), "{status}");
    });

    // A VM that is bound to a connection.
    assert_eq!(host.ask("GET", "/vms/hears/console/stream?lifeline=true", None).0, 400);
    host.act("hears", "start");
    let (stream, _) = host.client.attach_for_life("hears").unwrap();
    drop(stream);
    let deadline = Instant::now() + TIME_LIMIT;
    while host.ask("GET", "/vms/hears", None).0 != 404 {
        assert!(Instant::now() < deadline, "the VM outlives its connection");
        thread::sleep(Duration::from_millis(10));
    }
    host.end().assert_code(0);
}

pub(crate) fn all() {
    let host = Host::serve(&[]);
    for (vm, name) in ["runs", "held", "idle"].into_iter().enumerate() {
        host.done("POST", "/vms", Some(&host.vm(name, &endless(vm as u32), name != "idle")));
    }
    host.wait_for_console("runs", "round=1 ");
    host.wait_for_console("held", "round=1 ");
    assert_eq!(host.act("held", "pause"), "paused");
    let finished = Running::start(client_command(&host, &["stop", "--all", "--timeout", "3600"])).wait();
    finished.assert_code(0);
    // A paused guest resumes, is asked like the others, and verifies its memory before it ends.
    for name in ["runs", "held"] {
        let vm = host.done("GET", &format!("/vms/{name}"), None);
        assert_eq!(vm["state"], "stopped", "{vm}");
        assert!(vm["reason"].as_str().unwrap().contains("reset"), "{vm}");
        assert!(host.console(name).contains("corrupt=0"), "{name}");
    }
    assert_eq!(host.done("GET", "/vms/idle", None)["state"], "created");
    // Stopping no VM is not an error.
    Running::start(client_command(&host, &["stop", "--all"])).wait().assert_code(0);
    host.end().assert_code(0);
}
