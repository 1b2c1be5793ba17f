//! The server: HTTP/1.1 over a Unix socket, and optionally over a port for browsers. It runs on one thread,
//! plus a few threads for slow operations.
//!
//! Clients are few and local, but none of them may harm VMs. So the number of connections, and the size and
//! duration of requests, are limited. A client that does not read is disconnected.

use std::future::{self, Future};
use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
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
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::http::{Guard, HttpError, HttpOptions};
use crate::listener::{self, Socket, SocketError, SocketOptions};
use crate::maps::Maps;
use crate::problem::Refusal;
use crate::response_cache::ResponseCache;
use crate::routes;
use crate::sampling::Sampling;
use crate::write_timeout::with_write_timeout;
use samepage_api_types::problem::{Kind, PROBLEM_JSON};
use samepage_host::registry::Registry;

/// Limit for simultaneous connections, including those that only follow events or a console.
pub(crate) const MAX_CONNECTIONS: usize = 256;
/// Limit for simultaneous connections to the port.
pub(crate) const MAX_HTTP_CONNECTIONS: usize = 64;
/// Time limit for a request's head, and for a connection without requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Buffer size of a connection, in bytes. A request's head must fit.
const BUFFER_BYTES: usize = 64 << 10;
/// Number of threads for slow operations: building VMs, waiting for their ends, sampling their memory.
const WORKERS: usize = 8;
/// Time after which an idle thread of these ends.
const WORKER_REST: Duration = Duration::from_secs(1);
/// Time limit for connections to end when the server ends.
const GRACE: Duration = Duration::from_secs(2);
/// Pause when the process is out of files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The reason why the server could not start.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The socket could not be opened.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The port could not be opened.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// Another resource is missing.
    #[error("start the server of the control socket: {0}")]
    Start(#[from] io::Error),
}

/// The addresses of a server.
#[derive(Clone, Debug, Default)]
pub struct Listeners {
    /// The control socket.
    pub socket: Option<SocketOptions>,
    /// A port for browsers.
    pub http: Option<HttpOptions>,
}

/// The state for responding to requests.
#[derive(Debug)]
pub(super) struct Api {
    pub(super) registry: Arc<Registry>,
    pub(super) sampling: Arc<Sampling>,
    pub(super) maps: Maps,
    pub(super) caches: ResponseCaches,
    /// Becomes true when the server must end.
    pub(super) ending: watch::Receiver<bool>,
}

/// The last responses about all VMs.
#[derive(Debug, Default)]
pub(super) struct ResponseCaches {
    pub(super) vms: ResponseCache,
    pub(super) sharing: ResponseCache,
    pub(super) metrics: ResponseCache,
}

/// Keeps a connection counted while it exists.
pub(super) type Permit = Arc<OwnedSemaphorePermit>;

/// A running server. Dropping it ends the server and removes the socket.
#[derive(Debug)]
pub struct Server {
    end: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    address: Option<SocketAddr>,
    _socket: Option<Socket>,
}

impl Server {
    /// Opens the listeners and answers requests about the registry's VMs. Threads of the server have the calling
    /// thread's signal mask.
    ///
    /// # Errors
    /// Fails if a listener cannot be opened, or if the process is out of files or threads.
    pub fn start(listeners: &Listeners, registry: Arc<Registry>) -> Result<Self, ServerError> {
        let (end, ending) = watch::channel(false);
        let sampling = Arc::new(Sampling::new()?);
        let maps = Maps::new()?;
        let api = Arc::new(Api { registry, sampling, maps, caches: ResponseCaches::default(), ending });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(WORKERS)
            .thread_keep_alive(WORKER_REST)
            .thread_name("api-work")
            .build()?;
        let tcp = listeners.http.as_ref().map(HttpOptions::listen).transpose()?;
        let address = tcp.as_ref().map(StdTcpListener::local_addr).transpose()?;
        let guard = listeners.http.as_ref().map(|http| Guard { token: http.token.clone() });
        let (unix, socket) = listeners.socket.as_ref().map(listener::open).transpose()?.unzip();
        let thread =
            thread::Builder::new().name("api".into()).spawn(move || serve(runtime, unix, tcp, guard, api))?;
        Ok(Self { end, thread: Some(thread), address, _socket: socket })
    }

