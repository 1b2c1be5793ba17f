//! The views of a VM's devices other than disks.

use std::sync::atomic::Ordering::Relaxed;

use samepage_api_types::views::devices::RngStatistics;
use samepage_devices::virtio::rng::RngStats;

use super::Shown;

impl Shown<RngStatistics> for &RngStats {
    fn shown(self) -> RngStatistics {
        RngStatistics {
            requests: self.requests.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            throttled: self.throttled.load(Relaxed),
            errors: self.errors.load(Relaxed),
        }
    }
}
