//! Problems as responses. Each gets its body when the whole response is known.

use std::ops::Deref;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use samepage_api_types::problem::{Kind, PROBLEM_JSON, Problem};

/// A refused request, and the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal(Problem);

impl Refusal {
    /// Returns a problem of this kind.
    pub(crate) fn new(kind: Kind, detail: impl Into<Box<str>>) -> Self {
        Self(Problem::new(kind, detail))
    }

    /// Adds advice.
    pub(crate) fn help(self, help: impl Into<Box<str>>) -> Self {
        Self(self.0.help(help))
    }

    /// Adds the place of the cause in the body.
    pub(crate) fn at(self, pointer: impl Into<Box<str>>) -> Self {
        Self(self.0.at(pointer))
    }

    fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl Deref for Refusal {
    type Target = Problem;

    fn deref(&self) -> &Problem {
        &self.0
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Body::empty()).into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// Gives each problem its body and the path of the request. Errors of the HTTP library become problems too.
pub(super) async fn write_problems(request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    let mut response = next.run(request).await;
    let status = response.status();
    let mut problem = match response.extensions_mut().remove::<Refusal>() {
        Some(problem) => problem,
        None if status == StatusCode::METHOD_NOT_ALLOWED => {
            let help = "the header Allow and GET /openapi.json list the methods";
            Refusal::new(Kind::MethodNotAllowed, format!("{path} has no {method}")).help(help)
        }
        None if status.is_client_error() => {
            Refusal::new(Kind::BadRequest, status.canonical_reason().unwrap_or("refused").to_lowercase())
        }
        None => return response,
    };
    problem.0.instance = Some(path.into());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
    if problem.is(Kind::Unavailable) {
        headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    headers.remove(CONTENT_LENGTH);
    *response.status_mut() = problem.status();
    *response.body_mut() = Body::from(problem.to_json());
    response
}

/// Responds to a path without a resource.
pub(super) async fn no_such_resource(request: Request) -> Refusal {
    Refusal::new(Kind::NoSuchResource, format!("there is nothing at {}", request.uri().path()))
        .help("GET /openapi.json lists the resources")
}
