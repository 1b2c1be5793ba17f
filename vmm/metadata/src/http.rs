//! One request and its answer. Each connection carries one request.
//!
//! Messages are those of Firecracker, since programs in guests may look for them.

use std::time::Duration;

use httparse::{EMPTY_HEADER, Request, Status};

use crate::store::{Form, StoreError};
use crate::tokens::LIFE;
use crate::{Metadata, Version};

/// Upper limit for a request, in bytes, without its body.
pub(crate) const MAX_REQUEST: usize = 4096;
const MAX_HEADERS: usize = 32;

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN: [&str; 2] = ["x-metadata-token", "x-aws-ec2-metadata-token"];
const LIFE_OF_TOKEN: [&str; 2] = ["x-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token-ttl-seconds"];
const FORWARDED: &str = "x-forwarded-for";

/// An answer before it is written out.
struct Answer {
    status: (u16, &'static str),
    form: Form,
    /// Lines of headers, each with its end.
    headers: String,
    body: String,
}

impl Answer {
    fn new(status: (u16, &'static str), body: impl Into<String>) -> Self {
        Self { status, form: Form::Text, headers: String::new(), body: body.into() }
    }

    fn bad(body: impl Into<String>) -> Self {
        Self::new((400, "Bad Request"), body)
    }

    fn written(&self) -> Vec<u8> {
        let (code, reason) = self.status;
        let kind = match self.form {
            Form::Json => "application/json",
            Form::Text => "text/plain",
        };
        format!(
            "HTTP/1.1 {code} {reason}\r\nServer: samepage\r\nConnection: close\r\nContent-Type: {kind}\r\n{}\
             Content-Length: {}\r\n\r\n{}",
            self.headers,
            self.body.len(),
            self.body
        )
        .into_bytes()
    }
}

/// Returns the answer to the bytes of a connection; `None` if the request is not complete.
pub(crate) fn answer(service: &Metadata, bytes: &[u8], now: Duration) -> Option<Vec<u8>> {
    let mut headers = [EMPTY_HEADER; MAX_HEADERS];
    let mut request = Request::new(&mut headers);
    let answer = match request.parse(bytes) {
        Ok(Status::Complete(_)) => answer_request(service, &request, now),
        Ok(Status::Partial) if bytes.len() < MAX_REQUEST => return None,
        Ok(Status::Partial) => Answer::bad(format!("The request is longer than {MAX_REQUEST} bytes.")),
        Err(error) => Answer::bad(format!("Invalid HTTP request: {error}.")),
    };
    Some(answer.written())
}

fn answer_request(service: &Metadata, request: &Request<'_, '_>, now: Duration) -> Answer {
    let path = path(request.path.unwrap_or_default());
    if path.is_empty() {
        return Answer::bad("Invalid URI.");
    }
    match request.method {
        Some("GET") => get(service, request, path, now),
        Some("PUT") => put(service, request, path, now),
        _ => Answer {
            headers: "Allow: GET, PUT\r\n".to_owned(),
            ..Answer::new((405, "Method Not Allowed"), "Not allowed HTTP method.")
        },
    }
}

/// Returns the path of an address with or without a host.
fn path(uri: &str) -> &str {
    match uri.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("", |at| &rest[at..]),
        None if uri.starts_with('/') => uri,
        None => "",
    }
}

/// Returns the first header with one of these names, and its value.
fn header<'a>(request: &'a Request<'_, '_>, names: &[&str]) -> Option<(&'a str, &'a str)> {
    let is_named = |name: &str| names.iter().any(|wanted| wanted.eq_ignore_ascii_case(name));
    let found = request.headers.iter().find(|header| is_named(header.name))?;
    Some((found.name, std::str::from_utf8(found.value).unwrap_or_default().trim()))
}

fn without_empty_parts(path: &str) -> String {
    let mut path = path.to_owned();
    while path.contains("//") {
        path = path.replace("//", "/");
    }
    path
}

fn not_found(path: &str) -> Answer {
    Answer::new((404, "Not Found"), format!("Resource not found: {path}."))
}

fn get(service: &Metadata, request: &Request<'_, '_>, path: &str, now: Duration) -> Answer {
    let state = service.state.lock();
    if state.version == Version::V2 {
        let unauthorized = |why| Answer::new((401, "Unauthorized"), why);
        match header(request, &TOKEN) {
            None => {
                return unauthorized(
                    "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to \
                     specify the session token.",
                );
            }
            Some((_, token)) if !service.tokens.is_valid(now, token) => {
                return unauthorized("MMDS token not valid.");
            }
            Some(_) => {}
        }
    }
    let accepted = header(request, &["accept"]).map_or("", |(_, accepted)| accepted);
    let is_json = accepted.to_ascii_lowercase().contains("application/json") && !state.is_text_only;
    let form = if is_json { Form::Json } else { Form::Text };
    match state.store.get(&without_empty_parts(path), form) {
        Ok(body) => Answer { form, ..Answer::new((200, "OK"), body) },
        Err(StoreError::NoText) => Answer::new((501, "Not Implemented"), StoreError::NoText.to_string()),
        Err(_) => not_found(path),
    }
}

