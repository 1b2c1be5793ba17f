//! `/events` and `/metrics`.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, VARY};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;
use tokio::sync::watch;
use utoipa::IntoParams;

use super::sharing::sampling_failed;
use crate::extract::Parameters;
use crate::metrics;
use crate::negotiate::TextFormat;
use crate::problem::Refusal;
use crate::server::{Api, is_ending};
use samepage_api_types::events::Event;
use samepage_api_types::problem::Kind;

/// Longest time between two messages to a client that listens to events.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The first event.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Since {
    /// Return the events after this number; the last 1024 are kept. By default only new events are returned. The
    /// header `Last-Event-ID` has the same meaning.
    since: Option<u64>,
}

/// Listen to events
///
/// Returns server-sent events: states of VMs, crashes, disk errors, limits that were reached. The data of each is
/// an `Event` in JSON.
#[utoipa::path(
    get, path = "/events", operation_id = "listen_to_events", tag = "process", params(Since),
    responses((status = 200, description = "Events as they happen", content_type = "text/event-stream", body = String))
)]
pub(super) async fn events(
    State(api): State<Arc<Api>>,
    Parameters(Since { since }): Parameters<Since>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let last = match headers.get("last-event-id") {
        None => None,
        Some(id) => Some(id.to_str().ok().and_then(|id| id.parse().ok()).ok_or_else(|| {
            Refusal::new(Kind::BadRequest, "the header Last-Event-ID is not the number of an event")
        })?),
    };
    let newest = api.registry.events.last();
    let after = last.or(since).unwrap_or(newest).min(newest);
    let reader = Reader { ending: api.ending.clone(), api, after, ready: VecDeque::new(), begun: false };
    let events = stream::unfold(reader, |mut reader| async {
        let text = reader.next().await?;
        Some((io::Result::Ok(Bytes::from(text)), reader))
    });
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-cache")];
    Ok((headers, Body::from_stream(events)).into_response())
}

/// Follows events.
struct Reader {
    api: Arc<Api>,
    after: u64,
    ready: VecDeque<Arc<Event>>,
    begun: bool,
    ending: watch::Receiver<bool>,
}

impl Reader {
    /// Returns the next message, or `None` at the end.
    async fn next(&mut self) -> Option<String> {
        if !std::mem::replace(&mut self.begun, true) {
            // After this message, the client receives all events.
            return Some(": listening\n\n".to_owned());
        }
        if self.ready.is_empty() {
            tokio::select! {
                // Deliver events before the end.
                biased;
                new = self.api.registry.events.after(self.after) => self.ready.extend(new),
                () = tokio::time::sleep(KEEP_ALIVE) => return Some(": nothing new\n\n".to_owned()),
                () = is_ending(&mut self.ending) => return None,
            }
        }
        let event = self.ready.pop_front()?;
        self.after = event.id;
        let data = serde_json::to_string(&*event).unwrap_or_default();
        Some(format!("id: {}\nevent: {}\ndata: {data}\n\n", event.id, event.what.name()))
    }
}

/// Read metrics
///
/// Counters and gauges in the text format of OpenMetrics, which Prometheus reads; in Prometheus' own text format
/// for clients that prefer `text/plain` in the header `Accept`.
#[utoipa::path(
    get, path = "/metrics", operation_id = "get_metrics", tag = "process",
    responses((
        status = 200, description = "Metrics",
        content((String = "application/openmetrics-text"), (String = "text/plain"))
    ))
)]
pub(super) async fn metrics(State(api): State<Arc<Api>>, headers: HeaderMap) -> Result<Response, Refusal> {
    let revision = api.registry.revision();
    let seen = api.sampling.current(&api.registry).await.map_err(sampling_failed)?;
    let text = api.caches.metrics.get(Some(&seen), revision, || {
        let text = metrics::text(api.registry.list(), seen.clone()).map(Bytes::from);
        text.map_err(|error| Refusal::new(Kind::Internal, format!("write metrics: {error}")))
    })?;
    let format = TextFormat::preferred(&headers);
    let headers = [(CONTENT_TYPE, format.media_type()), (VARY, "accept")];
    Ok(match format {
        TextFormat::OpenMetrics => (headers, text).into_response(),
        TextFormat::Prometheus => {
            (headers, metrics::for_prometheus(&String::from_utf8_lossy(&text))).into_response()
        }
    })
}
