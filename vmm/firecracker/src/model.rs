//! The types of requests and responses: the supported part of Firecracker's published API.

use std::collections::BTreeMap;
use std::path::PathBuf;

use samepage_spec::Mac;
use serde::{Deserialize, Serialize};

/// `/machine-config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MachineConfig {
    pub(super) vcpu_count: u8,
    pub(super) mem_size_mib: u64,
    #[serde(default)]
    pub(super) smt: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cpu_template: Option<String>,
    #[serde(default)]
    pub(super) track_dirty_pages: bool,
    #[serde(default)]
    pub(super) huge_pages: HugePagesConfig,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePagesConfig::None,
        }
    }
}

/// The host's pages for the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum HugePagesConfig {
    #[default]
    None,
    Transparent,
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// A change of `/machine-config`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MachineConfigUpdate {
    pub(super) vcpu_count: Option<u8>,
    pub(super) mem_size_mib: Option<u64>,
    pub(super) smt: Option<bool>,
    pub(super) cpu_template: Option<String>,
    pub(super) track_dirty_pages: Option<bool>,
    pub(super) huge_pages: Option<HugePagesConfig>,
}

/// `/boot-source`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BootSource {
    pub(super) kernel_image_path: PathBuf,
    #[serde(default)]
    pub(super) initrd_path: Option<PathBuf>,
    #[serde(default)]
    pub(super) boot_args: Option<String>,
}

/// `/drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Drive {
    pub(super) drive_id: String,
    #[serde(default)]
    pub(super) partuuid: Option<String>,
    pub(super) is_root_device: bool,
    #[serde(default)]
    pub(super) cache_type: CacheType,
    #[serde(default)]
    pub(super) is_read_only: Option<bool>,
    #[serde(default)]
    pub(super) path_on_host: Option<PathBuf>,
    #[serde(default)]
    pub(super) rate_limiter: Option<RateLimiter>,
    #[serde(default)]
    pub(super) io_engine: Option<IoEngine>,
    #[serde(default)]
    pub(super) socket: Option<PathBuf>,
}

/// Whether the guest flushes its writes. In samepage it always does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum CacheType {
    #[default]
    Unsafe,
    #[serde(alias = "WriteBack")]
    Writeback,
}

/// The way of reading images. samepage chooses the best one itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum IoEngine {
    Sync,
    Async,
}

/// A change of `/drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DriveUpdate {
    pub(super) drive_id: String,
    #[serde(default)]
    pub(super) path_on_host: Option<PathBuf>,
    #[serde(default)]
    pub(super) rate_limiter: Option<RateLimiter>,
}

/// The limits of a drive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RateLimiter {
    #[serde(default)]
    pub(super) bandwidth: Option<TokenBucket>,
    #[serde(default)]
    pub(super) ops: Option<TokenBucket>,
}

/// A bucket of `size` tokens that is filled in `refill_time` milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TokenBucket {
    pub(super) size: u64,
    #[serde(default)]
    pub(super) one_time_burst: Option<u64>,
    pub(super) refill_time: u64,
}

/// `/logger`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LoggerConfig {
    #[serde(default)]
    pub(super) log_path: Option<PathBuf>,
    #[serde(default)]
    pub(super) level: Option<String>,
    #[serde(default)]
    pub(super) show_level: Option<bool>,
    #[serde(default)]
    pub(super) show_log_origin: Option<bool>,
    #[serde(default)]
    pub(super) module: Option<String>,
}

/// `/metrics`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MetricsConfig {
    pub(super) metrics_path: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) emit_id: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) properties: Option<BTreeMap<String, String>>,
}

/// `/serial`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SerialConfig {
    #[serde(default)]
    pub(super) serial_out_path: Option<PathBuf>,
    #[serde(default)]
    pub(super) rate_limiter: Option<TokenBucket>,
}

/// `/network-interfaces/{iface_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NetworkInterface {
    pub(super) iface_id: String,
    pub(super) host_dev_name: String,
    #[serde(default)]
    pub(super) guest_mac: Option<Mac>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) mtu: Option<u16>,
    #[serde(default)]
    pub(super) rx_rate_limiter: Option<RateLimiter>,
    #[serde(default)]
    pub(super) tx_rate_limiter: Option<RateLimiter>,
}

/// A change of `/network-interfaces/{iface_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NetworkInterfaceUpdate {
    pub(super) iface_id: String,
    #[serde(default)]
    pub(super) rx_rate_limiter: Option<RateLimiter>,
    #[serde(default)]
    pub(super) tx_rate_limiter: Option<RateLimiter>,
}

/// `/vsock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VsockDevice {
    /// Deprecated by Firecracker, and without effect there too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) vsock_id: Option<String>,
    pub(super) guest_cid: u32,
    pub(super) uds_path: PathBuf,
}

/// `/entropy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EntropyDevice {
    #[serde(default)]
    pub(super) rate_limiter: Option<RateLimiter>,
}

/// `/actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ActionInfo {
    pub(super) action_type: ActionType,
}

/// The action on the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) enum ActionType {
    InstanceStart,
    SendCtrlAltDel,
    FlushMetrics,
}

/// `/vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VmUpdate {
    pub(super) state: WantedState,
}

/// The requested state of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) enum WantedState {
    Paused,
    Resumed,
}

/// `/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct InstanceInfo {
    pub(super) id: String,
    pub(super) state: InstanceState,
    pub(super) vmm_version: &'static str,
    pub(super) app_name: &'static str,
}

/// The present state of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum InstanceState {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}
