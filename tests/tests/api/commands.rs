//! Use of the program from a command line and a terminal.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use samepage_tests::api::Host;
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::program::{self, Running, command};
use samepage_tests::terminal::Terminal;
use serde_json::{Value, json};

use super::endless;

/// Returns a command of the client.
pub(crate) fn client_command(host: &Host, arguments: &[&str]) -> Command {
    let mut client = command(arguments);
    client.env("SAMEPAGE_SOCKET", host.socket()).current_dir(host.folder.path());
    client
}

pub(crate) fn commands() {
    let host = Host::serve(&[]);
    let run = |arguments: &[&str]| {
        let finished = Running::start(client_command(&host, arguments)).wait();
        finished.assert_code(0);
        finished.stdout
    };
    let fails = |arguments: &[&str]| {
        let finished = Running::start(client_command(&host, arguments)).wait();
        finished.assert_code(1);
        finished.stderr
    };
    let text = format!(
        "[defaults]\nkernel = 'demo.elf'\nmemory = '64M'\ncmdline = '{}'\n[[vms]]\nname = 'web'\ncount = 2\n\
         [[vms]]\nname = 'db'\nstart = false\n",
        endless(0)
    );
    fs::write(host.folder.path().join("vms.toml"), text).unwrap();
    assert!(run(&["config", "check", "vms.toml"]).contains("3 VMs"));
    run(&["create", "vms.toml"]);
    let listed = run(&["ps"]);
    let states: Vec<_> = listed.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
    assert_eq!(states, ["created", "running", "running"], "{listed}");
    run(&["start", "db"]);
    run(&["pause", "web-0", "web-1"]);
    let listed: Value = serde_json::from_str(&run(&["ps", "--json"])).unwrap();
    assert_eq!((&listed[0]["state"], &listed[1]["state"]), (&json!("running"), &json!("paused")));
    assert!(fails(&["pause", "web-0"]).contains("VM web-0 is paused"));
    assert!(fails(&["show", "none"]).contains("no VM named none"));
    run(&["resume", "web-0"]);
    run(&["stop", "web-0"]);
    assert!(run(&["show", "web-0"]).contains("the guest reset the machine"));
    run(&["reset", "db"]);
    run(&["sharing", "db", "--mode", "zero"]);
    assert!(run(&["sharing", "db"]).contains("zero"));
    assert!(run(&["sharing"]).contains("default"));
    assert!(run(&["stats"]).contains("VOLATILE"));
    assert!(run(&["cache"]).contains("read from disk"));
    assert!(run(&["cache", "--json"]).contains("limit_bytes"));
    assert!(run(&["console", "web-0", "--backlog"]).contains("start ram="));
    let events = Running::start(client_command(&host, &["events", "--since", "0"]));
    events.stdout().wait_for_line("VM web-0 is stopped: the guest reset the machine");
    // As bash asks after `samepage pause w` and a press of the tabulator.
    let mut complete = client_command(&host, &["--", "samepage", "pause", "w"]);
    complete.envs([("COMPLETE", "bash"), ("_CLAP_COMPLETE_INDEX", "2"), ("_CLAP_IFS", "\n")]);
    let completed = Running::start(complete).wait();
    completed.assert_code(0);
    let offered: Vec<_> = completed.stdout.split_whitespace().collect();
    assert_eq!(offered, ["web-0", "web-1"], "{}", completed.stdout);
    run(&["rm", "--all"]);
    events.stdout().wait_for_line("VM web-1 is deleted");
    assert_eq!(run(&["ps", "--json"]).trim(), "[]");
    drop(events);
    host.end().assert_code(0);

    let mistakes = tempfile::tempdir().unwrap();
    fs::write(mistakes.path().join("vms.toml"), "[[vms]]\nname = 'a'\ncpus = 2\n").unwrap();
    let mut check = command(["config", "check", "vms.toml"]);
    check.current_dir(mistakes.path());
    let finished = Running::start(check).wait();
    finished.assert_code(1);
    let told: Vec<_> = finished.stderr.lines().collect();
    assert!(told[0].starts_with("vms.toml:1: a VM needs a kernel"), "{told:?}");
    assert!(told.len() == 2 && told[1].starts_with("vms.toml:3: unknown field `cpus`"), "{told:?}");
    let nobody = Running::start(command(["ps", "--socket", "/nonexistent/socket"])).wait();
    nobody.assert_code(1);
    assert!(nobody.stderr.contains("samepage serve --socket"), "{}", nobody.stderr);
    let script = Running::start(command(["completions", "bash"])).wait();
    script.assert_code(0);
    assert!(
        script.stdout.contains("COMPLETE=\"bash\"") && script.stdout.contains("complete"),
        "{}",
        script.stdout
    );
    let mut man = command(["man"]);
    man.arg(mistakes.path().join("man"));
    Running::start(man).wait().assert_code(0);
    assert!(mistakes.path().join("man/samepage-serve.1").exists());
}

