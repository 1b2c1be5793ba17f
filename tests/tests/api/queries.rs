//! Queries and headers of requests, and consoles that end with their guests.

use std::io::{Read, Write};
use std::process::Stdio;

use samepage_tests::api::{Host, connect};
use samepage_tests::program::{Finished, Running, command};
use serde_json::{Value, json};

use super::endless;

fn names(list: &Value) -> Vec<&str> {
    list.as_array().expect("a list").iter().map(|vm| vm["name"].as_str().expect("a name")).collect()
}

fn ps(host: &Host, arguments: &[&str]) -> Finished {
    let mut ps = command(["ps", "--socket"]);
    ps.arg(host.socket()).args(arguments);
    Running::start(ps).wait()
}

pub(crate) fn filters() {
    let host = Host::serve(&[]);
    for (number, (name, group, start)) in
        [("web-0", "front", true), ("web-1", "front", false), ("db", "back", true)].into_iter().enumerate()
    {
        let mut body = host.vm(name, &endless(number as u32), start);
        body["sharing"] = json!({ "group": group });
        host.done("POST", "/vms", Some(&body));
    }
    for (query, expected) in [
        ("", &["db", "web-0", "web-1"][..]),
        ("?state=running", &["db", "web-0"]),
        ("?state=created", &["web-1"]),
        ("?state=crashed", &[]),
        ("?group=front", &["web-0", "web-1"]),
        ("?group=fron", &[]),
        ("?name=web-*", &["web-0", "web-1"]),
        ("?name=%2Ab", &["db"]),
        ("?state=running&group=*&name=web-*", &["web-0"]),
    ] {
        assert_eq!(names(&host.done("GET", &format!("/vms{query}"), None)), expected, "{query}");
        let options: Vec<_> = query
            .trim_start_matches('?')
            .split('&')
            .filter_map(|one| one.split_once('='))
            .map(|(key, value)| format!("--{key}={}", value.replace("%2A", "*")))
            .collect();
        let options: Vec<_> = options.iter().map(String::as_str).chain(["--json"]).collect();
        let listed = ps(&host, &options);
        listed.assert_code(0);
        assert_eq!(names(&serde_json::from_str(&listed.stdout).expect("JSON")), expected, "{query}");
    }
    let (status, problem) = host.ask("GET", "/vms?state=asleep", None);
    assert_eq!(status, 400, "{problem}");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("asleep") && detail.contains("`paused`"), "{problem}");
    assert!(ps(&host, &["--state=asleep"]).assert_code(2).stderr.contains("paused"));
    assert!(ps(&host, &["--name=a&b"]).assert_code(2).stderr.contains("letters"));
    host.end().assert_code(0);
}

pub(crate) fn unknown() {
    let host = Host::serve(&[]);
    host.done("POST", "/vms", Some(&host.vm("a", &endless(0), false)));
    for (method, path, parameter, known) in [
        ("GET", "/vms?states=running", "states", "state, group and name"),
        ("GET", "/vms?state=running&x", "x", "state, group and name"),
        ("POST", "/vms?start=true", "start", "no parameters"),
        ("GET", "/vms/a?verbose=1", "verbose", "no parameters"),
        ("GET", "/vms/a/console?until_end=true", "until_end", "use tail"),
        ("GET", "/vms/a/console/stream?follow=1", "follow", "tail, lifeline and until_end"),
        ("PATCH", "/vms/a/sharing?mode=off", "mode", "no parameters"),
        ("GET", "/sharing/pairs?limit=1&Limit=2", "Limit", "use limit"),
        ("GET", "/metrics?name=up", "name", "no parameters"),
        ("GET", "/host?x=1", "x", "no parameters"),
        ("DELETE", "/vms/a?force=true", "force", "no parameters"),
    ] {
        let (status, problem) = host.ask(method, path, None);
        assert_eq!(status, 400, "{method} {path}: {problem}");
        let (detail, help) = (problem["detail"].as_str().unwrap(), problem["help"].as_str().unwrap());
        assert!(
            detail.contains(&format!("{parameter:?}")) && help.contains(known),
            "{method} {path}: {problem}"
        );
    }
    // Also for resources without a description, and for HEAD requests.
    let answer = host.raw(b"GET /openapi.json?x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", false);
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    let answer = host.raw(b"HEAD /vms?state=running HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", false);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!(host.ask("GET", "/nothing?x", None).0, 404);
    // Refused requests had no effect.
    assert_eq!(host.done("GET", "/vms/a", None)["state"], "created");
    host.end().assert_code(0);
}

