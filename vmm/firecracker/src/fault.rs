//! What a client is told where something cannot be done.

use hyper::StatusCode;

/// Why a request is refused: a status, and a sentence that the client finds as `fault_message`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) status: StatusCode,
    pub(super) message: String,
}

impl Fault {
    /// What most refusals are to Firecracker's clients: a bad request.
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into() }
    }

    /// Something of Firecracker's that samepage does not have.
    pub(super) fn missing(what: &str) -> Self {
        Self::new(format!("The requested operation is not supported: samepage has no {what}."))
    }

    /// What can be done before the start alone.
    pub(super) fn started() -> Self {
        Self::new("The requested operation is not supported after starting the microVM.")
    }

    /// What can be done after the start alone.
    pub(super) fn not_started() -> Self {
        Self::new("The requested operation is not supported before starting the microVM.")
    }
}
