//! The memory balloon, as clients see it whose guests have no driver for it.

use samepage_tests::api::{Host, MEMORY};
use samepage_tests::program::Running;
use serde_json::{Value, json};

use super::commands::client_command;
use super::endless;

pub(crate) fn balloon() {
    for arguments in [&[][..], &["--vms-per-worker", "1"]] {
        sized(arguments);
    }
}

/// A balloon is created, changed and shown, wherever its VM is.
fn sized(arguments: &[&str]) {
    let host = Host::serve(arguments);
    let mut vm = host.vm("a", &endless(0), true);
    vm["balloon"] = json!({ "size": "8M", "stats_interval": 5 });
    let created = host.done("POST", "/vms", Some(&vm));
    assert_eq!(created["config"]["balloon"]["reporting"], true, "{created}");
    let path = "/vms/a/balloon";
    let shown = host.done("GET", path, None);
    let expected = (&json!(8 << 20), &json!(0), &json!(false), &json!(5));
    assert_eq!(
        (&shown["size_bytes"], &shown["actual_bytes"], &shown["active"], &shown["stats_interval"]),
        expected
    );
    assert_eq!((&shown["guest"], &shown["statistics"]["freed_pages"]), (&Value::Null, &json!(0)));
    let change = json!({ "size": "4M", "stats_interval": 0 });
    let changed = host.done("PATCH", path, Some(&change));
    assert_eq!((&changed["size_bytes"], &changed["stats_interval"]), (&json!(4 << 20), &json!(0)));
    for (wrong, status, place) in [
        (json!({}), 400, Value::Null),
        (json!({ "size": MEMORY + 4096 }), 422, json!("/size")),
        (json!({ "size": 4095 }), 422, json!("/size")),
        (json!({ "stats_interval": 65_536 }), 422, json!("/stats_interval")),
        (json!({ "hints": "start", "size": 0 }), 422, json!("/hints")),
    ] {
        let (answered, problem) = host.ask("PATCH", path, Some(&wrong));
        assert_eq!((answered, &problem["pointer"]), (status, &place), "{wrong}: {problem}");
    }
    assert_eq!(host.done("GET", path, None)["size_bytes"], 4 << 20, "nothing was changed by halves");
    let metrics = host.client.raw("GET".parse().unwrap(), "/metrics", Vec::new()).unwrap();
    let metrics = String::from_utf8(metrics.body).unwrap();
    assert!(metrics.contains("samepage_balloon_size_bytes{vm=\"a\"} 4194304"), "{metrics}");
    assert!(metrics.contains("samepage_balloon_freed_pages_total{vm=\"a\"} 0"), "{metrics}");

    let run = |arguments: &[&str]| {
        let finished = Running::start(client_command(&host, arguments)).wait();
        finished.assert_code(0);
        finished.stdout
    };
    run(&["balloon", "a", "--size", "2M", "--stats-interval", "7"]);
    assert!(run(&["balloon", "a"]).contains("of 2.0 MiB, no driver in the guest"));
    assert!(run(&["show", "a"]).contains("of 2.0 MiB"));
    let shown: Value = serde_json::from_str(&run(&["balloon", "a", "--json"])).unwrap();
    assert_eq!(shown["stats_interval"], 7);

    // Each boot begins with what the description says.
    host.act("a", "reset");
    assert_eq!(host.done("GET", path, None)["size_bytes"], 8 << 20);
    host.act("a", "kill");
    let shown = host.done("GET", path, None);
    assert_eq!((&shown["size_bytes"], &shown["actual_bytes"]), (&json!(8 << 20), &Value::Null));
    assert_eq!(host.ask("PATCH", path, Some(&change)).0, 409);

    host.done("POST", "/vms", Some(&host.vm("b", &endless(1), false)));
    assert_eq!(host.ask("GET", "/vms/b/balloon", None).0, 404);
    assert_eq!(host.ask("PATCH", "/vms/b/balloon", Some(&change)).0, 404);
    let mut hinted = host.vm("c", &endless(1), false);
    hinted["balloon"] = json!({ "hinting": true, "reporting": false });
    host.done("POST", "/vms", Some(&hinted));
    let started = host.done("PATCH", "/vms/c/balloon", Some(&json!({ "hints": "start" })));
    assert_eq!(started["hints"]["host"], 2, "{started}");
    let stopped = host.done("PATCH", "/vms/c/balloon", Some(&json!({ "hints": "stop" })));
    assert_eq!(stopped["hints"]["host"], 1, "{stopped}");
    let mut refused = host.vm("d", &endless(1), false);
    refused["balloon"] = json!({ "size": MEMORY + 4096 });
    let (status, problem) = host.ask("POST", "/vms", Some(&refused));
    assert_eq!((status, &problem["pointer"]), (422, &json!("/balloon/size")), "{problem}");
    host.end().assert_code(0);
}
