//! The resources and their OpenAPI description.

mod balloon;
mod console;
mod host;
mod networks;
mod pages;
mod query;
mod sharing;
mod vms;
mod watch;

use std::sync::Arc;

use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::{Router, middleware, routing};
use utoipa::OpenApi;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::path::Operation;
use utoipa::openapi::response::ResponseBuilder;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{PathItem, Ref, RefOr};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::http::{self, Guard};
use super::problem;
use super::server::Api;
use samepage_api_types::events::Event;
use samepage_api_types::problem::{PROBLEM_JSON, Problem};

/// The parts of the description that all paths share.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "samepage",
        description = "The control socket of samepage: the VMs of a process, and the memory that they share. \
                       Errors are problem details (RFC 9457).",
        license(name = "Apache-2.0 OR BSD-3-Clause", identifier = "Apache-2.0 OR BSD-3-Clause")
    ),
    tags(
        (name = "vms", description = "Virtual machines"),
        (name = "console", description = "Serial consoles of the VMs"),
        (name = "sharing", description = "Shared memory"),
        (name = "process", description = "The process and its host")
    ),
    components(schemas(Problem, Event)),
    security((), ("token" = []))
)]
struct Description;

/// Returns how clients of the port prove their authorisation. The socket requires none.
fn token() -> SecurityScheme {
    let description = "The token in the file of --http-token, for requests to the port of --http. Requests to the socket \
                       need no token, because the socket's permissions decide who may connect.";
    let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(description));
    SecurityScheme::Http(scheme.build())
}

fn described() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(vms::list, vms::create))
        .routes(routes!(vms::show, vms::delete))
        .routes(routes!(vms::act, vms::put_action))
        .routes(routes!(vms::disks))
        .routes(routes!(vms::resize_disk))
        .routes(routes!(vms::disk, vms::change_disk))
        .routes(routes!(networks::list))
        .routes(routes!(networks::show, networks::change))
        .routes(routes!(balloon::show, balloon::change))
        .routes(routes!(console::backlog))
        .routes(routes!(console::stream))
        .routes(routes!(console::input))
        .routes(routes!(sharing::of_vm, sharing::change_vm))
        .routes(routes!(sharing::of_process))
        .routes(routes!(sharing::pairs))
        .routes(routes!(sharing::working_set))
        .routes(routes!(pages::of_process))
        .routes(routes!(pages::of_vm))
        .routes(routes!(pages::map))
        .routes(routes!(sharing::cache))
        .routes(routes!(host::host))
        .routes(routes!(host::version))
        .routes(routes!(host::memory))
        .routes(routes!(watch::events))
        .routes(routes!(watch::metrics))
}

/// Returns the OpenAPI 3.1 description of the API.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    describe(described()).1
}

fn describe(router: OpenApiRouter<Arc<Api>>) -> (Router<Arc<Api>>, utoipa::openapi::OpenApi) {
    let (router, mut openapi) = router.split_for_parts();
    openapi.paths.paths.values_mut().flat_map(operations).for_each(|operation| {
        operation.responses.responses.values_mut().for_each(describe_response);
        add_problem(operation);
    });
    openapi.components.get_or_insert_default().add_security_scheme("token", token());
    (router, openapi)
}

fn operations(path: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut path.get, &mut path.put, &mut path.post, &mut path.delete, &mut path.patch].into_iter().flatten()
}

/// Gives each response a description.
fn describe_response(response: &mut RefOr<utoipa::openapi::Response>) {
    if let RefOr::T(response) = response
        && response.description.is_empty()
    {
        "The requested data, or the result of the action".clone_into(&mut response.description);
    }
}

/// Adds problems as the response to all errors.
fn add_problem(operation: &mut Operation) {
    let schema = RefOr::Ref(Ref::from_schema_name("Problem"));
    let content = ContentBuilder::new().schema(Some(schema)).build();
    let response =
        ResponseBuilder::new().description("The error and the remedy").content(PROBLEM_JSON, content);
    operation.responses.responses.insert("default".into(), RefOr::T(response.build()));
}

/// Returns the routes for clients of the Unix socket, and the guarded routes for clients of the port.
pub(super) fn routers(api: Arc<Api>, guard: Option<Guard>) -> (Router, Option<Router>) {
    let router = router(api);
    let finish = |router: Router| router.layer(middleware::from_fn(problem::write_problems));
    let guarded = guard.map(|guard| {
        let guard = middleware::from_fn_with_state(Arc::new(guard), http::guard);
        finish(router.clone().layer(guard))
    });
    (finish(router), guarded)
}

