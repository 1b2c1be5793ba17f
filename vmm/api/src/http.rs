//! The API and its page over TCP, for browsers.
//!
//! A user who can open the Unix socket may do anything. A port is open to every user of the host, and to
//! every web page in one of their browsers. Therefore:
//!
//! - Without a token, clients can watch VMs, except for consoles, and change nothing. The server listens only
//!   to the host itself. It responds only to names of the host itself, because DNS can resolve any name to
//!   this address (DNS rebinding).
//! - With a token, every API request must contain it (`Authorization: Bearer`). Browsers do not send it
//!   automatically, unlike cookies, so no other page can act for the user.
//! - In both cases, requests from other origins are refused, and pages of other origins can neither read nor
//!   frame a response.

use std::fs;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderName, ORIGIN,
    REFERRER_POLICY, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use thiserror::Error;

use crate::problem::Refusal;
use samepage_api_types::problem::Kind;
use samepage_web as web;

/// Limits for the length of a token, in characters.
const TOKEN_LENGTH: std::ops::RangeInclusive<usize> = 16..=512;

/// Allows only content of the page's own origin.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The address of the server, and the condition for access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpOptions {
    /// The address.
    pub address: SocketAddr,
    /// The token that every API request must contain. Without one, nothing can be changed.
    pub token: Option<Token>,
}

/// The reason why the server for browsers could not start.
#[derive(Debug, Error)]
pub enum HttpError {
    /// Other hosts can reach the address.
    #[error(
        "{0} can be reached from other hosts: also give --http-token, or use a loopback address, as in \
         127.0.0.1:8080"
    )]
    Open(SocketAddr),
    /// The address cannot be bound.
    #[error("listen at http://{address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The error of the system call.
        source: io::Error,
    },
    /// The token's file cannot be read.
    #[error("read the token {path}: {source}")]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The token is invalid.
    #[error("the token {path} {reason}")]
    Token {
        /// The file.
        path: PathBuf,
        /// The fault and the remedy.
        reason: &'static str,
    },
}

/// The secret that requests must contain.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(Box<str>);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// Reads a token from a file of its owner.
    ///
    /// # Errors
    /// Fails if other users can read the file, or if it contains no valid token.
    pub fn read(path: &Path) -> Result<Self, HttpError> {
        let failed = |source| HttpError::TokenFile { path: path.to_owned(), source };
        let wrong = |reason| HttpError::Token { path: path.to_owned(), reason };
        let file = fs::File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_file() && metadata.mode() & 0o077 != 0 {
            return Err(wrong(
                "can be read by other users: restrict it with chmod 600, and write a new token",
            ));
        }
        let mut text = String::new();
        // One byte more than a token with a line ending.
        file.take(*TOKEN_LENGTH.end() as u64 + 3).read_to_string(&mut text).map_err(failed)?;
        let token = text.trim_end_matches(['\r', '\n']);
        if !TOKEN_LENGTH.contains(&token.len()) {
            return Err(wrong("must have 16 to 512 characters, like the output of `openssl rand -hex 32`"));
        }
        if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(wrong("must be one line of letters, digits and punctuation, without spaces"));
        }
        Ok(Self(token.into()))
    }

    /// Returns whether a request contains the token. The duration does not reveal the position of a
    /// difference.
    fn is_in(&self, headers: &HeaderMap) -> bool {
        let value = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some((scheme, given)) = value.and_then(|value| value.split_once(' ')) else { return false };
        let same_length = given.len() == self.0.len();
        let differences = self.0.bytes().zip(given.bytes()).fold(0, |all, (one, other)| all | (one ^ other));
        scheme.eq_ignore_ascii_case("bearer") && same_length && std::hint::black_box(differences) == 0
    }
}

impl HttpOptions {
    /// Opens the port.
    ///
    /// # Errors
    /// Fails if other hosts could reach the port, or if the address cannot be bound.
    pub(super) fn listen(&self) -> Result<std::net::TcpListener, HttpError> {
        let address = self.address;
        if self.token.is_none() && !address.ip().is_loopback() {
            return Err(HttpError::Open(address));
        }
        let listener = std::net::TcpListener::bind(address)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
        listener.map_err(|source| HttpError::Listen { address, source })
    }
}

/// The check of every request to the port.
#[derive(Debug)]
pub(super) struct Guard {
    pub(super) token: Option<Token>,
}

/// Passes on permitted requests, and responds with the files of the page.
pub(super) async fn guard(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let answer = match guard.check(&request) {
        Err(problem) => problem.into_response(),
        Ok(Some(asset)) => asset_response(asset),
        Ok(None) => next.run(request).await,
    };
    harden(answer)
}

