//! Bounds in the API's description: a value beyond a bound is refused, with a pointer to the value.

use std::fs;
use std::process::ExitCode;

use samepage_host::config_file;
use samepage_host::schema::config_schema;
use samepage_resources::DEMO_GUEST;
use samepage_resources::demo::plan::Plan;
use samepage_tests::api::Host;
use samepage_tests::harness::{self, Need};
use samepage_text::names::check_name;
use serde_json::{Value, json};

fn main() -> ExitCode {
    harness::run_all(&[
        ("what_the_description_forbids_is_refused", &[Need::Kvm], refused),
        ("names_that_the_description_allows_are_those_that_are_accepted", &[], names),
        ("groups_that_the_schema_of_files_allows_are_those_that_are_accepted", &[], groups),
    ])
}

/// A place in a body, and a value for it that violates the description.
type Violation = (Vec<String>, Value);

/// Follows a reference, and takes the first alternative of an optional value.
fn resolve<'a>(openapi: &'a Value, schema: &'a Value) -> &'a Value {
    if let Some(reference) = schema["$ref"].as_str() {
        return resolve(openapi, openapi.pointer(&reference[1..]).expect("a schema"));
    }
    schema
}

/// Finds all violations of a schema.
fn violations(openapi: &Value, schema: &Value, at: &[String], found: &mut Vec<Violation>) {
    let schema = resolve(openapi, schema);
    let mut add = |value: Value| found.push((at.to_vec(), value));
    if let Some(minimum) = schema["minimum"].as_u64() {
        add(json!(i128::from(minimum) as i64 - 1));
    }
    if let Some(maximum) = schema["maximum"].as_u64() {
        add(json!(maximum + 1));
    }
    if let (Some(minimum), Some(_)) = (schema["minimum"].as_u64(), schema["multipleOf"].as_u64()) {
        add(json!(minimum + 1));
    }
    if let Some(length) = schema["maxLength"].as_u64() {
        add(json!("x".repeat(length as usize + 1)));
    }
    if schema["minLength"].as_u64() > Some(0) {
        add(json!(""));
    }
    if schema["pattern"].is_string() && schema["maxLength"].is_u64() {
        add(json!("\u{e4}"));
    }
    if schema["enum"].is_array() {
        add(json!("of tomorrow"));
    }
    let below = |part: &str| [at, &[part.to_owned()]].concat();
    if let Some(most) = schema["maxItems"].as_u64() {
        let items =
            (0..=most).map(|number| json!({ "path": "disk", "id": number.to_string(), "readonly": true }));
        found.push((at.to_vec(), items.collect()));
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        violations(openapi, field, &below(name), found);
    }
    if schema["additionalProperties"] == false {
        found.push((below("of_tomorrow"), json!(1)));
    }
    if schema["items"].is_object() {
        violations(openapi, &schema["items"], &below("0"), found);
    }
    for choice in schema["oneOf"].as_array().into_iter().flatten() {
        // A text that one alternative forbids may be valid in another.
        if choice["type"] != "string" {
            violations(openapi, choice, at, found);
        }
    }
}

/// Puts a value into a body.
fn put(body: &mut Value, at: &[String], value: Value) {
    let Some((first, rest)) = at.split_first() else {
        *body = value;
        return;
    };
    if first == "0" {
        if !body.is_array() {
            *body = json!([{ "path": "disk" }]);
        }
        put(&mut body[0], rest, value);
    } else {
        put(&mut body[first.as_str()], rest, value);
    }
}

