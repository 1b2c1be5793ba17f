//! Checks the dependencies between crates, from the workspace's Cargo.toml files.
//!
//! The table is the same as in `docs/design.md`. Dependencies of tests (`dev-dependencies`) are not checked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use toml::{Table, Value};

/// Each crate of the layers, with the crates of the workspace that it may use directly.
const LAYERS: &[(&str, &[&str])] = &[
    ("samepage-hole", &[]),
    ("samepage-text", &[]),
    ("samepage-spec", &["samepage-text"]),
    ("samepage-sharing", &["samepage-hole", "samepage-spec"]),
    ("samepage-devices", &["samepage-hole", "samepage-spec"]),
    ("samepage-process", &["samepage-sharing"]),
    (
        "samepage-machine",
        &[
            "samepage-devices",
            "samepage-hole",
            "samepage-process",
            "samepage-sharing",
            "samepage-spec",
            "samepage-text",
        ],
    ),
    ("samepage-metadata", &["samepage-devices"]),
    ("samepage-analyze", &["samepage-process", "samepage-sharing", "samepage-text"]),
    ("samepage-api-types", &["samepage-hole", "samepage-spec"]),
    ("samepage-web", &[]),
    (
        "samepage-client",
        &[
            "samepage-api-types",
            "samepage-hole",
            "samepage-process",
            "samepage-sharing",
            "samepage-spec",
            "samepage-text",
            "samepage-web",
        ],
    ),
    (
        "samepage-worker",
        &[
            "samepage-api-types",
            "samepage-devices",
            "samepage-hole",
            "samepage-machine",
            "samepage-process",
            "samepage-sharing",
            "samepage-spec",
        ],
    ),
    (
        "samepage-host",
        &[
            "samepage-api-types",
            "samepage-devices",
            "samepage-machine",
            "samepage-process",
            "samepage-sharing",
            "samepage-spec",
            "samepage-text",
            "samepage-worker",
        ],
    ),
    (
        "samepage-api",
        &[
            "samepage-api-types",
            "samepage-devices",
            "samepage-host",
            "samepage-machine",
            "samepage-sharing",
            "samepage-spec",
            "samepage-text",
            "samepage-web",
            "samepage-worker",
        ],
    ),
    (
        "samepage-firecracker",
        &[
            "samepage-api",
            "samepage-api-types",
            "samepage-client",
            "samepage-host",
            "samepage-machine",
            "samepage-metadata",
            "samepage-process",
            "samepage-sharing",
            "samepage-spec",
            "samepage-text",
            "samepage-worker",
        ],
    ),
];

/// The starts of crate names that each crate may not reach, even indirectly.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("samepage-text", &["libc", "rustix", "tokio", "hyper", "kvm-"]),
    ("samepage-process", &["kvm-", "axum", "hyper", "tokio"]),
    ("samepage-spec", &["kvm-", "axum", "hyper", "tokio", "libc"]),
    ("samepage-sharing", &["kvm-", "virtio-", "axum", "hyper", "tokio"]),
    ("samepage-devices", &["kvm-", "axum", "hyper", "tokio"]),
    ("samepage-machine", &["axum", "hyper", "tokio", "clap", "utoipa"]),
    ("samepage-metadata", &["kvm-", "axum", "hyper", "tokio", "samepage-machine", "samepage-sharing"]),
    ("samepage-analyze", &["kvm-", "axum", "hyper", "tokio", "samepage-devices", "samepage-machine"]),
    ("samepage-api-types", &["kvm-", "axum", "hyper", "tokio", "clap", "libc", "samepage-sharing"]),
    ("samepage-web", &["kvm-", "axum", "hyper", "tokio"]),
    ("samepage-client", &["kvm-", "axum", "samepage-devices", "samepage-machine"]),
    ("samepage-worker", &["axum", "hyper", "tokio", "clap"]),
    ("samepage-host", &["axum", "hyper", "http", "clap"]),
    ("samepage-api", &["clap", "ratatui"]),
    ("samepage-firecracker", &["samepage-analyze"]),
    ("samepage", &["samepage-bench", "samepage-tests", "xtask"]),
    ("samepage-bench", &["samepage-tests", "xtask"]),
    ("xtask", &["samepage-bench", "samepage-machine", "samepage-sharing"]),
];

/// Returns the crates of the workspace with their direct dependencies, except those of tests.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |folder: &Path| -> Table {
        let path = folder.join("Cargo.toml");
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let members = read(&root)["workspace"]["members"].as_array().cloned().expect("a list of members");
    let of_member = |member: &Value| {
        let manifest = read(&root.join(member.as_str().expect("a path")));
        let name = manifest["package"]["name"].as_str().expect("a name").to_owned();
        let tables = ["dependencies", "build-dependencies"].map(|table| manifest.get(table));
        // An optional dependency counts only with its feature, and other users do not get it.
        let is_optional = |value: &Value| value.get("optional").and_then(Value::as_bool) == Some(true);
        let entries = tables.into_iter().flatten().filter_map(Value::as_table).flatten();
        let names = entries.filter(|(_, value)| !is_optional(value)).map(|(name, _)| name.clone());
        (name, names.collect())
    };
    members.iter().map(of_member).collect()
}

/// Returns all crates that a crate reaches, each with the crate that depends on it.
fn reached(all: &BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeMap<String, String> {
    let mut reached = BTreeMap::new();
    let mut ahead = vec![from.to_owned()];
    while let Some(name) = ahead.pop() {
        for used in all.get(&name).into_iter().flatten() {
            if reached.insert(used.clone(), name.clone()).is_none() {
                ahead.push(used.clone());
            }
        }
    }
    reached
}

#[test]
fn crates_use_only_what_lies_below_them() {
    let all = dependencies();
    let mut wrong = Vec::new();
    for (name, allowed) in LAYERS {
        let used = all.get(*name).unwrap_or_else(|| panic!("there is no crate {name}"));
        let ours = used.iter().filter(|used| all.contains_key(*used));
        wrong.extend(
            ours.filter(|used| !allowed.contains(&used.as_str())).map(|used| format!("{name} uses {used}")),
        );
    }
    assert!(wrong.is_empty(), "against the table of docs/design.md: {}", wrong.join(", "));
}

#[test]
fn crates_know_nothing_of_what_is_none_of_theirs() {
    let all = dependencies();
    let mut wrong = Vec::new();
    for (name, forbidden) in FORBIDDEN {
        for (used, by) in reached(&all, name) {
            if forbidden.iter().any(|start| used.starts_with(start)) {
                wrong.push(format!("{name} reaches {used} (by {by})"));
            }
        }
    }
    assert!(wrong.is_empty(), "against the table of docs/design.md: {}", wrong.join(", "));
}

#[test]
fn every_crate_of_the_monitor_has_its_place_in_the_table() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let all = dependencies();
    let docs = fs::read_to_string(root.join("docs/design.md")).expect("docs/design.md");
    for name in all.keys().filter(|name| {
        !["samepage-agent", "samepage-resources", "samepage-tests", "xtask"].contains(&name.as_str())
    }) {
        assert!(docs.contains(&format!("| `{name}` |")), "{name} is missing in the table of docs/design.md");
        assert!(
            ["samepage", "samepage-bench"].contains(&name.as_str())
                || LAYERS.iter().any(|(layer, _)| layer == name),
            "{name} is missing here"
        );
    }
}
