//! A small blocking client of the control socket.

use std::io;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;

use samepage_api_types::CONSOLE_PROTOCOL;
use samepage_api_types::problem::Problem;
use samepage_process::control_socket::{Choice, SYSTEM};

/// The reason why a request failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The socket cannot be connected to.
    #[error("connect to {path}: {source}; {help}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
        /// What to do.
        help: String,
    },
    /// The connection broke.
    #[error("talk to the control socket: {0}")]
    Connection(#[from] hyper::Error),
    /// The server refused the request.
    #[error(transparent)]
    Problem(Box<Problem>),
    /// This client cannot parse the response.
    #[error("cannot understand the control socket's answer with status {status}: {reason}")]
    Answer {
        /// The status.
        status: u16,
        /// The fault.
        reason: String,
    },
    /// The request is invalid.
    #[error("send a request to the control socket: {0}")]
    Request(String),
    /// The process lacks a resource.
    #[error("send a request to the control socket: {0}")]
    Io(#[from] io::Error),
}

/// A raw response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The media type.
    pub media_type: String,
    /// The body.
    pub body: Vec<u8>,
}

/// A client. Each request uses its own connection.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    /// The choice of the socket, if the user has named none.
    chosen: Option<Choice>,
}

impl Client {
    /// Returns a client of the socket at this path.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), chosen: None }
    }

    /// Returns a client of the socket that was chosen because the user has named none.
    pub fn of_default(chosen: Choice) -> Self {
        Self { socket: chosen.path.clone(), chosen: Some(chosen) }
    }

    /// Returns the path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns the resource at a path.
    ///
    /// # Errors
    /// Fails if the request or the parsing of the response fails.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        understand(&self.raw(Method::GET, path, Vec::new())?)
    }

    /// Sends JSON and returns the response.
    ///
    /// # Errors
    /// Fails if the request or the parsing of the response fails.
    pub fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| ClientError::Request(error.to_string()))?;
        understand(&self.raw(method, path, body)?)
    }

    /// Deletes the resource at a path.
    ///
    /// # Errors
    /// Fails if the request fails.
    pub fn delete(&self, path: &str) -> Result<(), ClientError> {
        let answer = self.raw(Method::DELETE, path, Vec::new())?;
        if answer.status < 300 { Ok(()) } else { Err(refusal(&answer)) }
    }

    /// Sends bytes and returns the response, whatever its status.
    ///
    /// # Errors
    /// Fails if there is no response.
    pub fn raw(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Answer, ClientError> {
        self.run(async {
            let request = self.request(method, path)?.header(CONTENT_TYPE, "application/json");
            collect(self.exchange(request, body).await?).await
        })
    }

    /// Passes the parts of a response to `take` as they arrive, until the response ends or `take` returns
    /// false.
    ///
    /// # Errors
    /// Fails if the server refuses the request, or if the connection breaks.
    pub fn stream(
        &self,
        path: &str,
        mut take: impl FnMut(&[u8]) -> ControlFlow<()>,
    ) -> Result<(), ClientError> {
        self.run(async {
            let mut response = self.exchange(self.request(Method::GET, path)?, Vec::new()).await?;
            if !response.status().is_success() {
                return Err(refusal(&collect(response).await?));
            }
            while let Some(frame) = response.frame().await {
                if let Ok(bytes) = frame?.into_data()
                    && take(&bytes).is_break()
                {
                    break;
                }
            }
            Ok(())
        })
    }

    /// Attaches to a VM's console until the VM ends. Returns a connection for bytes in both directions, and
    /// the first bytes.
    ///
    /// # Errors
    /// Fails if the server refuses the request.
    pub fn attach(&self, vm: &str) -> Result<(StdStream, Vec<u8>), ClientError> {
        self.upgrade(&format!("/vms/{vm}/console/stream?until_end=true"))
    }

    /// Attaches to the console of a VM that must end with the connection. The connection also ends with the
    /// VM.
    ///
    /// # Errors
    /// Fails if the server refuses the request.
    pub fn attach_for_life(&self, vm: &str) -> Result<(StdStream, Vec<u8>), ClientError> {
        self.upgrade(&format!("/vms/{vm}/console/stream?lifeline=true"))
    }

    fn upgrade(&self, path: &str) -> Result<(StdStream, Vec<u8>), ClientError> {
        self.run(async {
            let request = self.request(Method::GET, path)?;
            let request = request.header(CONNECTION, "upgrade").header(UPGRADE, CONSOLE_PROTOCOL);
            let response = self.exchange(request, Vec::new()).await?;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                return Err(refusal(&collect(response).await?));
            }
            let upgraded = hyper::upgrade::on(response).await?;
            let parts = upgraded
                .downcast::<TokioIo<UnixStream>>()
                .map_err(|_| ClientError::Request("the connection has an unexpected type".to_owned()))?;
            let stream = parts.io.into_inner().into_std()?;
            stream.set_nonblocking(false)?;
            Ok((stream, parts.read_buf.into()))
        })
    }

    fn request(&self, method: Method, path: &str) -> Result<hyper::http::request::Builder, ClientError> {
        Ok(Request::builder().method(method).uri(path).header(HOST, "samepage"))
    }

    async fn exchange(
        &self,
        request: hyper::http::request::Builder,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, ClientError> {
        let request = request.body(Full::new(Bytes::from(body)));
        let request = request.map_err(|error| ClientError::Request(error.to_string()))?;
        let stream = UnixStream::connect(&self.socket).await.map_err(|source| {
            let help = self.help(&source);
            ClientError::Connect { path: self.socket.clone(), source, help }
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // The code that waits for the response gets errors of the connection.
        tokio::spawn(connection.with_upgrades());
        Ok(sender.send_request(request).await?)
    }

    /// Returns what to do if nobody answers at the socket.
    fn help(&self, error: &io::Error) -> String {
        let path = self.socket.display();
        if error.kind() == io::ErrorKind::PermissionDenied {
            return "its group may connect; join the group (usermod -aG), and log in again".to_owned();
        }
        let service = "start the service (systemctl start samepage)";
        match &self.chosen {
            None => format!("is `samepage serve --socket {path}` running?"),
            Some(Choice { missing: Some(missing), .. }) => format!(
                "nor is there {}. Run `samepage serve`, {service}, or name another socket with --socket",
                missing.display()
            ),
            Some(_) if self.socket == Path::new(SYSTEM) => {
                format!("run `samepage serve` as root, {service}, or name another socket with --socket")
            }
            Some(_) => format!(
                "its process has ended. Run `samepage serve` again, or use --socket {SYSTEM} for the service"
            ),
        }
    }

    fn run<T>(&self, work: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
    }
}

async fn collect(response: Response<Incoming>) -> Result<Answer, ClientError> {
    let status = response.status().as_u16();
    let media_type = response.headers().get(CONTENT_TYPE).and_then(|media| media.to_str().ok());
    let media_type = media_type.unwrap_or_default().to_owned();
    let body = response.into_body().collect().await?.to_bytes().into();
    Ok(Answer { status, media_type, body })
}

fn understand<T: DeserializeOwned>(answer: &Answer) -> Result<T, ClientError> {
    if answer.status >= 300 {
        return Err(refusal(answer));
    }
    serde_json::from_slice(&answer.body)
        .map_err(|error| ClientError::Answer { status: answer.status, reason: error.to_string() })
}

fn refusal(answer: &Answer) -> ClientError {
    match serde_json::from_slice(&answer.body) {
        Ok(problem) => ClientError::Problem(Box::new(problem)),
        Err(error) => ClientError::Answer { status: answer.status, reason: error.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_reaches_nobody_is_told_what_was_tried_and_what_to_start() {
        let folder = tempfile::tempdir().unwrap();
        let (own, system) = (folder.path().join("own"), folder.path().join("system"));
        let said = |client: Client| client.get::<()>("/vms").unwrap_err().to_string();
        let has = |text: &str, parts: &[&str]| {
            for part in parts {
                assert!(text.contains(part), "{part:?} is missing in {text}");
            }
        };
        let (own_text, system_text) = (own.display().to_string(), system.display().to_string());
        let named = format!("`samepage serve --socket {own_text}`");
        has(&said(Client::new(&own)), &[&own_text, "No such file", &named]);
        let neither = Choice { path: own.clone(), missing: Some(system) };
        let neither = said(Client::of_default(neither));
        has(&neither, &[&own_text, &system_text, "`samepage serve`", "systemctl start samepage", "--socket"]);
        // As a process leaves it that was killed.
        drop(std::os::unix::net::UnixListener::bind(&own).unwrap());
        let left = said(Client::of_default(Choice { path: own, missing: None }));
        has(&left, &[&own_text, "refused", "has ended", "`samepage serve`", SYSTEM]);
        let of_service = Client::of_default(Choice { path: SYSTEM.into(), missing: None });
        has(&of_service.help(&io::ErrorKind::NotFound.into()), &["as root", "systemctl start samepage"]);
        has(&of_service.help(&io::ErrorKind::PermissionDenied.into()), &["usermod -aG"]);
    }
}
