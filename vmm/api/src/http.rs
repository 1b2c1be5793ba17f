//! The API and its page over TCP, for browsers.
//!
//! Whoever can open the Unix socket may do anything; a port is open to every user of the host, and to every
//! page that one of them has in a browser. So:
//!
//! - Without a token the API can be looked at, but for consoles, and nothing can be changed; the server
//!   listens to the host itself alone, and answers only to names of the host itself, since any name can be
//!   made to lead here (DNS rebinding).
//! - With one, every request of the API has to bring it (`Authorization: Bearer`). Browsers do not send it
//!   by themselves, as they do cookies, so that no other page can act for the user.
//! - Requests that browsers say come from other origins are refused either way, and no answer can be read
//!   or framed by them.

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

/// Characters of a token at least, and at most.
const TOKEN_LENGTH: std::ops::RangeInclusive<usize> = 16..=512;

/// What of the page's own is executed, shown and asked for: nothing else is.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Where the server listens, and whom it lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpOptions {
    /// The address.
    pub address: SocketAddr,
    /// What every request of the API has to bring; without one nothing can be changed.
    pub token: Option<Token>,
}

/// Why there is no server for browsers.
#[derive(Debug, Error)]
pub enum HttpError {
    /// The address is open to others than the host itself.
    #[error(
        "{0} can be reached from other hosts: give --http-token as well, or an address of this host's own, as \
         in 127.0.0.1:8080"
    )]
    Open(SocketAddr),
    /// The address cannot be had.
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
    /// The token is none.
    #[error("the token {path} {reason}")]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: &'static str,
    },
}

/// A secret that requests bring.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(Box<str>);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// Reads a token from a file of its owner's.
    ///
    /// # Errors
    /// Where others can read the file, or there is no token in it.
    pub fn read(path: &Path) -> Result<Self, HttpError> {
        let failed = |source| HttpError::TokenFile { path: path.to_owned(), source };
        let wrong = |reason| HttpError::Token { path: path.to_owned(), reason };
        let file = fs::File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_file() && metadata.mode() & 0o077 != 0 {
            return Err(wrong("can be read by others than its owner: chmod 600 it, and write a new one"));
        }
        let mut text = String::new();
        // One byte more than a token with the end of its line.
        file.take(*TOKEN_LENGTH.end() as u64 + 3).read_to_string(&mut text).map_err(failed)?;
        let token = text.trim_end_matches(['\r', '\n']);
        if !TOKEN_LENGTH.contains(&token.len()) {
            return Err(wrong("has to have 16 to 512 characters, as `openssl rand -hex 32` makes them"));
        }
        if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(wrong("has to be one line of letters, digits and signs, without blanks"));
        }
        Ok(Self(token.into()))
    }

    /// Whether a request brings the token. How long this takes tells nothing about where it differs.
    fn is_brought(&self, headers: &HeaderMap) -> bool {
        let value = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some((scheme, brought)) = value.and_then(|value| value.split_once(' ')) else { return false };
        let same_length = brought.len() == self.0.len();
        let differences =
            self.0.bytes().zip(brought.bytes()).fold(0, |all, (one, other)| all | (one ^ other));
        scheme.eq_ignore_ascii_case("bearer") && same_length && std::hint::black_box(differences) == 0
    }
}

impl HttpOptions {
    /// Opens the port.
    ///
    /// # Errors
    /// Where others could reach it, or it cannot be had.
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

/// Whom the server lets in.
#[derive(Debug)]
pub(super) struct Guard {
    pub(super) token: Option<Token>,
}

/// Lets through what may be asked, and answers with the page's parts.
pub(super) async fn guard(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let answer = match guard.check(&request) {
        Err(problem) => problem.into_response(),
        Ok(Some(asset)) => asset_response(asset),
        Ok(None) => next.run(request).await,
    };
    harden(answer)
}

impl Guard {
    /// Returns the part of the page that is asked for, if it is one.
    fn check(&self, request: &Request) -> Result<Option<&'static web::Asset>, Refusal> {
        let headers = request.headers();
        let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        if self.token.is_none() && !is_own_name(host) {
            let detail = format!("{host:?} is no name of this host's own");
            return Err(Refusal::new(Kind::Forbidden, detail)
                .help("ask for 127.0.0.1 or localhost; other names need a server with --http-token"));
        }
        let text = |name: &HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
        let foreign = text(&ORIGIN).is_some_and(|origin| {
            let name = origin.strip_prefix("http://").or(origin.strip_prefix("https://"));
            name != Some(host)
        });
        let asset = web::asset(request.uri().path());
        let site = text(&HeaderName::from_static("sec-fetch-site"));
        // A link elsewhere may lead to the page; that shows nothing to who made it.
        let followed = asset.is_some_and(|asset| asset.is_page)
            && text(&HeaderName::from_static("sec-fetch-mode")) == Some("navigate");
        if foreign || (matches!(site, Some("cross-site" | "same-site")) && !followed) {
            return Err(Refusal::new(Kind::Forbidden, "this comes from a page of another origin")
                .help("only the page of this server itself, and programs, may ask"));
        }
        let reads = matches!(*request.method(), Method::GET | Method::HEAD);
        if let Some(asset) = asset.filter(|_| reads) {
            return Ok(Some(asset));
        }
        match &self.token {
            Some(token) if token.is_brought(headers) => Ok(None),
            Some(_) => Err(Refusal::new(Kind::Unauthorized, "the request does not bring the token").help(
                "send the header Authorization: Bearer TOKEN, with what is in the file of --http-token",
            )),
            None if reads && !is_console(request.uri().path()) => Ok(None),
            None => Err(Refusal::new(Kind::Forbidden, "without a token, VMs can be watched, and no more")
                .help("start the server with --http-token, or use the Unix socket")),
        }
    }
}

/// Whether a path is, or may be taken for, a console's.
fn is_console(path: &str) -> bool {
    path.split('/').any(|part| part == "console") || path.contains('%')
}

/// Whether a `Host` header is a name that leads to the host itself whoever resolves it.
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
    // What it is belongs to this version of the program.
    ([(CONTENT_TYPE, asset.media_type), (CACHE_CONTROL, "no-cache")], asset.content).into_response()
}

/// Has browsers keep the answer to this origin.
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