fn put(service: &Metadata, request: &Request<'_, '_>, path: &str, now: Duration) -> Answer {
    // A proxy that passes requests on would give tokens to those that are not in the guest.
    if let Some((name, _)) = header(request, &[FORWARDED]) {
        return Answer::bad(format!("Invalid header. Reason: Unsupported header name. Key: {name}"));
    }
    if without_empty_parts(path) != TOKEN_PATH {
        return not_found(path);
    }
    let Some((name, value)) = header(request, &LIFE_OF_TOKEN) else {
        return Answer::bad(
            "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
             `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
        );
    };
    let Ok(life) = value.parse::<u32>() else {
        return Answer::bad(format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{value}"));
    };
    if !LIFE.contains(&life) {
        return Answer::bad(format!(
            "Invalid time to live value provided for token: {life}. Please provide a value between {} and {}.",
            LIFE.start(),
            LIFE.end()
        ));
    }
    match service.tokens.make(now, life) {
        Ok(token) => Answer { headers: format!("{name}: {life}\r\n"), ..Answer::new((200, "OK"), token) },
        Err(error) => Answer::new((500, "Internal Server Error"), format!("There is no token: {error}.")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    fn service(version: Version) -> Arc<Metadata> {
        let service = Metadata::new("a", 1000).unwrap();
        service.configure(version, false);
        service.put(json!({"name": {"first": "John"}, "age": 43})).unwrap();
        service
    }

    /// The status and the body of the answer to a request of these lines.
    fn ask(service: &Metadata, lines: &[&str]) -> (u16, String) {
        let request = lines.join("\r\n") + "\r\n\r\n";
        for end in 0..request.len() {
            assert_eq!(answer(service, &request.as_bytes()[..end], NOW), None);
        }
        let answer = String::from_utf8(answer(service, request.as_bytes(), NOW).unwrap()).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    #[test]
    fn the_first_version_answers_everybody() {
        let service = service(Version::V1);
        let ok = |body: &str| (200, body.to_owned());
        assert_eq!(ask(&service, &["GET / HTTP/1.1"]), ok("age\nname/"));
        assert_eq!(ask(&service, &["GET http://169.254.169.254//name///first HTTP/1.0"]), ok("John"));
        let json = "aCCept: application/json";
        assert_eq!(ask(&service, &["GET /name/ HTTP/1.1", json]), ok(r#"{"first":"John"}"#));
        assert_eq!(ask(&service, &["GET /age HTTP/1.1"]).0, 501);
        assert_eq!(
            ask(&service, &["GET /nobody HTTP/1.1"]),
            (404, "Resource not found: /nobody.".to_owned())
        );
        assert_eq!(ask(&service, &["POST / HTTP/1.1"]).0, 405);
        assert_eq!(ask(&service, &["GET http://a HTTP/1.1"]).0, 400);
        service.configure(Version::V1, true);
        assert_eq!(ask(&service, &["GET /name HTTP/1.1", json]), ok("first"));
    }

    #[test]
    fn the_second_version_answers_those_with_a_token() {
        let service = service(Version::V2);
        assert_eq!(ask(&service, &["GET /age HTTP/1.1"]).0, 401);
        let token = |life: &str| ask(&service, &["PUT /latest/api/token HTTP/1.1", life]);
        for name in LIFE_OF_TOKEN {
            let (code, token) = token(&format!("{name}: 60"));
            assert_eq!(code, 200);
            for name in TOKEN {
                let header = format!("{name}: {token}");
                assert_eq!(ask(&service, &["GET /name/first HTTP/1.1", &header]).1, "John");
            }
        }
        assert_eq!(ask(&service, &["GET /age HTTP/1.1", "X-metadata-token: 00"]).0, 401);
        for wrong in [
            "x-metadata-token-ttl-seconds: 0",
            "x-metadata-token-ttl-seconds: 21601",
            "x: 1",
            "x-metadata-token-ttl-seconds: a",
        ] {
            assert_eq!(token(wrong).0, 400, "{wrong}");
        }
        let forwarded =
            ["PUT /latest/api/token HTTP/1.1", "X-metadata-token-ttl-seconds: 9", "X-Forwarded-For: b"];
        assert_eq!(ask(&service, &forwarded).0, 400);
        assert_eq!(ask(&service, &["PUT / HTTP/1.1", "X-metadata-token-ttl-seconds: 9"]).0, 404);
    }

    #[test]
    fn a_request_that_is_too_long_or_none_is_refused() {
        let service = service(Version::V1);
        let long = format!("GET / HTTP/1.1\r\nx: {}", "x".repeat(MAX_REQUEST));
        for wrong in [&long[..], "\0", "GET / HTTP/9\r\n\r\n", &"a: b\r\n".repeat(40)] {
            let answer = answer(&service, wrong.as_bytes(), NOW).expect("an answer");
            assert!(answer.starts_with(b"HTTP/1.1 400 "), "{wrong}");
        }
    }
}
