//! The metadata service of Firecracker (MMDS): a guest reads JSON that the VM's owner has written.
//!
//! ```text
//! guest ── virtio-net ── Detour ── TCP/IP (smoltcp) ── HTTP ── data
//!                          │
//!                          └─ all other frames go to the link
//! ```
//!
//! The service has an address of its own (169.254.169.254) on the guest's network, which nothing outside the host's
//! process sees. It speaks HTTP on port 80. Version 2 gives data only to those who show a token, which they get for a
//! request that no proxy passes on.
//!
//! # Bounds
//! A guest is hostile. What it can take of the host is bounded: data ([`Metadata::new`]), connections and their buffers,
//! bytes of a request, and frames that wait for the guest ([`network`]). Tokens take nothing, since they prove themselves
//! ([`tokens`]). A connection without a whole request ends after a time.
//!
//! Source: Firecracker's docs/mmds and its published API.

mod http;
mod network;
mod store;
#[cfg(test)]
mod tests;
mod tokens;

use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

use parking_lot::Mutex;
pub use samepage_devices::net::Detour;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use network::Network;
use store::Store;
pub use store::StoreError;
use tokens::Tokens;

/// The service's address where no other one is configured.
pub const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Upper limit for the data where no other one is configured, in bytes of JSON: Firecracker's.
pub const DEFAULT_BYTES: usize = 51_200;

/// Who may read the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Version {
    /// All programs of the guest.
    #[default]
    V1,
    /// Programs that show a token.
    V2,
}

/// The metadata of one VM. Its owner and its guest use it at the same time.
pub struct Metadata {
    state: Mutex<State>,
    tokens: Tokens,
}

struct State {
    store: Store,
    version: Version,
    /// Whether answers are text, whatever a request accepts.
    is_text_only: bool,
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Tokens and data are nobody else's business.
        f.debug_struct("Metadata").finish_non_exhaustive()
    }
}

impl Metadata {
    /// Returns a service without data, for a VM with this name. Data may take `bytes` of JSON.
    ///
    /// # Errors
    /// Fails if the kernel has no random bytes.
    pub fn new(vm: &str, bytes: usize) -> io::Result<Arc<Self>> {
        let state = State { store: Store::new(bytes), version: Version::V1, is_text_only: false };
        Ok(Arc::new(Self { state: Mutex::new(state), tokens: Tokens::new(vm)? }))
    }

    /// Says who may read the data, and whether each answer is text.
    pub fn configure(&self, version: Version, is_text_only: bool) {
        let mut state = self.state.lock();
        (state.version, state.is_text_only) = (version, is_text_only);
    }

    /// Replaces the data.
    ///
    /// # Errors
    /// Fails if they are too long. Then the old data stay.
    pub fn put(&self, data: Value) -> Result<(), StoreError> {
        self.state.lock().store.put(data)
    }

    /// Merges a patch into the data (RFC 7396).
    ///
    /// # Errors
    /// Fails if there are no data, or if they would become too long. Then the old data stay.
    pub fn patch(&self, patch: &Value) -> Result<(), StoreError> {
        self.state.lock().store.patch(patch)
    }

    /// Returns the data; null if there are none.
    pub fn data(&self) -> Value {
        self.state.lock().store.data().clone()
    }

    /// Returns the service at this address for one network device.
    pub fn at(self: &Arc<Self>, address: Ipv4Addr) -> Box<dyn Detour> {
        Box::new(Network::new(self.clone(), address))
    }
}
