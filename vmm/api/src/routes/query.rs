//! Refuses unknown query parameters. An ignored parameter would look as if it had an effect.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{MatchedPath, Query, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use utoipa::openapi::RefOr;
use utoipa::openapi::path::{Operation, ParameterIn, PathItem};

use crate::problem::Refusal;
use samepage_api_types::problem::Kind;

/// The parameters that each operation knows, from the description of the API.
pub(super) struct Known(HashMap<(String, Method), Vec<String>>);

impl Known {
    pub(super) fn of(openapi: &utoipa::openapi::OpenApi) -> Self {
        let mut known = HashMap::new();
        for (path, item) in &openapi.paths.paths {
            for (method, operation) in operations(item) {
                known.insert((path.clone(), method), names(operation));
            }
        }
        Self(known)
    }

    /// Returns the parameters of an operation; none if the operation is not described.
    fn of_operation(&self, path: &str, method: &Method) -> &[String] {
        let method = if *method == Method::HEAD { &Method::GET } else { method };
        self.0.get(&(path.to_owned(), method.clone())).map_or(&[], Vec::as_slice)
    }
}

fn operations(item: &PathItem) -> impl Iterator<Item = (Method, &Operation)> {
    let all = [
        (Method::GET, &item.get),
        (Method::PUT, &item.put),
        (Method::POST, &item.post),
        (Method::DELETE, &item.delete),
        (Method::PATCH, &item.patch),
    ];
    all.into_iter().filter_map(|(method, operation)| Some((method, operation.as_ref()?)))
}

fn names(operation: &Operation) -> Vec<String> {
    let parameters = operation.parameters.iter().flatten().filter_map(|parameter| match parameter {
        RefOr::T(parameter) => Some(parameter),
        // No operation shares its parameters with others.
        RefOr::Ref(_) => None,
    });
    let of_query = parameters.filter(|parameter| parameter.parameter_in == ParameterIn::Query);
    of_query.map(|parameter| parameter.name.clone()).collect()
}

/// Passes on requests with known parameters.
pub(super) async fn check(State(known): State<Arc<Known>>, request: Request, next: Next) -> Response {
    match unknown(&known, &request) {
        Some(problem) => problem.into_response(),
        None => next.run(request).await,
    }
}

fn unknown(known: &Known, request: &Request) -> Option<Refusal> {
    let path = request.extensions().get::<MatchedPath>()?.as_str();
    let known = known.of_operation(path, request.method());
    // The extractor of the parameters reports an unreadable query.
    let Query(given) = Query::<Vec<(String, String)>>::try_from_uri(request.uri()).ok()?;
    let (unknown, _) = given.iter().find(|(name, _)| !known.contains(name))?;
    let detail = format!("the query has the unknown parameter {unknown:?}");
    let help = match known {
        [] => "remove it: there are no parameters here".to_owned(),
        [one] => format!("remove it, or use {one}"),
        [rest @ .., last] => {
            format!("remove it, or use {} and {last}", rest.join(", "))
        }
    };
    Some(Refusal::new(Kind::BadRequest, detail).help(help))
}
