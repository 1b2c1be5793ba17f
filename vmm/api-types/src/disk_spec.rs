//! What a disk is to be like, as clients and configuration files say it.

use std::path::PathBuf;

use samepage_spec::{CachePolicy, Format};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::spec::{Size, optional_rate_schema};

/// Most queues of a disk.
pub const MAX_QUEUES: usize = 16;

/// A virtual disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// An image file or a block device.
    #[schema(value_type = String, min_length = 1, example = "/srv/root.img")]
    pub path: PathBuf,
    /// The guest may not write.
    #[serde(default)]
    pub readonly: bool,
    /// Its name within the VM, which the guest sees as its serial number; `disk` and its number where
    /// none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^(\\.*[A-Za-z0-9_-][A-Za-z0-9._-]*|\\.{3,})$", min_length = 1, max_length = 20)]
    pub id: Option<String>,
    /// The image's format; found out where none is given, which is refused where it would be dangerous.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// What host memory holds of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CachePolicy>,
    /// What it may do a second.
    #[serde(default)]
    pub limits: LimitsSpec,
    /// How many queues the guest's driver is offered; one where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 16)]
    pub queues: Option<usize>,
}

/// What a disk may do a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsSpec {
    /// Bytes read and written; as many as there are where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = optional_rate_schema)]
    pub rate: Option<Size>,
    /// Requests; as many as there are where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub iops: Option<u64>,
}

impl DiskSpec {
    /// What a configuration cannot have: the field, and what it has to be.
    #[must_use]
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let queues = self.queues.filter(|queues| !(1..=MAX_QUEUES).contains(queues));
        let queues =
            queues.map(|queues| ("queues", format!("{queues} queues: a disk has 1 to {MAX_QUEUES}")));
        queues.into_iter().chain(self.limits.faults()).collect()
    }
}

impl LimitsSpec {
    /// Limits that let nothing through: the field, and what it has to be.
    #[must_use]
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let nothing = |unit: &str| format!("a limit of 0 {unit} a second lets nothing through");
        let rate = (self.rate == Some(Size(0))).then(|| ("limits/rate", nothing("bytes")));
        let iops = (self.iops == Some(0)).then(|| ("limits/iops", nothing("requests")));
        rate.into_iter().chain(iops).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_let_something_through() {
        let faults = |json: &str| serde_json::from_str::<DiskSpec>(json).unwrap().faults();
        assert!(faults(r#"{"path": "x", "queues": 0}"#)[0].1.contains("1 to"));
        let both = faults(r#"{"path": "x", "queues": 17, "limits": {"rate": 0, "iops": 0}}"#);
        assert_eq!(
            both.iter().map(|fault| fault.0).collect::<Vec<_>>(),
            ["queues", "limits/rate", "limits/iops"]
        );
        assert_eq!(faults(r#"{"path": "x", "limits": {"iops": 1}}"#), []);
    }
}