fn refused() {
    let host = Host::serve(&[]);
    let disk = host.folder.path().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).expect("write an image");
    let plan = Plan { rounds: 0, every_ms: 100, pages: Some(256), ..Plan::default() };
    let mut vm = host.vm("a", &plan, true);
    vm["disks"] = json!([{ "path": "disk", "id": "data" }]);
    vm["balloon"] = json!({});
    host.done("POST", "/vms", Some(&vm));
    let openapi: Value = host.client.get("/openapi.json").expect("the description");

    let new = json!({ "name": "b", "kernel": "demo.elf" });
    let bodies = [
        ("post", "/vms", "/vms", new),
        ("post", "/vms/{vm}/actions", "/vms/a/actions", json!({ "action": "stop" })),
        ("patch", "/vms/{vm}/sharing", "/vms/a/sharing", json!({ "mode": "zero" })),
        ("patch", "/vms/{vm}/disks/{disk}", "/vms/a/disks/data", json!({ "cache": "none" })),
        ("patch", "/vms/{vm}/balloon", "/vms/a/balloon", json!({ "size": 0 })),
    ];
    for (method, template, path, base) in bodies {
        let schema =
            &openapi["paths"][template][method]["requestBody"]["content"]["application/json"]["schema"];
        let mut all = Vec::new();
        violations(&openapi, schema, &[], &mut all);
        assert!(!all.is_empty(), "{template}");
        for (at, value) in all {
            let mut body = base.clone();
            put(&mut body, &at, value.clone());
            let (status, problem) = host.ask(&method.to_uppercase(), path, Some(&body));
            assert!(matches!(status, 400 | 422), "{path}: {at:?} = {value}: {status} {problem}");
            let pointer =
                problem["pointer"].as_str().unwrap_or_else(|| panic!("{at:?} = {value}: {problem}"));
            assert!(pointer.trim_matches('/').starts_with(&at[0]), "{at:?} = {value}: {problem}");
        }
    }

    for (template, path) in
        [("/sharing/pairs", "/sharing/pairs"), ("/vms/{vm}/pages/map", "/vms/a/pages/map")]
    {
        for parameter in openapi["paths"][template]["get"]["parameters"].as_array().expect("parameters") {
            if parameter["in"] != "query" {
                continue;
            }
            let name = parameter["name"].as_str().expect("a name");
            let mut all = Vec::new();
            violations(&openapi, &parameter["schema"], &[], &mut all);
            assert!(all.len() >= 2, "{parameter}");
            for (_, value) in all {
                let (status, problem) = host.ask("GET", &format!("{path}?{name}={value}"), None);
                assert_eq!(status, 400, "{path}: {name}={value}: {problem}");
            }
            for bound in ["minimum", "maximum"] {
                host.done("GET", &format!("{path}?{name}={}", parameter["schema"][bound]), None);
            }
        }
    }
    assert_eq!(host.done("GET", "/vms", None).as_array().map(Vec::len), Some(1));
    host.end().assert_code(0);
}

fn names() {
    let openapi: Value =
        serde_json::from_str(&samepage_api::openapi().to_json().expect("JSON")).expect("JSON");
    let allowed = &openapi["components"]["schemas"]["VmSpec"]["properties"]["name"];
    for (name, is_one) in [
        ("web-0", true),
        ("a", true),
        (".a", true),
        ("..a", true),
        ("...", true),
        ("", false),
        (".", false),
        ("..", false),
        ("a b", false),
        ("\u{e4}", false),
        (&"x".repeat(64), true),
        (&"x".repeat(65), false),
        (&".".repeat(65), false),
    ] {
        assert_eq!(check_name(name).is_ok(), is_one, "{name}");
        let validator = jsonschema::validator_for(allowed).expect("a schema");
        assert_eq!(validator.is_valid(&json!(name)), is_one, "{name}: {allowed}");
    }
}

/// A file may use templates in a group's name, so that each VM has its own group.
fn groups() {
    let schema: Value = serde_json::from_str(&config_schema()).expect("JSON");
    let validator = jsonschema::validator_for(&schema).expect("a schema");
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("vmlinux"), DEMO_GUEST).expect("a file");
    let path = folder.path().join("vms.json");
    for (group, is_one) in [
        ("{name}", true),
        ("{index}", true),
        ("front-{index}", true),
        ("{name}.{index}", true),
        (".{name}", true),
        ("front", true),
        ("...", true),
        ("{Name}", false),
        ("{name", false),
        ("name}", false),
        ("{}", false),
        ("{name} b", false),
        ("..", false),
        ("", false),
    ] {
        let file = json!({ "vms": [{
            "name": "web", "count": 2, "kernel": "vmlinux", "sharing": { "group": group },
        }] });
        fs::write(&path, file.to_string()).expect("a file");
        let loaded = config_file::load(&path);
        assert_eq!(loaded.is_ok(), is_one, "{group}");
        assert_eq!(validator.is_valid(&file), is_one, "{group}");
    }
}
