//! `/vms/{vm}/console`: reads, follows and types to consoles.

#![expect(unsafe_code, reason = "has the runtime watch an event of its own")]

use std::io;
use std::os::fd::AsRawFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Extension, Request, State};
use axum::http::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest, ReadHalf, WriteHalf};
use tokio::sync::watch;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, Schema, SchemaFormat, Type};
use utoipa::{IntoParams, PartialSchema, ToSchema};
use vmm_sys_util::eventfd::EventFd;

use super::vms::remove;
use crate::extract::{Parameters, Vm, read_body};
use crate::problem::Refusal;
use crate::server::{Api, Permit, is_ending};
use samepage_api_types::CONSOLE_PROTOCOL as PROTOCOL;
use samepage_api_types::lifecycle::State as VmState;
use samepage_api_types::problem::Kind;
use samepage_host::backlog::Piece;
use samepage_host::record::Record;
use samepage_text::counted::counted;

const OCTETS: &str = "application/octet-stream";

/// Raw bytes. Generators of clients recognise them by their format.
struct Octets;

impl PartialSchema for Octets {
    fn schema() -> RefOr<Schema> {
        let format = SchemaFormat::KnownFormat(KnownFormat::Binary);
        ObjectBuilder::new().schema_type(Type::String).format(Some(format)).into()
    }
}

impl ToSchema for Octets {}

/// The length of a console's tail.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Tail {
    /// Upper limit for earlier output, in bytes. By default all that is kept: 64 KiB.
    tail: Option<usize>,
}

/// How to follow a console.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Along {
    /// Upper limit for earlier output, in bytes. By default all that is kept: 64 KiB.
    tail: Option<usize>,
    /// Whether the VM is bound to this connection: the VM is deleted when the client disconnects, and the
    /// connection ends when the VM ends. For upgraded connections.
    lifeline: Option<bool>,
    /// Whether the stream ends when the VM ends for another reason than a reset. By default the stream ends when
    /// the VM is deleted.
    until_end: Option<bool>,
}

/// Read the end of a console
///
/// Returns the last 64 KiB that the guest wrote, also if the VM has ended.
#[utoipa::path(
    get, path = "/vms/{vm}/console", operation_id = "read_console", tag = "console",
    params(("vm" = String, Path, description = "The VM's name"), Tail),
    responses((status = 200, description = "Bytes as the guest wrote them", content_type = OCTETS, body = Octets))
)]
pub(super) async fn backlog(Vm(record): Vm, Parameters(Tail { tail }): Parameters<Tail>) -> Response {
    let piece = record.backlog.tail(tail.unwrap_or(usize::MAX));
    ([(CONTENT_TYPE, OCTETS)], piece.bytes).into_response()
}

