//! Limits of disks, between the API and the device.

use samepage_api_types::disk_spec::LimitsSpec;
use samepage_api_types::spec::Size;
use samepage_devices::disk::limit::RateLimits;

/// Returns the device's limits for those of a description.
#[must_use]
pub fn of_device(limits: LimitsSpec) -> RateLimits {
    RateLimits { bytes: limits.rate.map(|size| size.0), operations: limits.iops }
}

/// Returns the limits that clients see for those of a device.
#[must_use]
pub fn as_shown(limits: RateLimits) -> LimitsSpec {
    LimitsSpec { rate: limits.bytes.map(Size), iops: limits.operations }
}
