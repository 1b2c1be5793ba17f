//! Figures for people: they must be present from the first request on, and mean what their names say.

use std::process::ExitCode;

use samepage_resources::demo::plan::Plan;
use samepage_tests::api::Host;
use samepage_tests::harness::{self, Need};
use samepage_tests::program::{Running, command};
use serde_json::json;

fn main() -> ExitCode {
    harness::run_all(&[
        ("the_first_list_has_no_gaps", &[Need::Kvm], first_list),
        ("a_reset_is_told_as_one", &[Need::Kvm], reset),
        ("a_process_that_shares_nothing_says_so", &[Need::Kvm], not_sharing),
    ])
}

/// A guest that continues until it is asked to finish.
fn endless(vm: u32) -> Plan {
    Plan { vm, rounds: 0, every_ms: 20, pages: Some(1024), ..Plan::default() }
}

/// Returns a command's output about a process.
fn printed(host: &Host, arguments: &[&str]) -> String {
    let mut command = command(arguments);
    command.env("SAMEPAGE_SOCKET", host.socket());
    let finished = Running::start(command).wait();
    finished.assert_code(0);
    finished.stdout
}

fn first_list() {
    let host = Host::serve(&[]);
    for name in ["first", "second"] {
        host.done("POST", "/vms", Some(&host.vm(name, &endless(0), true)));
        // There was no earlier request, or the VM did not exist then.
        let list = printed(&host, &["ps"]);
        let row = list.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{list}"));
        assert!(!row.contains(" -"), "{list}");
        let listed = host.done("GET", "/vms", None);
        assert!(listed.as_array().unwrap().iter().all(|vm| vm["resident_bytes"].is_u64()), "{listed}");
        assert!(host.done("GET", &format!("/vms/{name}"), None)["saved_bytes"].is_u64());
    }
    // Overhead must not appear as negative savings.
    let sharing = printed(&host, &["sharing"]);
    assert!(
        sharing.contains("overhead  ") && !sharing.contains("-0") && !sharing.contains(" -"),
        "{sharing}"
    );
    host.end().assert_code(0);
}

fn reset() {
    let host = Host::serve(&[]);
    host.done("POST", "/vms", Some(&host.vm("a", &endless(0), true)));
    assert_eq!(host.act("a", "reset"), "running");
    host.running.stderr().wait_for_line("VM a: it was reset");
    assert_eq!(host.act("a", "kill"), "stopped");
    host.running.stderr().wait_for_line("VM a: stopped");
    let mut events = command(["events", "--since", "0"]);
    events.env("SAMEPAGE_SOCKET", host.socket());
    let events = Running::start(events);
    events.stdout().wait_for_line("VM a is running: it was reset");
    let told = events.stdout().wait_for(|text| text.contains("stopped: ").then(|| text.to_owned()));
    assert!(told.contains("VM a is stopped: it was killed") && !told.contains("stopped: stopped"), "{told}");
    assert_eq!(told.matches("is stopped").count(), 1, "{told}");
    let list = printed(&host, &["ps"]);
    assert!(list.contains("it was killed"), "{list}");
    host.end().assert_code(0);
}

fn not_sharing() {
    let host = Host::serve(&["--no-sharing"]);
    let mut body = host.vm("a", &endless(0), true);
    body["sharing"] = json!({ "mode": "full" });
    let created = host.done("POST", "/vms", Some(&body));
    assert_eq!((&created["mode"], &created["config"]["sharing"]["mode"]), (&json!("off"), &json!("full")));
    let list = printed(&host, &["ps"]);
    let row = list.lines().find(|line| line.starts_with("a ")).unwrap_or_else(|| panic!("{list}"));
    assert!(row.contains("  off") && !row.contains("full"), "{list}");
    let (status, problem) = host.ask("PATCH", "/vms/a/sharing", Some(&json!({ "mode": "zero" })));
    assert!(status == 409 && problem["help"].as_str().unwrap().contains("--no-sharing"), "{problem}");
    host.end().assert_code(0);
}
