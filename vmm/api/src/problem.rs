//! Problems as responses: each gets its body once the whole answer is known.

use std::ops::Deref;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use samepage_api_types::problem::{Kind, PROBLEM_JSON, Problem};

/// A request that is refused, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal(Problem);

impl Refusal {
    /// A problem of this kind.
    pub(crate) fn new(kind: Kind, detail: impl Into<Box<str>>) -> Self {
        Self(Problem::new(kind, detail))
    }

    /// Says what to do about it.
    pub(crate) fn help(self, help: impl Into<Box<str>>) -> Self {
        Self(self.0.help(help))
    }

    /// Says where in the body the cause is.
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

/// Gives each problem its body and says which path it is about. What the HTTP library refuses by itself
/// becomes a problem as well.
pub(super) async fn write_problems(request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    let mut response = next.run(request).await;
    let status = response.status();
    let mut problem = match response.extensions_mut().remove::<Refusal>() {
        Some(problem) => problem,
        None if status == StatusCode::METHOD_NOT_ALLOWED => {
            let help = "GET /openapi.json says what it has, as does the header Allow";
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

/// A path without a resource.
pub(super) async fn no_such_resource(request: Request) -> Refusal {
    Refusal::new(Kind::NoSuchResource, format!("there is nothing at {}", request.uri().path()))
        .help("GET /openapi.json lists what there is")
}
