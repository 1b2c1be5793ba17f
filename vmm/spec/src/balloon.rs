//! The description of the memory balloon.

use serde::{Deserialize, Serialize};

use crate::Size;
#[cfg(feature = "schema")]
use crate::size::schema::balloon as balloon_schema;
use crate::vm::PAGE_SIZE;

/// The longest time between two questions for statistics, in seconds.
pub const MAX_STATS_INTERVAL: u32 = 65_535;

/// The device by which the guest gives memory back to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct BalloonSpec {
    /// Whether the VM has the device.
    #[serde(default = "yes")]
    #[cfg_attr(feature = "schema", schema(default = true))]
    pub enabled: bool,
    /// The memory that the guest is to give up from its start on: whole pages of 4 KiB, and no more than it has.
    #[serde(default = "nothing")]
    #[cfg_attr(feature = "schema", schema(schema_with = balloon_schema))]
    pub size: Size,
    /// Whether the guest may take memory back before it kills a program for want of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest reports memory as it becomes free.
    #[serde(default = "yes")]
    #[cfg_attr(feature = "schema", schema(default = true))]
    pub reporting: bool,
    /// Whether the guest can be asked for hints at free memory.
    #[serde(default)]
    pub hinting: bool,
    /// The time between two questions for statistics of the guest's memory, in seconds. By default 0: the guest is
    /// asked once.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(maximum = 65_535))]
    pub stats_interval: u32,
}

fn yes() -> bool {
    true
}

fn nothing() -> Size {
    Size(0)
}

impl Default for BalloonSpec {
    /// An empty balloon of a guest that reports free memory.
    fn default() -> Self {
        Self {
            enabled: true,
            size: nothing(),
            deflate_on_oom: false,
            reporting: true,
            hinting: false,
            stats_interval: 0,
        }
    }
}

impl BalloonSpec {
    /// Returns values that are out of range for a VM with so much memory: the field, and the reason.
    #[must_use]
    pub fn faults(&self, memory: Size) -> Vec<(&'static str, String)> {
        let size = Self::fault_of_size(self.size, memory).map(|reason| ("size", reason));
        let interval = Self::fault_of_interval(self.stats_interval).map(|reason| ("stats_interval", reason));
        size.into_iter().chain(interval).collect()
    }

    /// Returns why a balloon of a VM with so much memory cannot have a size.
    #[must_use]
    pub fn fault_of_size(size: Size, memory: Size) -> Option<String> {
        let bytes = size.0;
        if !bytes.is_multiple_of(PAGE_SIZE as u64) {
            return Some(format!("a balloon of {bytes} bytes: use a multiple of {PAGE_SIZE}"));
        }
        (bytes > memory.0).then(|| {
            format!(
                "a balloon of {bytes} bytes: the VM has {} bytes of memory, use no more than that",
                memory.0
            )
        })
    }

    /// Returns why a guest cannot be asked for statistics that often.
    #[must_use]
    pub fn fault_of_interval(seconds: u32) -> Option<String> {
        (seconds > MAX_STATS_INTERVAL)
            .then(|| format!("statistics every {seconds} seconds: use 0 to {MAX_STATS_INTERVAL}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_is_empty_and_hears_reports_by_default() {
        let balloon = |json: &str| serde_json::from_str::<BalloonSpec>(json).unwrap();
        assert_eq!(balloon("{}"), BalloonSpec::default());
        assert_eq!(balloon(r#"{"size": "64M"}"#).size, Size(64 << 20));
        assert!(!balloon(r#"{"enabled": false}"#).enabled);
        assert!(serde_json::from_str::<BalloonSpec>(r#"{"amount": 1}"#).is_err());
    }

    #[test]
    fn sizes_and_intervals_are_bounded() {
        let fields = |size, stats_interval| {
            let balloon = BalloonSpec { size: Size(size), stats_interval, ..BalloonSpec::default() };
            balloon.faults(Size(8192)).into_iter().map(|(field, _)| field).collect::<Vec<_>>()
        };
        assert!(fields(8192, 65_535).is_empty());
        assert_eq!(fields(8191, 65_536), ["size", "stats_interval"]);
        assert_eq!(fields(12_288, 0), ["size"]);
    }
}
