//! What the API answers.
//!
//! Pages are of 4 KiB and amounts of memory in bytes. Fields whose names end in `time_seconds` are dates, in
//! seconds since 1970; all others that end in `_seconds` are lengths of time. Fields that say what was counted are
//! in the terms of the kernel's KSM, as in the lines of `--stats`.

pub mod devices;
pub mod memory;
pub mod pages;

use crate::lifecycle::{Action, State};
use devices::{BalloonView, NetworkView, RngStatistics, VsockStatistics};
use samepage_spec::{CachePolicy, RateLimits, SharingMode, VmSpec};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Counters of the engine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EngineView {
    /// Frames in use by two or more guest pages.
    pub pages_shared: u64,
    /// Further guest pages mapped to those frames: what is saved.
    pub pages_sharing: u64,
    /// Pages that were scanned and are unique.
    pub pages_unshared: u64,
    /// Pages that changed since the previous pass.
    pub pages_volatile: u64,
    /// Guest pages of zeros whose memory is freed.
    pub zero_pages: u64,
    /// Complete passes over all VMs.
    pub full_scans: u64,
    /// Frames in use, including those with a single sharer.
    pub frames: u64,
    /// Pages scanned since the start.
    pub pages_scanned: u64,
    /// Pages mapped to frames since the start.
    pub merges: u64,
    /// Merges of neighbours of a matching page.
    pub merges_lookahead: u64,
    /// Merges in runs that began with a hint of a disk.
    pub merges_hinted: u64,
    /// Merged pages that left their frames after a write, since the start.
    pub breaks: u64,
    /// Runs not merged since the start, because no mappings were left.
    pub mappings_denied: u64,
    /// System calls that failed since the start, without harm to guests.
    pub refusals: u64,
    /// Memory of the frames, in bytes, as the kernel charges it.
    pub store_bytes: u64,
    /// Memory of the engine's metadata, in bytes.
    pub metadata_bytes: u64,
    /// Mappings of the VMs' memory.
    pub guest_mappings: u64,
    /// Mappings of the process.
    pub mappings: u64,
    /// The kernel's limit for mappings of a process (`vm.max_map_count`).
    pub mappings_limit: u64,
    /// The longest time for which writers to a run of pages had to wait, in microseconds.
    pub longest_window_us: u64,
    /// Groups for which sharing has stopped.
    pub groups_stopped: u64,
    /// CPU time of the engine's threads since the start, in seconds.
    pub cpu_seconds: f64,
}

/// Counters of one VM's memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmMemoryView {
    /// Pages of RAM.
    pub pages: u64,
    /// Shared frames, each counted by the part that this VM holds.
    pub pages_shared: u64,
    /// Pages that sharing saves for this VM: each of n sharers of a frame saves 1 - 1/n of a page.
    pub pages_sharing: u64,
    /// Pages mapped to frames.
    pub pages_merged: u64,
    /// Pages that were scanned and are unique.
    pub pages_unshared: u64,
    /// Pages that changed since the previous pass.
    pub pages_volatile: u64,
    /// Pages of zeros whose memory is freed.
    pub zero_pages: u64,
    /// Private pages.
    pub pages_private: u64,
    /// Huge pages that back the RAM.
    pub huge_whole: u64,
    /// Huge pages that were split, so that parts of them could be shared.
    pub huge_split: u64,
    /// Mappings of the RAM.
    pub mappings: u64,
}

/// A VM in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmSummary {
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: State,
    /// When the VM came into this state, in seconds since 1970.
    pub since_time_seconds: f64,
    /// Why the VM has ended; absent before its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its memory.
    pub memory_bytes: u64,
    /// Number of its vCPUs.
    pub vcpus: u32,
    /// The number of the worker process that holds the VM; absent if the VM is in the process of the API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<u32>,
    /// The group of VMs with which it shares memory.
    pub group: String,
    /// Which pages are shared. Always `off` if this process shares no memory.
    pub mode: SharingMode,
    /// Why sharing has stopped for the VM or its group; absent while it works.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sharing_stopped: Option<String>,
    /// Memory that the VM takes of the host: its private pages, and its share of each frame. Absent before the
    /// first sample and after the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_bytes: Option<u64>,
    /// Memory that sharing saves for this VM, including pages of zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved_bytes: Option<u64>,
    /// Memory of the pages that are mapped to frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_bytes: Option<u64>,
    /// Private pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_bytes: Option<u64>,
    /// Pages of zeros whose memory is freed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_bytes: Option<u64>,
    /// With this much more memory, the VM would save 95 % of the disk reads that memory can save. Absent before
    /// the VM has read through the block cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted_bytes: Option<u64>,
    /// CPU time of the vCPUs since the last boot; absent after the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_seconds: Option<f64>,
    /// Bytes that the disks read and wrote since then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io: Option<IoView>,
}

