//! Answers about all VMs, written once for many clients: with many VMs, writing them is most of the work.
//!
//! An answer is written anew when something that it tells may have come about, and otherwise after
//! [`LONGEST`]: it has counters that go on all the time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use parking_lot::Mutex;

use crate::sampling::Seen;

/// For how long an answer is given to those who ask.
const LONGEST: Duration = Duration::from_millis(20);

/// An answer as it was written last.
#[derive(Debug, Default)]
pub(super) struct Rendered(Mutex<Option<Written>>);

#[derive(Debug)]
struct Written {
    seen: Option<Arc<Seen>>,
    revision: u64,
    at: Instant,
    bytes: Bytes,
}

impl Rendered {
    /// The answer that follows from what was seen, and from what the VMs were at a revision that was asked
    /// for before anything else.
    pub(super) fn get<E>(
        &self,
        seen: Option<&Arc<Seen>>,
        revision: u64,
        write: impl FnOnce() -> Result<Bytes, E>,
    ) -> Result<Bytes, E> {
        self.get_at(Instant::now(), seen, revision, write)
    }

    fn get_at<E>(
        &self,
        now: Instant,
        seen: Option<&Arc<Seen>>,
        revision: u64,
        write: impl FnOnce() -> Result<Bytes, E>,
    ) -> Result<Bytes, E> {
        let is_same = |written: &&Written| {
            now < written.at + LONGEST
                && written.revision == revision
                && written.seen.as_ref().map(Arc::as_ptr) == seen.map(Arc::as_ptr)
        };
        if let Some(written) = self.0.lock().as_ref().filter(is_same) {
            return Ok(written.bytes.clone());
        }
        let bytes = write()?;
        // What was seen is kept: nothing else can come to lie where it is.
        *self.0.lock() = Some(Written { seen: seen.cloned(), revision, at: now, bytes: bytes.clone() });
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_written_anew_when_it_may_have_changed() {
        let rendered = Rendered::default();
        let start = Instant::now();
        let get = |at, revision, text: &'static str| {
            let write = || Ok::<_, ()>(Bytes::from_static(text.as_bytes()));
            rendered.get_at(at, None, revision, write).unwrap()
        };
        assert_eq!(get(start, 1, "first"), "first");
        assert_eq!(get(start, 1, "second"), "first");
        assert_eq!(get(start, 2, "third"), "third");
        assert_eq!(get(start + LONGEST, 2, "fourth"), "fourth");
        // One that could not be written is not kept.
        assert_eq!(rendered.get(None, 3, || Err("no")), Err("no"));
        assert_eq!(get(start, 3, "fifth"), "fifth");
    }
}
