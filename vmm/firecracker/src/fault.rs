//! Faults: refusals of requests.

use hyper::StatusCode;

/// A refusal of a request: a status, and a sentence for the field `fault_message`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) status: StatusCode,
    pub(super) message: String,
}

impl Fault {
    /// Returns a bad request, as for most refusals.
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into() }
    }

    /// Returns a refusal of a feature of Firecracker that samepage lacks.
    pub(super) fn missing(what: &str) -> Self {
        Self::new(format!("The requested operation is not supported: samepage has no {what}."))
    }

    /// Returns a refusal of an operation that is possible only before the start.
    pub(super) fn started() -> Self {
        Self::new("The requested operation is not supported after starting the microVM.")
    }

    /// Returns a refusal of an operation that is possible only after the start.
    pub(super) fn not_started() -> Self {
        Self::new("The requested operation is not supported before starting the microVM.")
    }
}