/// Bytes that disks read, by source, and wrote. Reads from the guest's own page cache do not count.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct IoView {
    /// Read from the memory of a guest in the group.
    pub from_guests_bytes: u64,
    /// Read from the block cache.
    pub from_host_bytes: u64,
    /// Read from the image.
    pub from_disk_bytes: u64,
    /// Written.
    pub written_bytes: u64,
}

/// Counters of the block cache, in blocks of 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CacheCounters {
    /// Cached blocks, which no guest holds.
    pub blocks_cached: u64,
    /// Upper limit for cached blocks, in all groups together.
    pub blocks_limit: u64,
    /// Frames with blocks that guests map.
    pub blocks_in_guests: u64,
    /// Recorded copies of blocks in guest pages.
    pub blocks_noted: u64,
    /// Blocks read from the memory of a guest, since the start.
    pub served_from_guests: u64,
    /// Blocks read from the cache, since the start.
    pub served_from_host: u64,
    /// Blocks read from images into the cache, since the start.
    pub fetched: u64,
    /// Blocks read from images past a full cache, since the start.
    pub past: u64,
    /// Blocks that were mapped into guests, since the start.
    pub delivered_mapped: u64,
    /// Blocks that were copied into guests, since the start.
    pub delivered_copied: u64,
    /// Mapped blocks that became cached when the last guest left their frame, since the start.
    pub demoted_mapped: u64,
    /// Copied blocks that became cached, because a guest's page still held them, since the start.
    pub demoted_copied: u64,
    /// Guest pages that no longer held the block that was copied to them, since the start.
    pub refuted: u64,
    /// Cached blocks that were evicted, since the start.
    pub evicted: u64,
    /// Writes to blocks that the cache or a guest held, since the start.
    pub overwritten: u64,
    /// Memory of the cache's metadata, in bytes.
    pub metadata_bytes: u64,
}

/// The host's cache of disk blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CacheView {
    /// Whether the process has a block cache. It belongs to the engine that shares memory.
    pub enabled: bool,
    /// When the sample was taken.
    pub time_seconds: f64,
    /// Memory of the cached blocks, which no guest holds.
    pub cached_bytes: u64,
    /// Upper limit for cached blocks.
    pub limit_bytes: u64,
    /// Memory of blocks that guests map. The host has no other copy of them.
    pub in_guests_bytes: u64,
    /// Bytes that guests read through the cache since the start, by source.
    pub sources: CacheSources,
    /// Counters of the cache.
    pub statistics: CacheCounters,
}

/// Bytes that guests read through the block cache, by source. Reads from the guest's own page cache do not
/// count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CacheSources {
    /// Read from the memory of a guest in the group.
    pub guests_bytes: u64,
    /// Read from the block cache.
    pub host_bytes: u64,
    /// Read from the image, into the cache or past it.
    pub disk_bytes: u64,
}

/// How many disk reads more memory would save a VM. Old reads count less than recent ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WorkingSetView {
    /// The VM's memory.
    pub memory_bytes: u64,
    /// When the sample was taken; absent after the VM's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_seconds: Option<f64>,
    /// With this much more memory, the VM would save 95 % of the reads that memory can save. Absent before the
    /// VM has read through the block cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted_bytes: Option<u64>,
    /// The part of the reads that no memory saves, from 0 to 1: first reads of blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unavoidable: Option<f64>,
    /// The part of the reads that is left, as a function of additional memory: points, linear in between.
    pub curve: Vec<CurvePoint>,
}

/// A point of a curve of misses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CurvePoint {
    /// Additional memory.
    pub more_bytes: u64,
    /// The part of the reads that is left, from 1 down.
    pub reads_left: f64,
}

/// Two VMs, and the memory that they share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PairView {
    /// The names of the VMs.
    #[schema(min_items = 2, max_items = 2)]
    pub vms: Vec<String>,
    /// Pages of content that are in memory once for both: an estimate from up to some thousand frames.
    pub pages: u64,
    /// The standard error of the estimate; 0 if all frames were counted.
    pub pages_error: u64,
}

/// A VM in detail.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmView {
    /// The entry of the VM in lists.
    #[serde(flatten)]
    pub summary: VmSummary,
    /// The actions that the VM's state allows.
    pub actions: Vec<Action>,
    /// The description from which the VM was created.
    pub config: VmSpec,
    /// Counters of the console since the last boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleView>,
    /// Its disks.
    pub disks: Vec<DiskView>,
    /// Its network devices.
    pub networks: Vec<NetworkView>,
    /// Counters of its socket device since the last boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockStatistics>,
    /// Counters of its entropy device since the last boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rng: Option<RngStatistics>,
    /// Its memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonView>,
}

