//! `/balloon`: the memory balloon.

use samepage_api_types::views::devices::{BalloonView, GuestMemoryView};
use samepage_spec::{BalloonSpec, Size};
use samepage_worker::machine::DeviceChange;
use serde::{Deserialize, Serialize};

use super::controller::Controller;
use super::fault::Fault;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// `/balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BalloonDevice {
    amount_mib: u32,
    deflate_on_oom: bool,
    #[serde(default)]
    stats_polling_interval_s: u16,
    #[serde(default)]
    free_page_hinting: bool,
    #[serde(default)]
    free_page_reporting: bool,
}

impl BalloonDevice {
    /// Returns the device of a VM.
    pub(super) fn spec(self) -> BalloonSpec {
        BalloonSpec {
            enabled: true,
            size: size(self.amount_mib),
            deflate_on_oom: self.deflate_on_oom,
            reporting: self.free_page_reporting,
            hinting: self.free_page_hinting,
            stats_interval: self.stats_polling_interval_s.into(),
        }
    }
}

fn size(mebibytes: u32) -> Size {
    Size(u64::from(mebibytes) * MIB)
}

/// A change of `/balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BalloonUpdate {
    amount_mib: u32,
}

/// A change of `/balloon/statistics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BalloonStatsUpdate {
    stats_polling_interval_s: u16,
}

/// `/balloon/hinting/start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StartHinting {
    #[serde(default = "yes")]
    acknowledge_on_stop: bool,
}

fn yes() -> bool {
    true
}

impl Default for StartHinting {
    fn default() -> Self {
        Self { acknowledge_on_stop: true }
    }
}

/// `/balloon/hinting/status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct HintingStatus {
    host_cmd: u32,
    guest_cmd: Option<u32>,
}

/// `/balloon/statistics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct BalloonStats {
    target_pages: u64,
    actual_pages: u64,
    target_mib: u64,
    actual_mib: u64,
    #[serde(flatten)]
    guest: GuestStats,
}

/// What the guest tells of its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct GuestStats {
    #[serde(skip_serializing_if = "Option::is_none")]
    swap_in: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    swap_out: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    major_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    minor_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    free_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    available_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_caches: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hugetlb_allocations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hugetlb_failures: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    oom_kill: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alloc_stall: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    async_scan: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    direct_scan: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    async_reclaim: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    direct_reclaim: Option<u64>,
}

impl From<GuestMemoryView> for GuestStats {
    fn from(guest: GuestMemoryView) -> Self {
        Self {
            swap_in: guest.swapped_in_bytes,
            swap_out: guest.swapped_out_bytes,
            major_faults: guest.major_faults,
            minor_faults: guest.minor_faults,
            free_memory: guest.free_bytes,
            total_memory: guest.total_bytes,
            available_memory: guest.available_bytes,
            disk_caches: guest.cache_bytes,
            hugetlb_allocations: guest.huge_allocations,
            hugetlb_failures: guest.huge_failures,
            oom_kill: guest.oom_kills,
            alloc_stall: guest.stalls,
            async_scan: guest.async_scanned_pages,
            direct_scan: guest.direct_scanned_pages,
            async_reclaim: guest.async_reclaimed_pages,
            direct_reclaim: guest.direct_reclaimed_pages,
        }
    }
}

impl From<BalloonView> for BalloonStats {
    fn from(balloon: BalloonView) -> Self {
        let (target, actual) = (balloon.size_bytes, balloon.actual_bytes.unwrap_or(0));
        Self {
            target_pages: target / PAGE,
            actual_pages: actual / PAGE,
            target_mib: target / MIB,
            actual_mib: actual / MIB,
            guest: balloon.guest.map(GuestStats::from).unwrap_or_default(),
        }
    }
}

/// The refusal of a request about a device that does not exist.
fn no_balloon() -> Fault {
    Fault::new("No balloon device found.")
}

impl Controller {
    fn running_balloon(&mut self) -> Result<&mut BalloonDevice, Fault> {
        self.after_start()?;
        self.balloon.as_mut().ok_or_else(no_balloon)
    }

    /// Returns the device as it is now, if its guest can be asked for hints.
    fn hinting(&mut self) -> Result<BalloonView, Fault> {
        if !self.running_balloon()?.free_page_hinting {
            return Err(Fault::new(
                "Free page hinting is not enabled: set free_page_hinting when the balloon is created.",
            ));
        }
        self.machine.balloon()
    }

    pub(super) fn balloon(&self) -> Result<BalloonDevice, Fault> {
        self.balloon.ok_or_else(no_balloon)
    }

    pub(super) fn set_balloon(&mut self, device: BalloonDevice) -> Result<(), Fault> {
        self.before_start()?;
        self.balloon = Some(device);
        Ok(())
    }

    pub(super) fn change_balloon(&mut self, change: BalloonUpdate) -> Result<(), Fault> {
        self.running_balloon()?;
        self.machine.change_balloon(DeviceChange::BalloonSize(size(change.amount_mib)))?;
        self.running_balloon()?.amount_mib = change.amount_mib;
        Ok(())
    }

    pub(super) fn balloon_stats(&mut self) -> Result<BalloonStats, Fault> {
        if self.running_balloon()?.stats_polling_interval_s == 0 {
            return Err(Fault::new("Received stats query when stats are disabled."));
        }
        self.machine.balloon().map(BalloonStats::from)
    }

    pub(super) fn change_balloon_stats(&mut self, change: BalloonStatsUpdate) -> Result<(), Fault> {
        let seconds = change.stats_polling_interval_s;
        let balloon = self.running_balloon()?;
        if balloon.stats_polling_interval_s == seconds {
            return Ok(());
        }
        if balloon.stats_polling_interval_s == 0 || seconds == 0 {
            return Err(Fault::new("Statistics cannot be enabled/disabled after activation."));
        }
        self.machine.change_balloon(DeviceChange::BalloonStatsInterval(seconds.into()))?;
        self.running_balloon()?.stats_polling_interval_s = seconds;
        Ok(())
    }

    pub(super) fn start_hinting(&mut self, start: StartHinting) -> Result<(), Fault> {
        self.hinting()?;
        self.machine.change_balloon(DeviceChange::BalloonHints(start.acknowledge_on_stop))
    }

    pub(super) fn stop_hinting(&mut self) -> Result<(), Fault> {
        self.hinting()?;
        self.machine.change_balloon(DeviceChange::BalloonHintsEnd)
    }

    pub(super) fn hinting_status(&mut self) -> Result<HintingStatus, Fault> {
        let hints = self.hinting()?.hints.unwrap_or_default();
        Ok(HintingStatus { host_cmd: hints.host, guest_cmd: hints.guest })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn statistics_have_firecrackers_names_and_lack_what_a_guest_does_not_tell() {
        let guest = GuestMemoryView { free_bytes: Some(5), stalls: Some(1), ..GuestMemoryView::default() };
        let balloon = BalloonView {
            size_bytes: 3 << 20,
            actual_bytes: Some((2 << 20) + 4096),
            active: Some(true),
            deflate_on_oom: false,
            reporting: false,
            hinting: false,
            stats_interval: 1,
            hints: None,
            statistics: None,
            guest: Some(guest),
        };
        let expected = json!({
            "target_pages": 768, "actual_pages": 513, "target_mib": 3, "actual_mib": 2, "free_memory": 5,
            "alloc_stall": 1,
        });
        assert_eq!(serde_json::to_value(BalloonStats::from(balloon)).unwrap(), expected);
    }
}