/// Follow a console
///
/// Returns the output that is kept, and then further output until the VM is deleted. A slow reader loses
/// bytes, and the text says how many; the guest does not wait. With `until_end=true` the stream ends with the
/// VM's machine. With the headers `Connection: upgrade` and `Upgrade: samepage-console`, the server responds with
/// 101 and the connection becomes the console: bytes from the client are typed.
#[utoipa::path(
    get, path = "/vms/{vm}/console/stream", operation_id = "stream_console", tag = "console",
    params(("vm" = String, Path, description = "The VM's name"), Along),
    responses(
        (status = 200, description = "Bytes as the guest writes them", content_type = OCTETS, body = Octets),
        (status = 101, description = "The connection is the console")
    )
)]
pub(super) async fn stream(
    State(api): State<Arc<Api>>,
    Vm(record): Vm,
    Parameters(Along { tail, lifeline, until_end }): Parameters<Along>,
    Extension(permit): Extension<Permit>,
    mut request: Request,
) -> Result<Response, Refusal> {
    let tail = record.backlog.tail(tail.unwrap_or(usize::MAX));
    // At the start nothing is lost: the client does not ask for earlier output.
    let from = tail.next - tail.bytes.len() as u64;
    let lifeline = lifeline.unwrap_or(false);
    let until = match (lifeline, until_end) {
        (true, _) => Until::Collected,
        (false, Some(true)) => Until::Ended,
        (false, _) => Until::Deleted,
    };
    let reader = Reader { record, from, until, ending: api.ending.clone() };
    if !asks_for_upgrade(request.headers()) {
        if lifeline {
            let detail = "only an upgraded connection can be a lifeline";
            let help = format!("send Connection: upgrade and Upgrade: {PROTOCOL}");
            return Err(Refusal::new(Kind::BadRequest, detail).help(help));
        }
        let pieces = stream::unfold(reader, |mut reader| async {
            let bytes = reader.next().await?;
            Some((io::Result::Ok(Bytes::from(bytes)), reader))
        });
        return Ok(([(CONTENT_TYPE, OCTETS)], Body::from_stream(pieces)).into_response());
    }
    let Some(upgrade) = request.extensions_mut().remove::<OnUpgrade>() else {
        return Err(Refusal::new(Kind::BadRequest, "this connection cannot be upgraded"));
    };
    let room = reader.record.room().and_then(watch_room);
    let room = room.map_err(|error| {
        Refusal::new(Kind::Unavailable, format!("open the console: {error}"))
            .help("raise the limit of open files (ulimit -n)")
    })?;
    tokio::spawn(async move {
        // The connection counts until the client leaves the console.
        let _permit = permit;
        if let Ok(upgraded) = upgrade.await {
            let (record, ending) = (reader.record.clone(), api.ending.clone());
            attach(upgraded, reader, room, lifeline.then_some(ending)).await;
            if lifeline {
                let_go(&api, &record).await;
            }
        } else if lifeline {
            let_go(&api, &reader.record).await;
        }
    });
    let headers = [(CONNECTION, "upgrade"), (UPGRADE, PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

fn asks_for_upgrade(headers: &HeaderMap) -> bool {
    headers.get(UPGRADE).is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(PROTOCOL.as_bytes()))
}

/// The end of a console stream.
enum Until {
    /// Ends when the VM is deleted.
    Deleted,
    /// Ends when the VM's machine has ended, whatever comes next.
    Collected,
    /// Ends when the VM's machine has ended for good, or when a client starts the VM.
    Ended,
}

/// Follows a console.
struct Reader {
    record: Arc<Record>,
    from: u64,
    until: Until,
    ending: watch::Receiver<bool>,
}

impl Reader {
    /// Returns the next output, or `None` at the end.
    async fn next(&mut self) -> Option<Vec<u8>> {
        let piece = tokio::select! {
            // Deliver the output before the end.
            biased;
            piece = self.record.backlog.read(self.from) => piece?,
            () = has_ended(&self.record, &self.until) => return None,
            () = is_ending(&mut self.ending) => return None,
        };
        let Piece { lost, bytes, next } = piece;
        self.from = next;
        if lost == 0 {
            return Some(bytes);
        }
        let bytes_lost = counted(lost, "byte");
        let notice = format!("\r\n[samepage: {bytes_lost} missing here: not read in time]\r\n");
        Some([notice.into_bytes(), bytes].concat())
    }
}

/// Waits for the end of the stream.
async fn has_ended(record: &Record, until: &Until) {
    match until {
        Until::Deleted => std::future::pending().await,
        Until::Collected => record.collected().await,
        Until::Ended => record.ended().await,
    }
}

/// An event that is readable when the console accepts more input.
struct Room(EventFd);

fn watch_room(room: EventFd) -> io::Result<AsyncFd<Room>> {
    // SAFETY: the file is open and belongs to the value that is moved in. It is neither closed nor replaced
    // before that value is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(Room(room), Interest::READABLE) }?)
}

impl AsRawFd for Room {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// The time for which a VM that has ended stays, so that its lifeline's client can ask for the reason.
const LAST_QUESTIONS: Duration = Duration::from_secs(10);

/// Passes bytes on in both directions until either side ends. If the connection is a lifeline, only the
/// client or the end of the server ends it.
async fn attach(
    upgraded: Upgraded,
    reader: Reader,
    room: AsyncFd<Room>,
    lifeline: Option<watch::Receiver<bool>>,
) {
    let record = reader.record.clone();
    let (from_client, to_client) = tokio::io::split(TokioIo::new(upgraded));
    let mut take = pin!(take(record, from_client, room));
    tokio::select! {
        () = show(reader, to_client) => {}
        () = &mut take => return,
    }
    if let Some(mut ending) = lifeline {
        tokio::select! {
            () = take => {}
            () = tokio::time::sleep(LAST_QUESTIONS) => {}
            () = is_ending(&mut ending) => {}
        }
    }
}

/// Deletes a VM whose lifeline has ended. When the server ends, other code ends the VMs.
async fn let_go(api: &Api, record: &Arc<Record>) {
    let mut ending = api.ending.clone();
    loop {
        let removed = tokio::select! {
            removed = remove(api, record) => removed,
            () = is_ending(&mut ending) => return,
        };
        match removed {
            // Another operation took long.
            Err(problem) if problem.is(Kind::Busy) => {}
            _ => return,
        }
    }
}

async fn show(mut reader: Reader, mut client: WriteHalf<TokioIo<Upgraded>>) {
    while let Some(bytes) = reader.next().await {
        if client.write_all(&bytes).await.is_err() {
            return;
        }
    }
    let _ = client.shutdown().await;
}

async fn take(record: Arc<Record>, mut client: ReadHalf<TokioIo<Upgraded>>, room: AsyncFd<Room>) {
    let mut buffer = [0; 256];
    loop {
        let Ok(count @ 1..) = client.read(&mut buffer).await else { return };
        let mut typed = buffer[..count].to_vec();
        // Input to a VM that does not run is dropped, like typing at a machine that is off.
        while let Some(rest) = type_to(&record, typed).await.filter(|rest| !rest.is_empty()) {
            typed = rest;
            match room.readable().await {
                Ok(mut ready) => ready.clear_ready(),
                Err(_) => return,
            }
        }
    }
}

/// Types, and returns the bytes that were not accepted. Returns `None` if there is no machine.
async fn type_to(record: &Arc<Record>, mut typed: Vec<u8>) -> Option<Vec<u8>> {
    let record = record.clone();
    // The console is locked while a guest's output waits for a slow reader of its file.
    let work = move || {
        let taken = record.vm().filter(|vm| vm.end().is_none())?.serial_input(&typed);
        typed.drain(..taken);
        Some(typed)
    };
    tokio::task::spawn_blocking(work).await.ok().flatten()
}

/// The result of typing.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Typed {
    /// Number of bytes that the console accepted, from the start of the body. The console accepts more when the
    /// guest has read them.
    pub taken: usize,
}

/// Type to a console
///
/// Types as many bytes of the body as the console accepts.
#[utoipa::path(
    post, path = "/vms/{vm}/console/input", operation_id = "type_to_console", tag = "console",
    params(("vm" = String, Path, description = "The VM's name")),
    request_body(content_type = OCTETS, content = Octets), responses((status = 200, body = Typed))
)]
pub(super) async fn input(Vm(record): Vm, request: Request) -> Result<Json<Typed>, Refusal> {
    let bytes = read_body(request.into_body()).await?;
    let count = bytes.len();
    match type_to(&record, bytes.into()).await {
        Some(rest) => Ok(Json(Typed { taken: count - rest.len() })),
        None => {
            let state: VmState = record.state();
            let detail = format!("VM {} is {}, so nothing reads its console", record.name(), state.name());
            Err(Refusal::new(Kind::IllegalTransition, detail).help("start the VM first"))
        }
    }
}
