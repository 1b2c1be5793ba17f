//! The API over HTTP, on a Unix socket and a thread of its own.
//!
//! As in Firecracker, requests are answered in order, and a connection stays until its client closes it. The
//! number of connections and the size of requests are limited.

use std::convert::Infallible;
use std::os::unix::net::UnixListener as StdListener;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue, SERVER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use samepage_api::listener::{self, Socket, SocketOptions};
use samepage_api::server::ServerError;
use samepage_api::write_timeout::with_write_timeout;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

use super::Shared;
use super::fault::Fault;
use super::http10::AsHttp11;
use super::log::Log;
use super::requests::{self, Answer};

/// Limit for simultaneous connections.
const MAX_CONNECTIONS: usize = 16;
/// Time limit for receiving a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for pending requests when the process ends.
const GRACE: Duration = Duration::from_secs(2);
/// Pause when the process is out of files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A running server. Dropping it ends the server and removes its socket.
pub(super) struct Server {
    end: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    _socket: Socket,
}

/// The state for responding to requests.
#[derive(Clone)]
struct Api {
    controller: Shared,
    log: Arc<Log>,
    max_body: usize,
}

impl Server {
    /// Opens the socket, which only the process's user may use.
    ///
    /// # Errors
    /// Fails if the socket cannot be opened, or if the process is out of files or threads.
    pub(super) fn start(
        path: &Path,
        max_body: usize,
        controller: Shared,
        log: Arc<Log>,
    ) -> Result<Self, ServerError> {
        let (end, ending) = watch::channel(false);
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().thread_name("api-work").build()?;
        let (listener, socket) =
            listener::open(&SocketOptions { path: path.to_owned(), mode: 0o600, group: None })?;
        log.info(format_args!("the API is at {}", path.display()));
        let api = Api { controller, log, max_body };
        let serve = move || {
            runtime.block_on(serve(listener, api, ending));
            runtime.shutdown_timeout(GRACE);
        };
        let thread = thread::Builder::new().name("api".into()).spawn(serve)?;
        Ok(Self { end, thread: Some(thread), _socket: socket })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // The panic has already been reported.
            let _ = thread.join();
        }
    }
}

async fn serve(listener: StdListener, api: Api, ending: watch::Receiver<bool>) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut over = ending.clone();
    tokio::select! {
        () = is_ending(&mut over) => {}
        () = accept(listener, &api, &connections, &ending) => {}
    }
    // All permits are free when all connections have ended.
    let all = connections.acquire_many(MAX_CONNECTIONS as u32);
    let _ = tokio::time::timeout(GRACE, all).await;
}

async fn accept(
    listener: StdListener,
    api: &Api,
    connections: &Arc<Semaphore>,
    ending: &watch::Receiver<bool>,
) {
    // The call fails only outside of a runtime.
    let Ok(listener) = UnixListener::from_std(listener) else { return };
    loop {
        // Above the limit, a client waits until another one disconnects.
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (api, ending) = (api.clone(), ending.clone());
                tokio::spawn(async move {
                    connection(stream, api, ending).await;
                    drop(permit);
                });
            }
            // Probably out of files. No event tells when files are free again.
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Waits until the server must end.
async fn is_ending(ending: &mut watch::Receiver<bool>) {
    // If the sender is gone, the server is ending too.
    let _ = ending.wait_for(|ending| *ending).await;
}

async fn connection(stream: UnixStream, api: Api, mut ending: watch::Receiver<bool>) {
    let service = service_fn(|request| {
        let api = api.clone();
        async move { Ok::<_, Infallible>(respond(&api, request).await) }
    });
    let stream = TokioIo::new(AsHttp11(with_write_timeout(stream)));
    let mut connection = pin!(http1::Builder::new().serve_connection(stream, service));
    // An error ends only its own connection.
    tokio::select! {
        _ = connection.as_mut() => {}
        () = is_ending(&mut ending) => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

async fn respond(api: &Api, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let answer = match read_body(body, api.max_body).await {
        Ok(body) => {
            let (controller, method, path) = (api.controller.clone(), parts.method.clone(), path.clone());
            let work = move || requests::answer(&mut controller.lock(), &method, &path, &body);
            tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| panicked().into())
        }
        Err(fault) => Answer::from(fault),
    };
    let Answer { status, body } = answer;
    let said = body.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
    let line = format!("{} {path}: {} {said}", parts.method, status.as_u16());
    if status.is_success() {
        api.log.info(line)
    } else {
        api.log.error(line)
    }
    let has_body = body.is_some();
    let mut response = Response::new(Full::new(Bytes::from(body.unwrap_or_default())));
    *response.status_mut() = status;
    response.headers_mut().insert(SERVER, HeaderValue::from_static("Firecracker API"));
    if has_body {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    response
}

fn panicked() -> Fault {
    let message = "The operation panicked; this is a defect of samepage.".to_owned();
    Fault { status: StatusCode::INTERNAL_SERVER_ERROR, message }
}

async fn read_body(body: Incoming, max: usize) -> Result<Bytes, Fault> {
    let fault = |status, message: String| Fault { status, message };
    match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, max).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(fault(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("The payload is larger than the limit of {max} bytes allowed by the server."),
        )),
        Ok(Err(error)) => Err(Fault::new(format!("The body cannot be read: {error}."))),
        Err(_) => Err(fault(
            StatusCode::REQUEST_TIMEOUT,
            format!("The body did not arrive within {} seconds.", BODY_TIMEOUT.as_secs()),
        )),
    }
}
