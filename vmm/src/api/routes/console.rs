//! `/vms/{vm}/console`: what guests wrote, what they write, and what is typed to them.

#![expect(unsafe_code, reason = "has the runtime watch an event of its own")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

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
use utoipa::{IntoParams, ToSchema};
use vmm_sys_util::eventfd::EventFd;

use crate::api::CONSOLE_PROTOCOL as PROTOCOL;
use crate::api::backlog::Piece;
use crate::api::extract::{Parameters, Vm, read_body};
use crate::api::lifecycle::State as VmState;
use crate::api::problem::{Kind, Problem};
use crate::api::record::Record;
use crate::api::server::{Api, Permit, is_ending};

const OCTETS: &str = "application/octet-stream";

/// How much of the backlog.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Tail {
    /// At most so many bytes of what the guest wrote before; all that is kept (64 KiB) where not given.
    tail: Option<usize>,
}

/// Read the end of a console
///
/// The last 64 KiB that the guest wrote, also of VMs that have ended.
#[utoipa::path(
    get, path = "/vms/{vm}/console", tag = "console",
    params(("vm" = String, Path, description = "The VM's name"), Tail),
    responses((status = 200, description = "Bytes as the guest wrote them", content_type = OCTETS, body = String))
)]
pub(super) async fn backlog(Vm(record): Vm, Parameters(Tail { tail }): Parameters<Tail>) -> Response {
    let piece = record.backlog.tail(tail.unwrap_or(usize::MAX));
    ([(CONTENT_TYPE, OCTETS)], piece.bytes).into_response()
}

/// Read along with a console
///
/// What is kept of what the guest wrote, and then what it writes, until the VM is deleted. Readers who are
/// slow lose bytes and are told so in the text; they do not hold the guest up. With the headers
/// `Connection: upgrade` and `Upgrade: samepage-console` the connection becomes the console after a
/// response of 101: bytes that are sent are typed.
#[utoipa::path(
    get, path = "/vms/{vm}/console/stream", tag = "console",
    params(("vm" = String, Path, description = "The VM's name"), Tail),
    responses(
        (status = 200, description = "Bytes as the guest writes them", content_type = OCTETS, body = String),
        (status = 101, description = "The connection is the console")
    )
)]
pub(super) async fn stream(
    State(api): State<Arc<Api>>,
    Vm(record): Vm,
    Parameters(Tail { tail }): Parameters<Tail>,
    Extension(permit): Extension<Permit>,
    mut request: Request,
) -> Result<Response, Problem> {
    let tail = record.backlog.tail(tail.unwrap_or(usize::MAX));
    // To begin with nothing is lost: what was before is not asked for.
    let from = tail.next - tail.bytes.len() as u64;
    let reader = Reader { record, from, ending: api.ending.clone() };
    if !asks_for_upgrade(request.headers()) {
        let pieces = stream::unfold(reader, |mut reader| async {
            let bytes = reader.next().await?;
            Some((io::Result::Ok(Bytes::from(bytes)), reader))
        });
        return Ok(([(CONTENT_TYPE, OCTETS)], Body::from_stream(pieces)).into_response());
    }
    let Some(upgrade) = request.extensions_mut().remove::<OnUpgrade>() else {
        return Err(Problem::new(Kind::BadRequest, "this connection cannot be upgraded"));
    };
    let room = reader.record.room().and_then(watch_room);
    let room = room.map_err(|error| {
        Problem::new(Kind::Unavailable, format!("open the console: {error}"))
            .help("raise the limit of open files (ulimit -n)")
    })?;
    tokio::spawn(async move {
        // The connection counts until the console is left.
        let _permit = permit;
        if let Ok(upgraded) = upgrade.await {
            attach(upgraded, reader, room).await;
        }
    });
    let headers = [(CONNECTION, "upgrade"), (UPGRADE, PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

fn asks_for_upgrade(headers: &HeaderMap) -> bool {
    headers.get(UPGRADE).is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(PROTOCOL.as_bytes()))
}

/// Reads along.
struct Reader {
    record: Arc<Record>,
    from: u64,
    ending: watch::Receiver<bool>,
}

impl Reader {
    /// What comes next; `None` at the end.
    async fn next(&mut self) -> Option<Vec<u8>> {
        let piece = tokio::select! {
            // What there is comes before the end.
            biased;
            piece = self.record.backlog.read(self.from) => piece?,
            () = is_ending(&mut self.ending) => return None,
        };
        let Piece { lost, bytes, next } = piece;
        self.from = next;
        if lost == 0 {
            return Some(bytes);
        }
        let notice = format!("\r\n[samepage: {lost} bytes are missing here: they were not read in time]\r\n");
        Some([notice.into_bytes(), bytes].concat())
    }
}

/// Is readable when the console takes more.
struct Room(EventFd);

fn watch_room(room: EventFd) -> io::Result<AsyncFd<Room>> {
    // SAFETY: the file is open, belongs to the value that is moved in, and is neither closed nor replaced
    // before that is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(Room(room), Interest::READABLE) }?)
}

impl AsRawFd for Room {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Passes bytes on both ways until either side has enough.
async fn attach(upgraded: Upgraded, reader: Reader, room: AsyncFd<Room>) {
    let record = reader.record.clone();
    let (from_client, to_client) = tokio::io::split(TokioIo::new(upgraded));
    tokio::select! {
        () = show(reader, to_client) => {}
        () = take(record, from_client, room) => {}
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
        // What is typed to a VM that does not run goes nowhere, as at a machine that is off.
        while let Some(rest) = type_to(&record, typed).await.filter(|rest| !rest.is_empty()) {
            typed = rest;
            match room.readable().await {
                Ok(mut ready) => ready.clear_ready(),
                Err(_) => return,
            }
        }
    }
}

/// Types, and returns what was not taken; `None` where there is no machine.
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

/// What became of what was typed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Typed {
    /// Bytes that were taken, from the front. The console takes a few until the guest reads them.
    pub taken: usize,
}

/// Type to a console
///
/// As many bytes of the body as the console takes.
#[utoipa::path(
    post, path = "/vms/{vm}/console/input", tag = "console",
    params(("vm" = String, Path, description = "The VM's name")),
    request_body(content_type = OCTETS, content = String), responses((status = 200, body = Typed))
)]
pub(super) async fn input(Vm(record): Vm, request: Request) -> Result<Json<Typed>, Problem> {
    let bytes = read_body(request.into_body()).await?;
    let count = bytes.len();
    match type_to(&record, bytes.into()).await {
        Some(rest) => Ok(Json(Typed { taken: count - rest.len() })),
        None => {
            let state: VmState = record.state();
            let detail = format!("VM {} is {}, and nobody reads its console", record.name(), state.name());
            Err(Problem::new(Kind::IllegalTransition, detail).help("start it first"))
        }
    }
}
