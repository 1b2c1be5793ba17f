//! Refuses parameters of queries that a resource does not know: one that is ignored looks like one that
//! was heeded.

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

/// The parameters that each operation knows, as the description of the API has them.
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

    /// The parameters of an operation; none where it is not described, as the description itself is not.
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

/// Lets requests through whose parameters are known.
pub(super) async fn check(State(known): State<Arc<Known>>, request: Request, next: Next) -> Response {
    match unknown(&known, &request) {
        Some(problem) => problem.into_response(),
        None => next.run(request).await,
    }
}

fn unknown(known: &Known, request: &Request) -> Option<Refusal> {
    let path = request.extensions().get::<MatchedPath>()?.as_str();
    let known = known.of_operation(path, request.method());
    // What cannot be read at all is told by who reads it.
    let Query(given) = Query::<Vec<(String, String)>>::try_from_uri(request.uri()).ok()?;
    let (unknown, _) = given.iter().find(|(name, _)| !known.contains(name))?;
    let detail = format!("the query has a parameter {unknown:?}, which is not known here");
    let help = match known {
        [] => "leave it out: no parameters are known here".to_owned(),
        [one] => format!("leave it out, or use the one that is known: {one}"),
        [rest @ .., last] => {
            format!("leave it out, or use those that are known: {} and {last}", rest.join(", "))
        }
    };
    Some(Refusal::new(Kind::BadRequest, detail).help(help))
}