impl Guard {
    /// Returns the requested file of the page, or `None` for an API request.
    fn check(&self, request: &Request) -> Result<Option<&'static web::Asset>, Refusal> {
        let headers = request.headers();
        let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        if self.token.is_none() && !is_own_name(host) {
            let detail = format!("{host:?} is not a local name of this host");
            return Err(Refusal::new(Kind::Forbidden, detail)
                .help("use 127.0.0.1 or localhost; other names require --http-token"));
        }
        let text = |name: &HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
        let foreign = text(&ORIGIN).is_some_and(|origin| {
            let name = origin.strip_prefix("http://").or(origin.strip_prefix("https://"));
            name != Some(host)
        });
        let asset = web::asset(request.uri().path());
        let site = text(&HeaderName::from_static("sec-fetch-site"));
        // A link on another site may lead to the page. The other site learns nothing from that.
        let followed = asset.is_some_and(|asset| asset.is_page)
            && text(&HeaderName::from_static("sec-fetch-mode")) == Some("navigate");
        if foreign || (matches!(site, Some("cross-site" | "same-site")) && !followed) {
            return Err(Refusal::new(Kind::Forbidden, "the request comes from a page of another origin")
                .help("only the page of this server, and programs, may send requests"));
        }
        let reads = matches!(*request.method(), Method::GET | Method::HEAD);
        if let Some(asset) = asset.filter(|_| reads) {
            return Ok(Some(asset));
        }
        match &self.token {
            Some(token) if token.is_in(headers) => Ok(None),
            Some(_) => Err(Refusal::new(Kind::Unauthorized, "the request does not contain the token").help(
                "send the header Authorization: Bearer TOKEN, with the token in the file of --http-token",
            )),
            None if reads && !is_console(request.uri().path()) => Ok(None),
            None => Err(Refusal::new(Kind::Forbidden, "without a token, clients can only watch VMs")
                .help("start the server with --http-token, or use the Unix socket")),
        }
    }
}

/// Returns whether a path is, or could be taken for, that of a console.
fn is_console(path: &str) -> bool {
    path.split('/').any(|part| part == "console") || path.contains('%')
}

/// Returns whether a `Host` header is a name that always means the host itself.
fn is_own_name(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((name, rest)) => (name, rest.strip_prefix(':').or(rest.is_empty().then_some("0"))),
        None => match host.rsplit_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, Some("0")),
        },
    };
    let address = name
        .parse::<Ipv4Addr>()
        .map(IpAddr::from)
        .or_else(|_| name.parse::<Ipv6Addr>().map(IpAddr::from))
        .is_ok_and(|address| address.is_loopback());
    (address || name.eq_ignore_ascii_case("localhost"))
        && port.is_some_and(|port| port.parse::<u16>().is_ok())
}

fn asset_response(asset: &'static web::Asset) -> Response {
    // The files belong to this version of the program.
    ([(CONTENT_TYPE, asset.media_type), (CACHE_CONTROL, "no-cache")], asset.content).into_response()
}

