//! Extractors for the parts of requests. Each has its own problems for invalid parts.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::problem::Refusal;
use crate::server::Api;
use samepage_api_types::problem::Kind;
use samepage_host::error::HostError;
use samepage_host::record::Record;

/// Longest body of a request, in bytes.
pub const MAX_BODY: usize = 1 << 20;
/// Time limit for receiving a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Returns the whole body.
pub(super) async fn read_body(body: Body) -> Result<Bytes, Refusal> {
    let whole = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await;
    let seconds = BODY_TIMEOUT.as_secs();
    let collected = whole.map_err(|_| {
        Refusal::new(Kind::Timeout, format!("the body did not arrive within {seconds} seconds"))
            .help("send the whole body without pauses")
    })?;
    match collected {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(Refusal::new(Kind::TooLarge, format!("the body has more than {MAX_BODY} bytes")))
        }
        Err(error) => Err(Refusal::new(Kind::BadRequest, format!("the body cannot be read: {error}"))),
    }
}

/// A body of JSON.
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        let media = request.headers().get(CONTENT_TYPE).map(|value| value.to_str().unwrap_or("").to_owned());
        if let Some(media) = media
            && media.split(';').next().map(str::trim) != Some("application/json")
        {
            return Err(Refusal::new(
                Kind::UnsupportedMediaType,
                format!("the body's media type is {media:?}"),
            )
            .help("send JSON, and say so: Content-Type: application/json"));
        }
        parse(&read_body(request.into_body()).await?).map(Self)
    }
}

/// Parses JSON as a value of this type.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refusal> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let pointer = pointer(error.path());
        Refusal::new(Kind::BadRequest, format!("the body is invalid: {}", error.inner()))
            .at(pointer)
            .help("GET /openapi.json describes valid bodies")
    })?;
    json.end().map_err(|error| Refusal::new(Kind::BadRequest, format!("after the body: {error}")))?;
    Ok(value)
}

/// Returns a JSON pointer (RFC 6901).
fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    path.iter()
        .map(|segment| match segment {
            Segment::Seq { index } => format!("/{index}"),
            Segment::Map { key } => format!("/{}", key.replace('~', "~0").replace('/', "~1")),
            Segment::Enum { .. } | Segment::Unknown => String::new(),
        })
        .collect()
}

/// Parameters of the query.
pub(super) struct Parameters<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Parameters<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        let query = Query::try_from_uri(&parts.uri);
        query.map(|Query(value)| Self(value)).map_err(|error| {
            Refusal::new(Kind::BadRequest, format!("the query is invalid: {}", error.body_text()))
        })
    }
}

/// Returns the names in the path.
async fn names<T: DeserializeOwned + Send>(parts: &mut Parts) -> Result<T, Refusal> {
    let names = Path::<T>::from_request_parts(parts, &()).await;
    names.map(|Path(names)| names).map_err(|error| {
        Refusal::new(Kind::BadRequest, format!("the path is invalid: {}", error.body_text()))
    })
}

/// The VM in the path.
pub(super) struct Vm(pub(super) Arc<Record>);

impl FromRequestParts<Arc<Api>> for Vm {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Refusal> {
        let name: String = names(parts).await?;
        Ok(Self(api.registry.find(&name)?))
    }
}

/// The VM and the disk's name in the path.
pub(super) struct VmAndDisk(pub(super) Arc<Record>, pub(super) String);

impl FromRequestParts<Arc<Api>> for VmAndDisk {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Refusal> {
        let (name, disk): (String, String) = names(parts).await?;
        Ok(Self(api.registry.find(&name)?, disk))
    }
}

/// Returns a value as JSON.
pub(super) fn to_json(value: &impl Serialize) -> Result<Bytes, Refusal> {
    let written = serde_json::to_vec(value).map(Bytes::from);
    written.map_err(|error| Refusal::new(Kind::Internal, format!("write the response: {error}")))
}

/// Returns a response of JSON.
pub(super) fn json(bytes: Bytes) -> Response {
    ([(CONTENT_TYPE, "application/json")], bytes).into_response()
}

/// Runs slow work on its own thread. The work completes even if the client disconnects.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Refusal::from),
        Err(_) => Err(Refusal::new(Kind::Internal, "the operation panicked")
            .help("the VM may be in any state; report what led to this")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use samepage_spec::VmSpec;

    #[test]
    fn a_wrong_body_is_pointed_at() {
        let wrong = |json: &str| parse::<VmSpec>(json.as_bytes()).unwrap_err();
        let problem = wrong(r#"{"name":"a","kernel":"k","disks":[{"path":"a"},{"path":7}]}"#);
        assert_eq!(problem.pointer.as_deref(), Some("/disks/1/path"));
        assert!(problem.detail.contains("invalid type: integer `7`"), "{}", *problem);
        assert_eq!(wrong(r#"{"name":"a","kernel":"k"} x"#).status, 400);
        assert_eq!(wrong("").status, 400);
        assert_eq!(wrong(&"[".repeat(100_000)).status, 400);
    }
}