fn router(api: Arc<Api>) -> Router {
    let (router, openapi) = describe(described());
    let known = Arc::new(query::Known::of(&openapi));
    // A description of constant types can always be written.
    let json = Bytes::from(openapi.to_json().unwrap_or_default());
    let openapi = move || {
        let json = json.clone();
        async move { ([(CONTENT_TYPE, "application/json")], json).into_response() }
    };
    router
        .route("/openapi.json", routing::get(openapi))
        .route_layer(middleware::from_fn_with_state(known, query::check))
        .fallback(problem::no_such_resource)
        .with_state(api)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use samepage_devices::virtio::block::{MAX_ID_LEN, MAX_QUEUES};
    use samepage_sharing::PAGE_SIZE;
    use serde_json::{Value, json};

    use super::*;
    use crate::maps::MOST_CELLS;
    use samepage_host::statistics::MOST_PAIRS;
    use samepage_machine::vm::{MAX_DISKS, MAX_NETWORKS, MAX_PCI_DISKS};
    use samepage_machine::x86::layout::{COMMAND_LINE_MAX, MAX_RAM, MIN_RAM};
    use samepage_text::names::MAX_NAME;

    #[test]
    fn the_description_is_openapi_3_1_and_names_every_resource() {
        let json: serde_json::Value = serde_json::from_str(&openapi().to_json().unwrap()).unwrap();
        assert!(json["openapi"].as_str().unwrap().starts_with("3.1"));
        let docs = include_str!("../../../../docs/api.md");
        for (path, item) in json["paths"].as_object().unwrap() {
            assert!(docs.contains(&format!("`{path}`")), "docs/api.md does not mention {path}");
            for (method, operation) in item.as_object().unwrap() {
                let responses = operation["responses"].as_object().unwrap();
                assert!(responses["default"].is_object(), "{method} {path}");
                let told =
                    |response: &Value| response["description"].as_str().is_some_and(|text| !text.is_empty());
                assert!(responses.values().all(told), "{method} {path}: {responses:?}");
                assert!(operation["summary"].is_string(), "{method} {path}");
            }
        }
    }

    fn description() -> Value {
        serde_json::from_str(&openapi().to_json().unwrap()).unwrap()
    }

    #[test]
    fn operations_have_names_of_their_own() {
        let json = description();
        let items =
            json["paths"].as_object().unwrap().values().flat_map(|item| item.as_object().unwrap().values());
        let names: Vec<_> = items.map(|operation| operation["operationId"].as_str().unwrap()).collect();
        let unique: HashSet<_> = names.iter().collect();
        assert!(names.len() > 20 && unique.len() == names.len(), "{names:?}");
        let plain = |name: &str| name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        assert!(names.iter().all(|name| plain(name)), "{names:?}");
    }

    #[test]
    fn the_token_is_described() {
        let json = description();
        let scheme = &json["components"]["securitySchemes"]["token"];
        assert_eq!((&scheme["type"], &scheme["scheme"]), (&json!("http"), &json!("bearer")));
        // The socket takes requests without.
        assert_eq!(json["security"], json!([{}, { "token": [] }]));
    }

    /// The page of limits has the numbers of the code.
    #[test]
    fn limits_are_those_of_the_documents() {
        let page = include_str!("../../../../docs/limits.md");
        let has = |what: &str, limit: &dyn std::fmt::Display| {
            let row = page.lines().find(|line| line.starts_with(&format!("| {what}")));
            let row = row.unwrap_or_else(|| panic!("docs/limits.md has no limit of {what}"));
            assert!(row.contains(&format!("| {limit}")), "the limit is {limit}: {row}");
        };
        assert_eq!((MIN_RAM, MAX_RAM), (2 << 20, 8_796_093_022_208 - (4 << 30)));
        has("vCPUs", &samepage_spec::MAX_VCPUS);
        has("disks, with that for cloud-init", &MAX_DISKS);
        has("the same with `--bus pci`", &MAX_PCI_DISKS);
        has("queues of a disk", &MAX_QUEUES);
        has("kernel command line", &(COMMAND_LINE_MAX - 1));
        has("name of a VM", &MAX_NAME);
        has("name of a disk", &MAX_ID_LEN);
        let kibibytes = format!("{} KiB", samepage_host::backlog::CAPACITY >> 10);
        has("console that clients can read again", &kibibytes);
        let mebibytes = |bytes: u64| format!("{} MiB", bytes >> 20);
        has("file for cloud-init", &mebibytes(samepage_machine::seed::MAX_FILE_BYTES));
        has("connections to the control socket", &crate::server::MAX_CONNECTIONS);
        has("connections to the port", &crate::server::MAX_HTTP_CONNECTIONS);
        has("body of a request", &mebibytes(crate::extract::MAX_BODY as u64));
        has("runs of a map", &MOST_CELLS);
    }

    /// The bounds that the code enforces are those of the description.
    #[test]
    fn bounds_are_those_that_are_enforced() {
        let json = description();
        let schema =
            |name: &str, field: &str| json["components"]["schemas"][name]["properties"][field].clone();
        let memory = &schema("VmSpec", "memory")["oneOf"][0];
        assert_eq!(
            (&memory["minimum"], &memory["maximum"], &memory["multipleOf"]),
            (&json!(MIN_RAM), &json!(MAX_RAM), &json!(PAGE_SIZE))
        );
        assert_eq!(schema("LimitsSpec", "rate")["oneOf"][0]["minimum"], 1);
        assert_eq!(schema("LimitsSpec", "iops")["minimum"], 1);
        assert_eq!(schema("VmSpec", "disks")["maxItems"], MAX_PCI_DISKS);
        assert_eq!(schema("VmSpec", "networks")["maxItems"], MAX_NETWORKS);
        let queues = schema("DiskSpec", "queues");
        assert_eq!((&queues["minimum"], &queues["maximum"]), (&json!(1), &json!(MAX_QUEUES)));
        assert_eq!(schema("VmSpec", "name")["maxLength"], MAX_NAME);
        assert_eq!(schema("SharingSpec", "group")["maxLength"], MAX_NAME);
        assert_eq!(schema("DiskSpec", "id")["maxLength"], MAX_ID_LEN);
        assert_eq!(schema("VmSpec", "cmdline")["maxLength"], COMMAND_LINE_MAX - 1);
        assert_eq!(schema("ActionRequest", "timeout_seconds")["maximum"], vms::LONGEST_STOP_TIMEOUT);
        let query = |path: &str, name: &str| {
            let parameters = json["paths"][path]["get"]["parameters"].as_array().unwrap();
            parameters.iter().find(|one| one["name"] == name).unwrap()["schema"].clone()
        };
        assert_eq!(query("/sharing/pairs", "limit")["maximum"], MOST_PAIRS);
        let cells = query("/vms/{vm}/pages/map", "cells");
        assert_eq!((&cells["minimum"], &cells["maximum"]), (&json!(1), &json!(MOST_CELLS)));
    }
}
