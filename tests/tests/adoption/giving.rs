//! Guests that give pages back by a balloon while their process is killed.

use std::time::Duration;

use samepage_resources::demo::plan::Plan;
use samepage_tests::api::Host;
use samepage_tests::progress::{assert_sound, wait_until};
use samepage_tests::shared::churn;
use serde_json::json;

use super::{FIRST_DISK, KILLS, Nest, adopted};

/// Guests use pages again that they have given back, whatever has become of who was to free them.
pub(crate) fn killed() {
    let kills = std::env::var("SAMEPAGE_TEST_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number"));
    let mut nest = Nest::new();
    let options = ["--vms-per-worker", "1"];
    let mut server = nest.serve(&options);
    let names = ["a", "b"];
    for (vm, name) in (0..).zip(names) {
        // The balloon comes after the entropy device.
        let plan =
            Plan { vm, pages: Some(1024), every_ms: 20, balloon: Some(FIRST_DISK + 0x1000), ..churn() };
        let mut body = server.vm(name, &plan, true);
        body["balloon"] = json!({});
        server.done("POST", "/vms", Some(&body));
    }
    let freed = |server: &Host, name: &str| {
        let balloon = server.done("GET", &format!("/vms/{name}/balloon"), None);
        balloon["statistics"]["freed_pages"].as_u64().expect("a number")
    };
    for kill in 0..kills {
        wait_until("pages that are freed", || names.iter().all(|name| freed(&server, name) > 500));
        std::thread::sleep(Duration::from_micros(u64::from(kill) * 1_717 % 20_000));
        nest.kill(server);
        server = nest.serve(&options);
        for name in names {
            adopted(&server, name);
            let (round, before) = (server.round(name), freed(&server, name));
            wait_until("rounds of an adopted guest", || server.round(name) > round + 1);
            assert_sound(&server.console(name));
            assert_eq!(freed(&server, name), before, "nobody knows these pages");
            assert_eq!(server.act(name, "reset"), "running");
        }
    }
    nest.end(server);
}
