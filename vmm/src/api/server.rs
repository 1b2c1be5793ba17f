//! The server: HTTP/1.1 over a Unix socket, on one thread, with few more for what takes time.
//!
//! Clients are few and local, and yet nothing that they do or leave undone may harm VMs: connections are
//! bounded in number, requests in size and time, and what is written has to be taken.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::pin::pin;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::listener::{self, Socket, SocketError, SocketOptions};
use super::manager::Manager;
use super::patient::Patient;
use super::problem::{Kind, PROBLEM_JSON, Problem};
use super::routes;
use super::sampling::Sampling;

/// Connections at a time; each that only listens to events or a console counts as well.
const MAX_CONNECTIONS: usize = 256;
/// How long a request's head may take, and a connection without requests may stay.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// What is buffered of a connection, in bytes; a request's head has to fit.
const BUFFER_BYTES: usize = 64 << 10;
/// Threads for what takes time: to build VMs, to wait for their ends, to look at their memory.
const WORKERS: usize = 8;
/// How long an idle one of those stays.
const WORKER_REST: Duration = Duration::from_secs(1);
/// How long connections may take to end when the server does.
const GRACE: Duration = Duration::from_secs(2);
/// How long to wait when the process is out of files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why there is no server.
#[derive(Debug, Error)]
pub enum ServerError {
    /// Its socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// What else it needs.
    #[error("start the server of the control socket: {0}")]
    Start(#[from] io::Error),
}

/// What requests are answered from.
#[derive(Debug)]
pub(super) struct Api {
    pub(super) manager: Arc<Manager>,
    pub(super) sampling: Arc<Sampling>,
    /// Becomes true when the server is to end.
    pub(super) ending: watch::Receiver<bool>,
}

/// A connection counts as long as somebody holds this.
pub(super) type Permit = Arc<OwnedSemaphorePermit>;

/// A server at work. It ends when dropped, and its socket is gone then.
#[derive(Debug)]
pub struct Server {
    end: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    _socket: Socket,
}

impl Server {
    /// Opens the socket and answers requests about the manager's VMs. Threads of the server have the
    /// calling thread's signal mask.
    ///
    /// # Errors
    /// Where the socket cannot be had, or the process is out of something.
    pub fn start(options: &SocketOptions, manager: Arc<Manager>) -> Result<Self, ServerError> {
        let (end, ending) = watch::channel(false);
        let sampling = Arc::new(Sampling::new()?);
        let api = Arc::new(Api { manager, sampling, ending });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(WORKERS)
            .thread_keep_alive(WORKER_REST)
            .thread_name("api-work")
            .build()?;
        let (listener, socket) = listener::open(options)?;
        let thread =
            thread::Builder::new().name("api".into()).spawn(move || serve(runtime, listener, api))?;
        Ok(Self { end, thread: Some(thread), _socket: socket })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // A panic has been told by itself.
            let _ = thread.join();
        }
    }
}

fn serve(runtime: Runtime, listener: StdListener, api: Arc<Api>) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    runtime.block_on(async {
        let mut ending = api.ending.clone();
        let router = routes::router(api);
        let others = ending.clone();
        tokio::select! {
            () = is_ending(&mut ending) => {}
            () = accept(listener, &router, &connections, &others) => {}
        }
        // All permits are back once all connections have ended.
        let all = connections.acquire_many(MAX_CONNECTIONS as u32);
        let _ = tokio::time::timeout(GRACE, all).await;
    });
    runtime.shutdown_timeout(GRACE);
}

async fn accept(
    listener: StdListener,
    router: &Router,
    connections: &Arc<Semaphore>,
    ending: &watch::Receiver<bool>,
) {
    // Fails only outside of a runtime.
    let Ok(listener) = UnixListener::from_std(listener) else { return };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => match Arc::clone(connections).try_acquire_owned() {
                Ok(permit) => {
                    tokio::spawn(connection(stream, router.clone(), Arc::new(permit), ending.clone()));
                }
                Err(_) => refuse(&stream),
            },
            // Out of files, most likely: no event tells when there are some again.
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Says that there are too many, without a wait.
fn refuse(stream: &UnixStream) {
    let problem = Problem::new(Kind::Unavailable, format!("there are {MAX_CONNECTIONS} connections already"))
        .help("close some, or wait")
        .to_json();
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: {PROBLEM_JSON}\r\nContent-Length: {}\r\n\
         Retry-After: 1\r\nConnection: close\r\n\r\n",
        problem.len()
    );
    // A new socket has room for this; who does not hear it finds the connection closed.
    let _ = stream.try_write(&[head.as_bytes(), &problem].concat());
}

async fn connection(stream: UnixStream, router: Router, permit: Permit, mut ending: watch::Receiver<bool>) {
    let mark = permit.clone();
    let service = tower_service(router, mark);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(TokioIo::new(Patient::new(stream)), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    // What goes wrong on a connection ends it, and concerns nobody else.
    tokio::select! {
        _ = connection.as_mut() => {}
        () = is_ending(&mut ending) => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
    drop(permit);
}

/// Waits until the server is to end.
pub(super) async fn is_ending(ending: &mut watch::Receiver<bool>) {
    // Where nobody can say so any more it is over as well.
    let _ = ending.wait_for(|ending| *ending).await;
}

/// The routes, for requests that carry their connection's permit.
fn tower_service(
    router: Router,
    permit: Permit,
) -> TowerToHyperService<
    impl tower_service::Service<
        hyper::Request<Incoming>,
        Response = axum::response::Response,
        Error = std::convert::Infallible,
        Future: Send + 'static,
    > + Clone
    + Send
    + 'static,
> {
    TowerToHyperService::new(router.layer(axum::Extension(permit)))
}