pub(crate) fn created() {
    let host = Host::serve(&[]);
    let finished = |arguments: &[&str]| Running::start(client_command(&host, arguments)).wait();
    let folder = host.folder.path();
    fs::write(folder.join("base.img"), vec![7; 1 << 20]).unwrap();
    let line = endless(0).to_string();
    let disk = "path={name}.qcow2,backing=base.img,create,size=2M";
    let options = ["--kernel", "demo.elf", "--memory", "64M", "--cmdline", &line, "--disk", disk];
    let created = finished(&[&["create", "web", "--count", "2", "--json"], &options[..]].concat());
    created.assert_code(0);
    let vms: Value = serde_json::from_str(&created.stdout).unwrap();
    let states: Vec<_> = vms.as_array().unwrap().iter().map(|vm| (&vm["name"], &vm["state"])).collect();
    assert_eq!(states, [(&json!("web-0"), &json!("running")), (&json!("web-1"), &json!("running"))]);
    // Paths begin at the client's folder, and each VM has an overlay of its own.
    let disks = host.done("GET", "/vms/web-1", None)["config"]["disks"].clone();
    let path = |name: &str| json!(folder.join(name));
    assert_eq!((&disks[0]["path"], &disks[0]["backing"]), (&path("web-1.qcow2"), &path("base.img")));
    assert_eq!(host.done("GET", "/vms/web-1/disks", None)[0]["size_bytes"], 2 << 20);
    assert!(folder.join("web-0.qcow2").exists() && folder.join("web-1.qcow2").exists());

    let held = finished(&["create", "db", "--kernel", "demo.elf", "--memory", "64M", "--hold"]);
    held.assert_code(0);
    assert_eq!(host.done("GET", "/vms/db", None)["state"], "created");
    let twice = finished(&["create", "db", "--kernel", "demo.elf"]);
    twice.assert_code(1);
    assert!(twice.stderr.contains("named db"), "{}", twice.stderr);
    // The same image with another backing image.
    fs::write(folder.join("other.img"), vec![7; 1 << 20]).unwrap();
    let other = "path=web-0.qcow2,backing=other.img,create";
    finished(&["rm", "--all"]).assert_code(0);
    let refused = finished(&["create", "web", "--kernel", "demo.elf", "--disk", other]);
    refused.assert_code(1);
    assert!(refused.stderr.contains("base.img, and not by"), "{}", refused.stderr);
    host.end().assert_code(0);
}

pub(crate) fn terminal() {
    let host = Host::serve(&[]);
    host.done("POST", "/vms", Some(&host.vm("a", &endless(0), true)));
    let mut terminal = Terminal::open();
    let before = terminal.settings();
    let mut attach = Command::new(program::path());
    attach.args(["console", "a", "--socket"]).arg(host.socket());
    let attached = terminal.start(&attach);
    terminal.wait_for("round=");
    assert!(terminal.settings().is_raw());
    terminal.type_keys(b"\x01h");
    terminal.wait_for("leave the console");
    terminal.type_keys(b"\x01x");
    terminal.wait_for_end(attached).assert_code(0);
    assert_eq!(terminal.settings(), before);
    // The VM continues, and its console can be attached again. The guest receives the input.
    let attached = terminal.start(&attach);
    terminal.wait_for("round=");
    terminal.type_keys(b"q");
    terminal.wait_for("corrupt=0");
    terminal.wait_for("VM a: the guest reset the machine");
    terminal.wait_for_end(attached).assert_code(0);
    assert_eq!(terminal.settings(), before);
    host.end().assert_code(0);
}