/// Adds headers that keep the response from other origins.
fn harden(mut response: Response) -> Response {
    let unauthorized = response.extensions().get::<Refusal>().is_some_and(|p| p.is(Kind::Unauthorized));
    let headers = response.headers_mut();
    let mut set = |name, value| drop(headers.insert(name, HeaderValue::from_static(value)));
    set(CONTENT_SECURITY_POLICY, POLICY);
    set(X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(REFERRER_POLICY, "no-referrer");
    set(HeaderName::from_static("cross-origin-resource-policy"), "same-origin");
    set(HeaderName::from_static("cross-origin-opener-policy"), "same-origin");
    if unauthorized {
        set(WWW_AUTHENTICATE, "Bearer");
    }
    if !headers.contains_key(CACHE_CONTROL) {
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    response
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use axum::body::Body;

    use super::*;

    fn request(method: &str, path: &str, headers: &[(&str, &str)]) -> Request {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(Body::empty()).unwrap()
    }

    const HERE: (&str, &str) = ("host", "127.0.0.1:8080");

    fn status(guard: &Guard, method: &str, path: &str, headers: &[(&str, &str)]) -> u16 {
        guard.check(&request(method, path, headers)).map_or_else(|problem| problem.status, |_| 200)
    }

    #[test]
    fn without_a_token_everything_can_be_read_but_consoles_and_nothing_changed() {
        let guard = Guard { token: None };
        for path in ["/", "/app.js", "/vms", "/vms/a", "/metrics", "/nothing"] {
            assert_eq!(status(&guard, "GET", path, &[HERE]), 200, "{path}");
        }
        for path in ["/vms/a/console", "/vms/a/console/stream", "/vms/a/%63onsole"] {
            assert_eq!(status(&guard, "GET", path, &[HERE]), 403, "{path}");
        }
        for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
            assert_eq!(status(&guard, method, "/vms", &[HERE]), 403, "{method}");
            assert_eq!(status(&guard, method, "/", &[HERE]), 403, "{method}");
        }
    }

    #[test]
    fn names_that_others_can_make_lead_here_are_refused() {
        let guard = Guard { token: None };
        for host in
            ["127.0.0.1", "127.0.0.1:80", "127.9.9.9:1", "localhost:8080", "LOCALHOST", "[::1]:80", "[::1]"]
        {
            assert_eq!(status(&guard, "GET", "/vms", &[("host", host)]), 200, "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.1",
            "[::2]:80",
            "::1",
            "127.0.0.1:http",
            "localhost:",
            "[::1]x",
        ] {
            assert_eq!(status(&guard, "GET", "/vms", &[("host", host)]), 403, "{host}");
            assert_eq!(status(&guard, "GET", "/", &[("host", host)]), 403, "{host}");
        }
        assert_eq!(status(&guard, "GET", "/vms", &[]), 403);
    }

    #[test]
    fn pages_of_other_origins_are_refused() {
        let token: Token = Token("0123456789abcdef".into());
        let bearer = ("authorization", "Bearer 0123456789abcdef");
        for (guard, method) in [(Guard { token: None }, "GET"), (Guard { token: Some(token) }, "POST")] {
            let ask = |header| status(&guard, method, "/vms", &[HERE, bearer, header]);
            for origin in
                ["http://evil.example", "null", "http://127.0.0.1:9999", "file://", "127.0.0.1:8080"]
            {
                assert_eq!(ask(("origin", origin)), 403, "{origin}");
            }
            assert_eq!(ask(("origin", "http://127.0.0.1:8080")), 200);
            for (site, expected) in
                [("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403)]
            {
                assert_eq!(ask(("sec-fetch-site", site)), expected, "{site}");
            }
            let link = [HERE, ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate")];
            assert_eq!(status(&guard, "GET", "/", &link), 200);
            assert_eq!(status(&guard, "GET", "/vms", &link), 403);
        }
    }

    #[test]
    fn with_a_token_the_api_asks_for_it_and_the_page_does_not() {
        let guard = Guard { token: Some(Token("0123456789abcdef".into())) };
        let anywhere = ("host", "vms.example");
        assert_eq!(status(&guard, "GET", "/", &[anywhere]), 200);
        assert_eq!(status(&guard, "GET", "/vms", &[anywhere]), 401);
        for wrong in
            ["Bearer 0123456789abcdeX", "Bearer 0123456789abcde", "Bearer ", "0123456789abcdef", "Basic x"]
        {
            assert_eq!(status(&guard, "GET", "/vms", &[anywhere, ("authorization", wrong)]), 401, "{wrong}");
        }
        for right in ["Bearer 0123456789abcdef", "bearer 0123456789abcdef"] {
            for (method, path) in [("GET", "/vms"), ("DELETE", "/vms/a"), ("GET", "/vms/a/console")] {
                assert_eq!(
                    status(&guard, method, path, &[anywhere, ("authorization", right)]),
                    200,
                    "{path}"
                );
            }
        }
    }

    #[test]
    fn answers_stay_with_their_origin() {
        let refused = harden(Refusal::new(Kind::Unauthorized, "x").into_response());
        assert_eq!(refused.headers()[WWW_AUTHENTICATE], "Bearer");
        assert_eq!(refused.headers()[CACHE_CONTROL], "no-store");
        let page = harden(asset_response(web::asset("/").unwrap()));
        let policy = page.headers()[CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(policy.contains("frame-ancestors 'none'") && !policy.contains("unsafe"), "{policy}");
        assert!(page.headers().get(WWW_AUTHENTICATE).is_none());
    }

    #[test]
    fn a_token_is_long_and_its_owners() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |text: &str, mode| {
            fs::write(file.path(), text).unwrap();
            fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
            Token::read(file.path())
        };
        assert_eq!(read("0123456789abcdef\n", 0o600).unwrap(), Token("0123456789abcdef".into()));
        assert!(matches!(read("0123456789abcdef\n", 0o640), Err(HttpError::Token { .. })));
        for text in ["", "short\n", "0123456789 abcdef\n", "0123456789abcdef\nmore\n", &"x".repeat(513)] {
            assert!(matches!(read(text, 0o600), Err(HttpError::Token { .. })), "{text:?}");
        }
        assert!(matches!(Token::read("/nonexistent".as_ref()), Err(HttpError::TokenFile { .. })));
    }

    #[test]
    fn ports_that_others_reach_need_a_token() {
        let address = "0.0.0.0:0".parse().unwrap();
        let open = HttpOptions { address, token: None };
        assert!(matches!(open.listen(), Err(HttpError::Open(_))));
        let token = Some(Token("0123456789abcdef".into()));
        assert!(HttpOptions { address, token }.listen().is_ok());
        let taken = HttpOptions { address: "127.0.0.1:0".parse().unwrap(), token: None }.listen().unwrap();
        let again = HttpOptions { address: taken.local_addr().unwrap(), token: None };
        assert!(matches!(again.listen(), Err(HttpError::Listen { .. })));
    }
}
