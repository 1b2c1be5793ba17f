//! Responses about all VMs, serialized once for many clients: with many VMs, most of the work is to serialize.
//!
//! A response is serialized again when its content may have changed, and otherwise after [`MAX_AGE`]: its
//! counters change all the time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use parking_lot::Mutex;

use crate::sampling::CachedSample;

/// How old a cached response may be.
const MAX_AGE: Duration = Duration::from_millis(20);

/// The last response to one kind of request.
#[derive(Debug, Default)]
pub(super) struct ResponseCache(Mutex<Option<CachedResponse>>);

#[derive(Debug)]
struct CachedResponse {
    seen: Option<Arc<CachedSample>>,
    revision: u64,
    at: Instant,
    bytes: Bytes,
}

impl ResponseCache {
    /// Returns the cached response if it belongs to this sample and to this revision of the registry, or has
    /// `write` serialize another one. The caller reads the revision before anything else.
    ///
    /// # Errors
    /// Fails if `write` fails; then nothing is cached.
    pub(super) fn get<E>(
        &self,
        seen: Option<&Arc<CachedSample>>,
        revision: u64,
        write: impl FnOnce() -> Result<Bytes, E>,
    ) -> Result<Bytes, E> {
        self.get_at(Instant::now(), seen, revision, write)
    }

    fn get_at<E>(
        &self,
        now: Instant,
        seen: Option<&Arc<CachedSample>>,
        revision: u64,
        write: impl FnOnce() -> Result<Bytes, E>,
    ) -> Result<Bytes, E> {
        let is_same = |written: &&CachedResponse| {
            now < written.at + MAX_AGE
                && written.revision == revision
                && written.seen.as_ref().map(Arc::as_ptr) == seen.map(Arc::as_ptr)
        };
        if let Some(written) = self.0.lock().as_ref().filter(is_same) {
            return Ok(written.bytes.clone());
        }
        let bytes = write()?;
        // The sample is kept, so that no other one can get its address.
        *self.0.lock() =
            Some(CachedResponse { seen: seen.cloned(), revision, at: now, bytes: bytes.clone() });
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_is_serialized_again_when_it_may_have_changed() {
        let response_cache = ResponseCache::default();
        let start = Instant::now();
        let get = |at, revision, text: &'static str| {
            let write = || Ok::<_, ()>(Bytes::from_static(text.as_bytes()));
            response_cache.get_at(at, None, revision, write).unwrap()
        };
        assert_eq!(get(start, 1, "first"), "first");
        assert_eq!(get(start, 1, "second"), "first");
        assert_eq!(get(start, 2, "third"), "third");
        assert_eq!(get(start + MAX_AGE, 2, "fourth"), "fourth");
        // A response that cannot be serialized is not cached.
        assert_eq!(response_cache.get(None, 3, || Err("no")), Err("no"));
        assert_eq!(get(start, 3, "fifth"), "fifth");
    }
}