/// Counters of a console.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ConsoleView {
    /// Bytes that the guest wrote.
    pub sent_bytes: u64,
    /// Bytes of the guest that were dropped, because nobody read them.
    pub lost_bytes: u64,
    /// Typed bytes that the guest read.
    pub received_bytes: u64,
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskView {
    /// The name of the disk within the VM.
    pub id: String,
    /// The image file or block device.
    pub path: String,
    /// Whether the disk is read-only.
    pub readonly: bool,
    /// The size that the guest sees; absent after the VM's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Which of its blocks the host keeps in memory, and where.
    pub cache: CachePolicy,
    /// Limits per second.
    pub limits: RateLimits,
    /// Remarks on how the image is accessed, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<String>,
    /// Counters since the last boot; absent after the VM's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics: Option<DiskStatistics>,
}

/// Counters of a disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskStatistics {
    /// Read requests that succeeded.
    pub reads: u64,
    /// Write requests that succeeded.
    pub writes: u64,
    /// Flush requests that succeeded.
    pub flushes: u64,
    /// Bytes of successful reads.
    pub read_bytes: u64,
    /// Bytes of successful writes.
    pub written_bytes: u64,
    /// Blocks read from the memory of guests.
    pub blocks_from_guests: u64,
    /// Blocks read from the block cache.
    pub blocks_from_host: u64,
    /// Blocks read from the image through the cache.
    pub blocks_fetched: u64,
    /// Requests that were delayed by the disk's limits.
    pub throttled: u64,
    /// Requests that failed.
    pub errors: u64,
    /// The last error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// How a VM takes part in sharing memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmSharingView {
    /// The group of VMs with which it shares memory.
    pub group: String,
    /// Which pages are shared. Always `off` if this process shares no memory.
    pub mode: SharingMode,
    /// When the sample was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_seconds: Option<f64>,
    /// Memory that the VM takes of the host: its private pages, and its share of each frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_bytes: Option<u64>,
    /// Counters of the memory; absent before the first sample and after the VM's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics: Option<VmMemoryView>,
}

/// The engine that shares memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SharingView {
    /// Whether memory is shared in this process.
    pub enabled: bool,
    /// The settings that the engine was started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<SettingsView>,
    /// When the sample was taken.
    pub time_seconds: f64,
    /// Sum of the VMs' memory.
    pub guest_bytes: u64,
    /// Memory that the process takes: its private pages, and each frame once.
    pub resident_bytes: u64,
    /// Private pages among these.
    pub private_bytes: u64,
    /// Memory that sharing saves, minus `overhead_bytes`; 0 if the overhead is larger.
    pub saved_bytes: u64,
    /// Overhead of sharing: the engine's metadata, and the kernel's for mappings and page tables.
    pub overhead_bytes: u64,
    /// Counters of the engine.
    pub statistics: EngineView,
    /// The groups within which VMs share.
    pub groups: Vec<GroupView>,
    /// The ten pairs of VMs that share most.
    pub pairs: Vec<PairView>,
    /// What each worker process takes. Their private pages are part of the figures above.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<WorkerView>,
}

/// A worker process, which holds VMs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WorkerView {
    /// The number of the process.
    pub process: u32,
    /// Its private pages: the guests' and the program's.
    pub private_bytes: u64,
    /// Its CPU time so far, with that of the vCPUs.
    pub cpu_seconds: f64,
}

/// Settings of the engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SettingsView {
    /// Average CPU time for the search for identical pages, in percent of one core.
    pub cpu_percent: f64,
    /// Whether the neighbours of a matching page are compared before any search.
    pub lookahead: bool,
    /// The order of the indexes: `digest` or `content`.
    pub order: String,
    /// Whether the engine scans changed pages only.
    pub follow: bool,
}

/// One group of VMs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GroupView {
    /// Its name.
    pub name: String,
    /// Whether sharing has stopped for the group. Its VMs continue, and no more pages are merged.
    #[serde(default)]
    pub stopped: bool,
    /// Frames in use by two or more guest pages.
    pub pages_shared: u64,
    /// Further guest pages mapped to those frames.
    pub pages_sharing: u64,
    /// Guest pages of zeros whose memory is freed.
    pub zero_pages: u64,
    /// Pages mapped to frames since the group was created.
    pub merges: u64,
    /// Memory that sharing saves, minus `overhead_bytes`; 0 if the overhead is larger.
    pub saved_bytes: u64,
    /// Overhead of sharing: the engine's metadata, and the kernel's for mappings and page tables.
    pub overhead_bytes: u64,
}
