//! The page's data about one moment: sizes in bytes, times in seconds since 1970.

use samepage_api_types::views::{CacheView, EngineView, IoView};
use serde::{Deserialize, Serialize};

/// A point of the chart over time.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Line {
    pub(super) time: f64,
    pub(super) enabled: bool,
    pub(super) guest: u64,
    pub(super) resident: u64,
    pub(super) private: u64,
    pub(super) saved: u64,
    pub(super) engine: EngineFrame,
    pub(super) cache: CacheFrame,
}

/// The complete state at a moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Frame {
    #[serde(flatten)]
    pub(super) line: Line,
    pub(super) vms: Vec<VmFrame>,
    pub(super) pairs: Vec<PairFrame>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct EngineFrame {
    cpu_seconds: f64,
    pages_scanned: u64,
    merges: u64,
}

impl From<&EngineView> for EngineFrame {
    fn from(engine: &EngineView) -> Self {
        let EngineView { cpu_seconds, pages_scanned, merges, .. } = *engine;
        Self { cpu_seconds, pages_scanned, merges }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct CacheFrame {
    pub(super) cached: u64,
    pub(super) limit: u64,
    pub(super) in_guests: u64,
    pub(super) guests: u64,
    pub(super) host: u64,
    pub(super) disk: u64,
}

impl From<&CacheView> for CacheFrame {
    fn from(cache: &CacheView) -> Self {
        Self {
            cached: cache.cached_bytes,
            limit: cache.limit_bytes,
            in_guests: cache.in_guests_bytes,
            guests: cache.sources.guests_bytes,
            host: cache.sources.host_bytes,
            disk: cache.sources.disk_bytes,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct VmFrame {
    pub(super) name: String,
    pub(super) state: String,
    pub(super) reason: Option<String>,
    pub(super) group: Option<String>,
    pub(super) memory: u64,
    pub(super) resident: Option<u64>,
    pub(super) saved: Option<u64>,
    pub(super) shared: Option<u64>,
    pub(super) private: Option<u64>,
    pub(super) zero: Option<u64>,
    pub(super) wanted: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cpu_seconds: Option<f64>,
    pub(super) io: Option<IoFrame>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct IoFrame {
    guests: u64,
    host: u64,
    disk: u64,
}

impl From<&IoView> for IoFrame {
    fn from(io: &IoView) -> Self {
        Self { guests: io.from_guests_bytes, host: io.from_host_bytes, disk: io.from_disk_bytes }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct PairFrame {
    pub(super) vms: [String; 2],
    pub(super) pages: u64,
    pub(super) error: u64,
}
