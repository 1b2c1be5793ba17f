//! Requests that Schemathesis generates from the API's description. The server must respond as described, and
//! other VMs must be unharmed.

use std::fs;
use std::process::ExitCode;

use samepage_resources::demo::plan::Plan;
use samepage_tests::api::Host;
use samepage_tests::harness::{self, Need};
use samepage_tests::program::Running;
use samepage_tests::proxy::Proxy;
use serde_json::json;

fn main() -> ExitCode {
    harness::run_all(&[("generated_requests_do_no_harm", &[Need::Kvm, Need::Python], generated)])
}

/// The variable with the number of generated requests for each operation and kind of data.
const EXAMPLES: &str = "SAMEPAGE_TEST_EXAMPLES";

/// Endless responses cannot be checked.
const STREAMS: [&str; 2] = ["/events", "/vms/{vm}/console/stream"];

fn generated() {
    let examples = std::env::var(EXAMPLES).unwrap_or_else(|_| "12".to_owned());
    let host = Host::serve(&[]);
    let plan = |vm| Plan { vm, rounds: 0, every_ms: 100, pages: Some(512), ..Plan::default() };
    let disk = host.folder.path().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut steered = host.vm("steered", &plan(0), true);
    steered["disks"] = json!([{ "path": disk, "id": "data" }]);
    steered["balloon"] = json!({ "hinting": true });
    host.done("POST", "/vms", Some(&steered));
    host.done("POST", "/vms", Some(&host.vm("bystander", &plan(1), true)));
    host.wait_for_console("bystander", "round=");
    let before = host.holdings();

    // Most generated names do not exist; these do.
    let names = "[parameters]\n\"path.vm\" = \"steered\"\n\"path.disk\" = \"data\"\n";
    fs::write(host.folder.path().join("schemathesis.toml"), names).unwrap();
    let python = xtask::python::find().expect("a cache").expect("the harness has found it");
    let proxy = Proxy::to(&host.socket());
    let mut command = python.program("schemathesis");
    command.args(["run", &proxy.url("/openapi.json"), "--no-color", "--continue-on-failure"]);
    command.args(["--max-examples", &examples, "--seed", "1", "--generation-database", "none"]);
    // DELETE could delete the VMs that later requests need.
    command.args(["--request-timeout", "20", "--exclude-method", "DELETE"]);
    command.args(STREAMS.iter().flat_map(|path| ["--exclude-path", path]));
    command.args(["--checks", "not_a_server_error,status_code_conformance,content_type_conformance"]);
    command.args(["--checks", "response_schema_conformance,response_headers_conformance"]);
    command.current_dir(host.folder.path());
    let finished = Running::start(command).wait_for_long();
    println!("{}", finished.stdout.lines().rev().take(12).collect::<Vec<_>>().join("\n"));
    finished.assert_code(0);

    // Delete VMs that were created by chance. Nothing else may be left.
    for vm in host.done("GET", "/vms", None).as_array().unwrap() {
        let name = vm["name"].as_str().unwrap();
        if !matches!(name, "steered" | "bystander") {
            assert_eq!(host.ask("DELETE", &format!("/vms/{name}"), None).0, 204);
        }
    }
    host.done("POST", "/vms/bystander/console/input", Some(&json!("q")));
    host.wait_for("/vms/bystander", "the guest's end", |vm| vm["state"] == "stopped");
    assert!(host.console("bystander").contains("corrupt=0"), "{}", host.console("bystander"));
    host.assert_back_to(&before);
    host.end().assert_code(0);
}