    /// Returns the port's address, if there is one.
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.address
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

fn serve(
    runtime: Runtime,
    unix: Option<StdListener>,
    tcp: Option<StdTcpListener>,
    guard: Option<Guard>,
    api: Arc<Api>,
) {
    runtime.block_on(async {
        let mut ending = api.ending.clone();
        let (router, guarded) = routes::routers(api, guard);
        let unix = Acceptor::new(router, MAX_CONNECTIONS, &ending, unix.map(UnixListener::from_std));
        // Connections to the port do not use up the limit of the socket.
        let tcp = guarded.map(|router| {
            Acceptor::new(router, MAX_HTTP_CONNECTIONS, &ending, tcp.map(TcpListener::from_std))
        });
        tokio::select! {
            () = is_ending(&mut ending) => {}
            () = unix.accept() => {}
            () = async { if let Some(tcp) = &tcp { tcp.accept().await } else { future::pending().await } } => {}
        }
        // All permits are free when all connections have ended.
        let all = async {
            unix.empty().await;
            if let Some(tcp) = &tcp {
                tcp.empty().await;
            }
        };
        let _ = tokio::time::timeout(GRACE, all).await;
    });
    runtime.shutdown_timeout(GRACE);
}

/// A listener.
trait Accept {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn accept(&self) -> impl Future<Output = io::Result<Self::Stream>>;

    /// Writes what the stream accepts without waiting.
    fn write(stream: &Self::Stream, bytes: &[u8]);
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    async fn accept(&self) -> io::Result<UnixStream> {
        UnixListener::accept(self).await.map(|(stream, _)| stream)
    }

    fn write(stream: &UnixStream, bytes: &[u8]) {
        // A new connection has room for this. A client that does not read it finds the connection closed.
        let _ = stream.try_write(bytes);
    }
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<TcpStream> {
        let (stream, _) = TcpListener::accept(self).await?;
        // Responses are short and written as a whole, so waiting for more data would only delay them.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    fn write(stream: &TcpStream, bytes: &[u8]) {
        // As above.
        let _ = stream.try_write(bytes);
    }
}

/// Accepts connections from a listener, up to a limit.
struct Acceptor<L> {
    listener: Option<L>,
    router: Router,
    most: usize,
    connections: Arc<Semaphore>,
    ending: watch::Receiver<bool>,
}

impl<L: Accept> Acceptor<L> {
    fn new(
        router: Router,
        most: usize,
        ending: &watch::Receiver<bool>,
        listener: Option<io::Result<L>>,
    ) -> Self {
        let connections = Arc::new(Semaphore::new(most));
        // A listener fails only outside of a runtime.
        Self { listener: listener.and_then(Result::ok), router, most, connections, ending: ending.clone() }
    }

    /// Waits until all connections have ended.
    async fn empty(&self) {
        // The semaphore is never closed.
        let _ = self.connections.acquire_many(self.most as u32).await;
    }

    /// Accepts connections for ever.
    async fn accept(&self) {
        let Some(listener) = &self.listener else { return future::pending().await };
        loop {
            match listener.accept().await {
                Ok(stream) => match Arc::clone(&self.connections).try_acquire_owned() {
                    Ok(permit) => {
                        let (router, ending) = (self.router.clone(), self.ending.clone());
                        tokio::spawn(connection(stream, router, Arc::new(permit), ending));
                    }
                    Err(_) => L::write(&stream, &refusal(self.most)),
                },
                // Probably out of files. No event tells when files are free again.
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    }
}

/// Returns the response for a connection above the limit.
fn refusal(most: usize) -> Vec<u8> {
    let problem = Refusal::new(Kind::Unavailable, format!("there are already {most} connections"))
        .help("close some, or wait")
        .to_json();
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: {PROBLEM_JSON}\r\nContent-Length: {}\r\n\
         Retry-After: 1\r\nConnection: close\r\n\r\n",
        problem.len()
    );
    [head.as_bytes(), &problem].concat()
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    permit: Permit,
    mut ending: watch::Receiver<bool>,
) {
    let mark = permit.clone();
    let service = tower_service(router, mark);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(TokioIo::new(with_write_timeout(stream)), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    // An error ends only its own connection.
    tokio::select! {
        _ = connection.as_mut() => {}
        () = is_ending(&mut ending) => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
    drop(permit);
}

/// Waits until the server must end.
pub(super) async fn is_ending(ending: &mut watch::Receiver<bool>) {
    // If the sender is gone, the server is ending too.
    let _ = ending.wait_for(|ending| *ending).await;
}

/// Returns the routes as a service for requests that carry their connection's permit.
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
