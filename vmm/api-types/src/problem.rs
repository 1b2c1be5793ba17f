//! Errors as clients see them: problem details (RFC 9457), each with what to do about it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The media type of problem details.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// Before each kind of problem, in `type`.
const TYPE_PREFIX: &str = "urn:samepage:problem:";

/// The kind of a problem. The kinds are listed in `docs/api.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request does not follow HTTP, JSON or the API's schema.
    BadRequest,
    /// A value is out of range, or a file is missing.
    InvalidConfiguration,
    /// The request has no token, or a wrong one.
    Unauthorized,
    /// The client may not do this.
    Forbidden,
    /// There is no such VM.
    NoSuchVm,
    /// There is no such resource.
    NoSuchResource,
    /// The resource has no such method.
    MethodNotAllowed,
    /// There is a VM of this name.
    DuplicateName,
    /// The VM's state forbids the action.
    IllegalTransition,
    /// Another operation on the VM is in progress.
    Busy,
    /// A disk or a console's file has another user.
    InUse,
    /// The guest reads nothing from its keyboard.
    NotListening,
    /// The host cannot promise that much memory.
    Overcommitted,
    /// The VM does not share memory.
    NotSharing,
    /// The media type of the body is not JSON.
    UnsupportedMediaType,
    /// The body is too large.
    TooLarge,
    /// The body did not arrive in time.
    Timeout,
    /// The process is ending, or the host lacks something.
    Unavailable,
    /// A defect of samepage.
    Internal,
}

impl Kind {
    fn facts(self) -> (&'static str, u16, &'static str) {
        match self {
            Kind::BadRequest => ("bad-request", 400, "The request is malformed"),
            Kind::InvalidConfiguration => {
                ("invalid-configuration", 422, "The configuration of the VM is invalid")
            }
            Kind::Unauthorized => ("unauthorized", 401, "The token is missing"),
            Kind::Forbidden => ("forbidden", 403, "This is not allowed from here"),
            Kind::NoSuchVm => ("no-such-vm", 404, "There is no such VM"),
            Kind::NoSuchResource => ("no-such-resource", 404, "There is no such resource"),
            Kind::MethodNotAllowed => ("method-not-allowed", 405, "The resource does not have this method"),
            Kind::DuplicateName => ("duplicate-name", 409, "There is a VM of this name"),
            Kind::IllegalTransition => ("illegal-transition", 409, "The VM's state does not allow this"),
            Kind::Busy => ("busy", 409, "Another operation on the VM is in progress"),
            Kind::InUse => ("in-use", 409, "A file is in use"),
            Kind::NotListening => ("not-listening", 409, "The guest cannot be asked"),
            Kind::Overcommitted => ("overcommitted", 409, "The host cannot promise that much memory"),
            Kind::NotSharing => ("not-sharing", 409, "No memory is shared"),
            Kind::UnsupportedMediaType => {
                ("unsupported-media-type", 415, "The body's media type is not supported")
            }
            Kind::TooLarge => ("too-large", 413, "The body is too large"),
            Kind::Timeout => ("timeout", 408, "The body did not arrive in time"),
            Kind::Unavailable => ("unavailable", 503, "This cannot be done now"),
            Kind::Internal => ("internal", 500, "samepage has a defect"),
        }
    }
}

/// A problem (RFC 9457), and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// The kind of problem, as a URN: `urn:samepage:problem:` and a word from the documentation.
    #[serde(rename = "type")]
    #[schema(value_type = String, format = "uri")]
    pub kind: Box<str>,
    /// The kind of problem, for people.
    #[schema(value_type = String)]
    pub title: Box<str>,
    /// The status of the response.
    pub status: u16,
    /// What went wrong this time.
    #[schema(value_type = String)]
    pub detail: Box<str>,
    /// The path that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub instance: Option<Box<str>>,
    /// Where in the request's body the cause is, as a JSON pointer (RFC 6901).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub pointer: Option<Box<str>>,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub help: Option<Box<str>>,
}

impl Problem {
    /// A problem of this kind.
    pub fn new(kind: Kind, detail: impl Into<Box<str>>) -> Self {
        let (word, status, title) = kind.facts();
        Self {
            kind: format!("{TYPE_PREFIX}{word}").into(),
            title: title.into(),
            status,
            detail: detail.into(),
            instance: None,
            pointer: None,
            help: None,
        }
    }

    /// Says what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<Box<str>>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Says where in the body the cause is.
    #[must_use]
    pub fn at(mut self, pointer: impl Into<Box<str>>) -> Self {
        self.pointer = Some(pointer.into()).filter(|pointer| !pointer.is_empty());
        self
    }

    /// Whether it is of this kind.
    #[must_use]
    pub fn is(&self, kind: Kind) -> bool {
        self.kind.strip_prefix(TYPE_PREFIX) == Some(kind.facts().0)
    }

    /// As JSON.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        // Strings and a number can always be written.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.detail)?;
        if let Some(pointer) = &self.pointer {
            write!(f, " (at {pointer})")?;
        }
        if let Some(help) = &self.help {
            write!(f, "; {help}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_says_what_where_and_what_to_do() {
        let problem = Problem::new(Kind::DuplicateName, "a VM is named web").at("/name").help("use another");
        let json: serde_json::Value = serde_json::from_slice(&problem.to_json()).unwrap();
        assert_eq!(json["type"], "urn:samepage:problem:duplicate-name");
        assert_eq!((json["status"].as_u64(), json["pointer"].as_str()), (Some(409), Some("/name")));
        assert!(json.get("instance").is_none());
        assert_eq!(problem.to_string(), "a VM is named web (at /name); use another");
        assert!(problem.is(Kind::DuplicateName) && !problem.is(Kind::Busy));
    }

    #[test]
    fn the_documentation_lists_every_kind() {
        let docs = include_str!("../../../docs/api.md");
        for kind in [
            Kind::BadRequest,
            Kind::InvalidConfiguration,
            Kind::Unauthorized,
            Kind::Forbidden,
            Kind::NoSuchVm,
            Kind::NoSuchResource,
            Kind::MethodNotAllowed,
            Kind::DuplicateName,
            Kind::IllegalTransition,
            Kind::Busy,
            Kind::InUse,
            Kind::NotListening,
            Kind::Overcommitted,
            Kind::NotSharing,
            Kind::UnsupportedMediaType,
            Kind::TooLarge,
            Kind::Timeout,
            Kind::Unavailable,
            Kind::Internal,
        ] {
            let (word, status, _) = kind.facts();
            let line = format!("| `{word}` | {} |", status);
            assert!(docs.contains(&line), "docs/api.md lacks: {line}");
        }
    }
}
