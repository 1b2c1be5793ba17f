//! The memory balloon, by Firecracker's API.

use samepage_client::socket::Client;
use serde_json::{Value, json};

use super::{MEMORY_MIB, ask, done};

/// Changes a balloon with hints and without statistics, of a guest without a driver for it.
pub(crate) fn change(client: &Client, fault: &dyn Fn(&str, &str, Value, &str)) {
    let get = |path| ask(client, "GET", path, Value::Null);
    fault("PUT", "/balloon", json!({ "amount_mib": 1, "deflate_on_oom": true }), "after starting");
    fault("PATCH", "/balloon", json!({ "amount_mib": MEMORY_MIB + 1 }), "bytes of memory");
    done(client, "PATCH", "/balloon", json!({ "amount_mib": MEMORY_MIB }));
    let expected = json!({
        "amount_mib": MEMORY_MIB, "deflate_on_oom": true, "stats_polling_interval_s": 0,
        "free_page_hinting": true, "free_page_reporting": false,
    });
    assert_eq!(get("/balloon"), (200, expected.clone()));
    assert_eq!(get("/vm/config").1["balloon"], expected);
    fault("GET", "/balloon/statistics", Value::Null, "disabled");
    fault("PATCH", "/balloon/statistics", json!({ "stats_polling_interval_s": 1 }), "enabled/disabled");
    let status = |host: u32| (200, json!({ "host_cmd": host, "guest_cmd": null }));
    assert_eq!(get("/balloon/hinting/status"), status(0));
    done(client, "PATCH", "/balloon/hinting/start", Value::Null);
    assert_eq!(get("/balloon/hinting/status"), status(2));
    done(client, "PATCH", "/balloon/hinting/start", json!({ "acknowledge_on_stop": false }));
    assert_eq!(get("/balloon/hinting/status"), status(3));
    done(client, "PATCH", "/balloon/hinting/stop", Value::Null);
    assert_eq!(get("/balloon/hinting/status"), status(1));
}