pub(crate) fn top() {
    let host = Host::serve(&[]);
    host.done("POST", "/vms", Some(&host.vm("a", &endless(0), true)));
    host.done("POST", "/vms", Some(&host.vm("b", &endless(1), true)));
    let mut terminal = Terminal::open();
    let before = terminal.settings();
    let mut top = Command::new(program::path());
    top.args(["top", "--interval", "0.2", "--socket"]).arg(host.socket());
    let shown = terminal.start(&top);
    let shows = |terminal: &mut Terminal, text: &str| {
        terminal.wait_for_picture(text, |picture| picture.alternate && picture.text.contains(text))
    };
    let is_left = |terminal: &mut Terminal, text: &str| {
        terminal.wait_for_picture("the terminal as it was", |picture| {
            !picture.alternate && !picture.hidden && picture.text.contains(text)
        });
    };
    shows(&mut terminal, "2 VMs, 2 running");
    // A picture arrives in parts; this is its last line.
    let text = shows(&mut terminal, "q quit");
    assert!(text.lines().count() <= 24, "{text}");
    assert!(terminal.settings().is_raw());
    // The second VM is paused, and resumes.
    terminal.type_keys(b"\x1b[Bp");
    host.wait_for("/vms/b", "a pause", |vm| vm["state"] == "paused");
    shows(&mut terminal, "VM b is paused");
    terminal.type_keys(b"p");
    host.wait_for("/vms/b", "a guest that goes on", |vm| vm["state"] == "running");
    // To its console and back.
    terminal.type_keys(b"c");
    is_left(&mut terminal, "round=");
    terminal.type_keys(b"\x01x");
    shows(&mut terminal, "2 VMs, 2 running");
    terminal.type_keys(b"?");
    shows(&mut terminal, "any key goes back");
    terminal.resize(120, 40);
    shows(&mut terminal, "65530 mappings");
    terminal.type_keys(b" ");
    terminal.type_keys(b"q");
    is_left(&mut terminal, "");
    terminal.wait_for_end(shown).assert_code(0);
    assert_eq!(terminal.settings(), before);
    // A signal also ends it, and so does the end of the server.
    let shown = terminal.start(&top);
    shows(&mut terminal, "2 VMs, 2 running");
    shown.signal(Signal::TERM);
    is_left(&mut terminal, "");
    terminal.wait_for_end(shown).assert_code(0);
    assert_eq!(terminal.settings(), before);
    let shown = terminal.start(&top);
    shows(&mut terminal, "2 VMs, 2 running");
    host.end().assert_code(0);
    is_left(&mut terminal, "samepage serve --socket");
    terminal.wait_for_end(shown).assert_code(1);
    assert_eq!(terminal.settings(), before);
    let no_terminal = Running::start(top).wait();
    no_terminal.assert_code(1);
    assert!(no_terminal.stderr.contains("needs a terminal"), "{}", no_terminal.stderr);
}

pub(crate) fn run_with_socket() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("demo.elf"), samepage_resources::DEMO_GUEST).unwrap();
    let text =
        format!("[[vms]]\nname = 'a'\nkernel = 'demo.elf'\nmemory = '64M'\ncmdline = '{}'\n", endless(0));
    fs::write(folder.path().join("vms.toml"), text).unwrap();
    let socket = folder.path().join("socket");
    let mut run = command(["run", "--config", "vms.toml", "--socket"]);
    run.arg(&socket).current_dir(folder.path());
    let running = Running::start(run);
    let client = samepage_client::socket::Client::new(&socket);
    let deadline = Instant::now() + TIME_LIMIT;
    while client.get::<Value>("/vms/a").is_err() {
        assert!(Instant::now() < deadline, "no socket");
        thread::sleep(Duration::from_millis(10));
    }
    // A reset of the only VM does not end the process; the VM's end does.
    let post = |body: Value| client.send::<Value>("POST".parse().unwrap(), "/vms/a/actions", &body).unwrap();
    assert_eq!(post(json!({ "action": "reset" }))["state"], "running");
    post(json!({ "action": "kill" }));
    running.wait().assert_code(0);
    assert!(!socket.exists());
}
