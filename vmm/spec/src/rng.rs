//! The description of the entropy device.

use serde::{Deserialize, Serialize};

use crate::RateLimits;

/// The device from which the guest gets random bytes of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RngSpec {
    /// Whether the VM has the device.
    #[serde(default = "yes")]
    #[cfg_attr(feature = "schema", schema(default = true))]
    pub enabled: bool,
    /// Limits per second: random bytes, and requests for them.
    #[serde(default)]
    pub limits: RateLimits,
}

fn yes() -> bool {
    true
}

impl Default for RngSpec {
    fn default() -> Self {
        Self { enabled: true, limits: RateLimits::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_an_entropy_device_unless_it_is_off() {
        let rng = |json: &str| serde_json::from_str::<RngSpec>(json).unwrap();
        assert_eq!(rng("{}"), RngSpec::default());
        assert!(!rng(r#"{"enabled": false}"#).enabled);
        assert_eq!(rng(r#"{"limits": {"iops": 5}}"#).limits.iops, Some(5));
        assert!(serde_json::from_str::<RngSpec>(r#"{"on": true}"#).is_err());
    }
}