pub(crate) fn metrics() {
    let host = Host::serve(&[]);
    host.done("POST", "/vms", Some(&host.vm("a", &endless(0), true)));
    host.wait_for("/vms/a/sharing", "a look at the VM", |vm| vm["statistics"].is_object());
    let ask = |accept: &str| {
        let request = format!("GET /metrics HTTP/1.1\r\nHost: x\r\n{accept}Connection: close\r\n\r\n");
        let answer = host.raw(request.as_bytes(), false);
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        (head.to_lowercase(), body.to_owned())
    };
    for accept in
        ["", "Accept: */*\r\n", "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n"]
    {
        let (head, body) = ask(accept);
        assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
        assert!(body.contains("# TYPE samepage_merges counter\n") && body.ends_with("# EOF\n"), "{body}");
    }
    let (head, body) = ask("Accept: text/plain\r\n");
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    assert!(head.contains("vary: accept"), "{head}");
    assert!(!body.contains("# EOF") && !body.contains("# UNIT"), "{body}");
    // Each series belongs to the family that was described last.
    let mut family = "";
    for line in body.lines() {
        if let Some(described) = line.strip_prefix("# TYPE ") {
            let (name, kind) = described.split_once(' ').expect("a type");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            family = name;
        } else if !line.starts_with("# HELP ") {
            let name = line.split(['{', ' ']).next().expect("a name");
            assert_eq!(name, family, "{line}");
        }
    }
    assert!(body.contains("samepage_vm_cpu_seconds_total{vm=\"a\"}"), "{body}");
    host.end().assert_code(0);
}

pub(crate) fn console() {
    let host = Host::serve(&[]);
    host.done("POST", "/vms", Some(&host.vm("a", &endless(0), true)));
    let attach = || {
        let mut attach = command(["console", "a", "--socket"]);
        attach.arg(host.socket()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::start_as_is(attach)
    };
    // By default, the stream ends when the VM is deleted.
    let mut stays = connect(&host.socket());
    stays.write_all(b"GET /vms/a/console/stream HTTP/1.0\r\nHost: x\r\n\r\n").expect("ask");
    let attached = attach();
    attached.stdout().wait_for_line("ready");
    // A reset does not end the stream: the next guest uses the same console.
    host.act("a", "reset");
    attached.stdout().wait_for_line("ready");
    host.wait_for_console("a", "round=");
    host.done("POST", "/vms/a/console/input", Some(&json!("q")));
    let finished = attached.wait();
    finished.assert_code(0);
    assert!(finished.stdout.contains("corrupt=0"), "{}", finished.stdout);
    assert_eq!(finished.stderr, "samepage: VM a: the guest reset the machine\n");
    // For a VM that has ended, there is its last output and the reason of its end.
    let finished = attach().wait();
    assert!(finished.assert_code(0).stdout.contains("corrupt=0"), "{}", finished.stdout);
    assert!(finished.stderr.contains("VM a: the guest reset the machine"), "{}", finished.stderr);
    // A stream also follows a guest that is started later, and a VM can be deleted meanwhile.
    host.act("a", "start");
    let attached = attach();
    attached.stdout().wait_for_line("round=");
    // Three boots: the stream continued after the guest's end. The line above may be one of the second boot.
    let mut seen = Vec::new();
    while String::from_utf8_lossy(&seen).matches("start ram=").count() < 3 {
        let mut part = [0; 4096];
        let count = stays.read(&mut part).expect("read the stream");
        assert!(count > 0, "the stream ended: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&part[..count]);
    }
    assert_eq!(host.ask("DELETE", "/vms/a", None).0, 204);
    let finished = attached.wait();
    finished.assert_code(0);
    assert!(finished.stderr.starts_with("samepage: VM a"), "{}", finished.stderr);
    stays.read_to_end(&mut seen).expect("a stream that ends");
    host.end().assert_code(0);
}
