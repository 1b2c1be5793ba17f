//! The resources, and the description of them.

mod console;
mod host;
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
use utoipa::openapi::{PathItem, Ref, RefOr};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::events::Event;
use super::http::{self, Guard};
use super::problem::{self, PROBLEM_JSON, Problem};
use super::server::Api;

/// What all paths have in common.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "samepage",
        description = "The control socket of samepage: VMs of one process, and the memory that they share. \
                       Errors are problem details (RFC 9457).",
        license(name = "Apache-2.0 OR BSD-3-Clause", identifier = "Apache-2.0 OR BSD-3-Clause")
    ),
    tags(
        (name = "vms", description = "Virtual machines"),
        (name = "console", description = "Their serial consoles"),
        (name = "sharing", description = "The memory that they share"),
        (name = "process", description = "The process and its host")
    ),
    components(schemas(Problem, Event))
)]
struct Description;

fn described() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(vms::list, vms::create))
        .routes(routes!(vms::show, vms::delete))
        .routes(routes!(vms::act, vms::put_action))
        .routes(routes!(vms::disks))
        .routes(routes!(vms::resize_disk))
        .routes(routes!(vms::disk, vms::change_disk))
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
        .routes(routes!(watch::events))
        .routes(routes!(watch::metrics))
}

/// The description of the API, as OpenAPI 3.1 has it.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    describe(described()).1
}

fn describe(router: OpenApiRouter<Arc<Api>>) -> (Router<Arc<Api>>, utoipa::openapi::OpenApi) {
    let (router, mut openapi) = router.split_for_parts();
    openapi.paths.paths.values_mut().flat_map(operations).for_each(add_problem);
    (router, openapi)
}

fn operations(path: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut path.get, &mut path.put, &mut path.post, &mut path.delete, &mut path.patch].into_iter().flatten()
}

/// Whatever is not as it should be is a problem.
fn add_problem(operation: &mut Operation) {
    let schema = RefOr::Ref(Ref::from_schema_name("Problem"));
    let content = ContentBuilder::new().schema(Some(schema)).build();
    let response =
        ResponseBuilder::new().description("What went wrong, and what to do").content(PROBLEM_JSON, content);
    operation.responses.responses.insert("default".into(), RefOr::T(response.build()));
}

/// The routes, for clients of the Unix socket, and behind a guard for those of a port.
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
    use super::*;

    #[test]
    fn the_description_is_openapi_3_1_and_names_every_resource() {
        let json: serde_json::Value = serde_json::from_str(&openapi().to_json().unwrap()).unwrap();
        assert!(json["openapi"].as_str().unwrap().starts_with("3.1"));
        let docs = include_str!("../../../../docs/api.md");
        for (path, item) in json["paths"].as_object().unwrap() {
            assert!(docs.contains(&format!("`{path}`")), "docs/api.md does not mention {path}");
            for (method, operation) in item.as_object().unwrap() {
                assert!(operation["responses"]["default"].is_object(), "{method} {path}");
                assert!(operation["summary"].is_string(), "{method} {path}");
            }
        }
    }
}
