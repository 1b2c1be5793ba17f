//! What the API answers.
//!
//! Pages are of 4 KiB and amounts of memory in bytes. Fields whose names end in `time_seconds` are dates, in
//! seconds since 1970; all others that end in `_seconds` are lengths of time. Fields that say what was counted are
//! in the terms of the kernel's KSM, as in the lines of `--stats`.

pub mod pages;

use crate::disk_spec::LimitsSpec;
use crate::lifecycle::{Action, State};
use crate::spec::VmSpec;
use samepage_spec::CachePolicy;
use samepage_spec::SharingMode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What the engine counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EngineView {
    /// Frames in use by two or more guest pages.
    pub pages_shared: u64,
    /// Further guest pages mapped to those frames: what is saved.
    pub pages_sharing: u64,
    /// Pages looked at and found unique.
    pub pages_unshared: u64,
    /// Pages that changed since the pass before.
    pub pages_volatile: u64,
    /// Guest pages of zeros whose memory was given back.
    pub zero_pages: u64,
    /// Complete passes over all VMs.
    pub full_scans: u64,
    /// Frames in use, with those of a single sharer.
    pub frames: u64,
    /// Pages looked at since the start.
    pub pages_scanned: u64,
    /// Pages mapped to frames since the start.
    pub merges: u64,
    /// Of those, the ones found as neighbours of a page that matched.
    pub merges_lookahead: u64,
    /// Of all merges, those whose runs a device's hint began.
    pub merges_hinted: u64,
    /// Merged pages that were written to and left their frames since the start.
    pub breaks: u64,
    /// Runs not merged for want of mappings since the start.
    pub mappings_denied: u64,
    /// Calls of the kernel that failed since the start; guests are whole.
    pub refusals: u64,
    /// Bytes that the kernel charges for the frames.
    pub store_bytes: u64,
    /// Bytes that the engine's books take.
    pub metadata_bytes: u64,
    /// Mappings that the VMs' memory is made of.
    pub guest_mappings: u64,
    /// Mappings of the process.
    pub mappings: u64,
    /// The kernel's limit on them.
    pub mappings_limit: u64,
    /// The longest time for which writers to a run of pages were made to wait, in microseconds.
    pub longest_window_us: u64,
    /// Groups for which sharing has stopped.
    pub groups_stopped: u64,
    /// CPU time of the sharing threads until now, in seconds.
    pub cpu_seconds: f64,
}

/// What is counted of one VM's memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmMemoryView {
    /// Pages of its RAM.
    pub pages: u64,
    /// Its pages on frames that it shares, counting each frame once for its share.
    pub pages_shared: u64,
    /// Pages that sharing saves by this VM: each of n sharers of a frame saves 1 - 1/n of a page.
    pub pages_sharing: u64,
    /// Its pages that are mapped to frames.
    pub pages_merged: u64,
    /// Its pages looked at and found unique.
    pub pages_unshared: u64,
    /// Its pages that changed since the pass before.
    pub pages_volatile: u64,
    /// Its pages of zeros whose memory was given back.
    pub zero_pages: u64,
    /// Its pages that take memory of their own.
    pub pages_private: u64,
    /// Huge pages that back a part of them.
    pub huge_whole: u64,
    /// Its huge pages that were split, to share parts of them.
    pub huge_split: u64,
    /// Mappings of its RAM.
    pub mappings: u64,
}

/// A VM in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmSummary {
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: State,
    /// Since when it has been in that state, in seconds since 1970.
    pub since_time_seconds: f64,
    /// Why it has ended, if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its memory.
    pub memory_bytes: u64,
    /// The group that it shares memory with.
    pub group: String,
    /// What of its memory is shared: nothing where this process shares none, whatever its configuration says.
    pub mode: SharingMode,
    /// Why sharing has stopped for its group, if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sharing_stopped: Option<String>,
    /// What it takes of the host: its private pages, and its share of each frame. Not there before this
    /// was looked at, and when it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_bytes: Option<u64>,
    /// What sharing saves by it, pages of zeros included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved_bytes: Option<u64>,
    /// What its pages on frames, which it shares with others or may come to, have in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_bytes: Option<u64>,
    /// Its pages that take memory of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_bytes: Option<u64>,
    /// Its pages of zeros whose memory was given back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_bytes: Option<u64>,
    /// So much more memory would spare it 95 % of the reads of disks that any memory could spare. Not
    /// there before it has read through the block cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted_bytes: Option<u64>,
    /// CPU time of its vCPUs since it was last booted; not there when it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_seconds: Option<f64>,
    /// What its disks did since then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io: Option<IoView>,
}

/// What disks read, by where it came from, and what they wrote. What a guest finds in a page cache of
/// its own never gets here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct IoView {
    /// Blocks that a guest of the group held.
    pub from_guests_bytes: u64,
    /// Blocks that the host alone held.
    pub from_host_bytes: u64,
    /// All else: read from the image.
    pub from_disk_bytes: u64,
    /// What was written.
    pub written_bytes: u64,
}

/// What the block cache counts, in blocks of 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CacheCounters {
    /// Blocks that the host alone holds.
    pub blocks_cached: u64,
    /// Most that it may, in all groups together.
    pub blocks_limit: u64,
    /// Frames that hold blocks and are mapped by guests.
    pub blocks_in_guests: u64,
    /// Guest pages that blocks were copied to, as far as they are noted.
    pub blocks_noted: u64,
    /// Blocks that guests read which a guest held already, since the start.
    pub served_from_guests: u64,
    /// Blocks that guests read which the host alone held, since the start.
    pub served_from_host: u64,
    /// Blocks that were read from disks, since the start.
    pub fetched: u64,
    /// Blocks that the cache had no room for, which disks read by themselves, since the start.
    pub past: u64,
    /// Blocks that were mapped into guests, since the start.
    pub delivered_mapped: u64,
    /// Blocks that were copied into guests, since the start.
    pub delivered_copied: u64,
    /// Blocks that became cached when the last guest left their frame, since the start.
    pub demoted_mapped: u64,
    /// Blocks that became cached since a guest's page was proven to hold them still, since the start.
    pub demoted_copied: u64,
    /// Guest pages that no longer held the block that was copied to them, since the start.
    pub refuted: u64,
    /// Cached blocks that were dropped for others or for want of memory, since the start.
    pub evicted: u64,
    /// Blocks that were written to, which the host or a guest was known to hold, since the start.
    pub overwritten: u64,
    /// Bytes that the cache's books take.
    pub metadata_bytes: u64,
}

/// The host's cache of disk blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CacheView {
    /// Whether there is one: it belongs to the engine that shares memory.
    pub enabled: bool,
    /// When this was looked at.
    pub time_seconds: f64,
    /// What blocks take that the host alone holds.
    pub cached_bytes: u64,
    /// Most that they may.
    pub limit_bytes: u64,
    /// Blocks in memory that guests map: theirs, and no copy of the host's beside it.
    pub in_guests_bytes: u64,
    /// What guests read through the cache since the start, by where it came from.
    pub sources: CacheSources,
    /// What the cache counts.
    pub statistics: CacheCounters,
}

/// What guests read through the block cache, by where it came from. What a guest finds in a page cache of
/// its own never gets here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CacheSources {
    /// A guest of the group held it.
    pub guests_bytes: u64,
    /// The host alone held it.
    pub host_bytes: u64,
    /// It was read from the image, into the cache or past it.
    pub disk_bytes: u64,
}

/// What more memory would bring a VM, as its reads of disks tell; those of long ago count less.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WorkingSetView {
    /// The memory that it has.
    pub memory_bytes: u64,
    /// When this was looked at; not there when the VM has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_seconds: Option<f64>,
    /// So much more memory would spare it 95 % of the reads that any memory could spare. Not there before
    /// it has read through the block cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted_bytes: Option<u64>,
    /// The part of its reads that no memory spares, from 0 to 1: those of blocks that it had not read
    /// before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unavoidable: Option<f64>,
    /// Its reads over more memory, by points with straight lines in between.
    pub curve: Vec<CurvePoint>,
}

/// A point of a curve of misses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CurvePoint {
    /// With so much more memory than it has,
    pub more_bytes: u64,
    /// this part of its reads would be left, from 1 down.
    pub reads_left: f64,
}

/// Two VMs, and what they have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PairView {
    /// Their names.
    #[schema(min_items = 2, max_items = 2)]
    pub vms: Vec<String>,
    /// Pages of content that are in memory once for both. An estimate from some thousand frames of the
    /// group.
    pub pages: u64,
    /// Its standard error; 0 where all frames were looked at.
    pub pages_error: u64,
}

/// A VM with everything about it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmView {
    /// What a list says.
    #[serde(flatten)]
    pub summary: VmSummary,
    /// What it can be asked to do now.
    pub actions: Vec<Action>,
    /// What it was made from.
    pub config: VmSpec,
    /// Bytes that the guest wrote to its console since it was last booted, and those of them that were
    /// lost because nobody took them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleView>,
    /// Its disks.
    pub disks: Vec<DiskView>,
}

/// What went through a console.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ConsoleView {
    /// Bytes that the guest wrote.
    pub sent_bytes: u64,
    /// Bytes of the guest's that were lost, because nobody took them.
    pub lost_bytes: u64,
    /// Bytes that were typed and taken.
    pub received_bytes: u64,
}

/// A disk of a VM's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskView {
    /// Its name within the VM.
    pub id: String,
    /// Its image.
    pub path: String,
    /// The guest may not write.
    pub readonly: bool,
    /// Its size as the guest is told; not there when the VM has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Who keeps its blocks in host memory.
    pub cache: CachePolicy,
    /// What it may do a second.
    pub limits: LimitsSpec,
    /// What is to be known about how it is accessed, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<String>,
    /// What it did since the VM was last booted; not there when the VM has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics: Option<DiskStatistics>,
}

/// What a disk did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
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
    /// Blocks that were read from what guests held.
    pub blocks_from_guests: u64,
    /// Blocks that were read from what the host held.
    pub blocks_from_host: u64,
    /// Blocks that the cache had read from the image.
    pub blocks_fetched: u64,
    /// Requests that were held back to keep to the disk's limits.
    pub throttled: u64,
    /// Requests that failed.
    pub errors: u64,
    /// What went wrong last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// How a VM takes part in sharing memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmSharingView {
    /// The group that it shares with.
    pub group: String,
    /// What of its memory is shared: nothing where this process shares none.
    pub mode: SharingMode,
    /// When this was looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_seconds: Option<f64>,
    /// What it takes of the host: its private pages, and its share of each frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_bytes: Option<u64>,
    /// What is counted of its memory; not there before this was looked at, and when it has ended.
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
    /// When this was looked at.
    pub time_seconds: f64,
    /// Sum of the VMs' memory.
    pub guest_bytes: u64,
    /// Memory that the process takes: its private pages, and each frame once.
    pub resident_bytes: u64,
    /// Of that, private pages.
    pub private_bytes: u64,
    /// What sharing saves, less what it takes itself; 0 where it takes more than it saves.
    pub saved_bytes: u64,
    /// What sharing takes itself: its books, and the kernel's for mappings and page tables.
    pub overhead_bytes: u64,
    /// What the engine counts.
    pub statistics: EngineView,
    /// The groups within which VMs share.
    pub groups: Vec<GroupView>,
    /// The ten pairs of VMs with most in common.
    pub pairs: Vec<PairView>,
}

/// How the engine works.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SettingsView {
    /// Share of one core that looking for alike pages may take on average, in percent.
    pub cpu_percent: f64,
    /// Neighbours of a page that matched are compared before anything is searched for.
    pub lookahead: bool,
    /// What the indexes are ordered by: `digest` or `content`.
    pub order: String,
    /// Effort follows change.
    pub follow: bool,
}

/// One group of VMs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GroupView {
    /// Its name.
    pub name: String,
    /// Sharing has stopped for it: its VMs go on, and nothing more of them is shared.
    #[serde(default)]
    pub stopped: bool,
    /// Frames in use by two or more guest pages.
    pub pages_shared: u64,
    /// Further guest pages mapped to those frames.
    pub pages_sharing: u64,
    /// Guest pages of zeros whose memory was given back.
    pub zero_pages: u64,
    /// Pages mapped to frames since the group came up.
    pub merges: u64,
    /// What sharing saves, less what it takes itself; 0 where it takes more than it saves.
    pub saved_bytes: u64,
    /// What sharing takes itself: its books, and the kernel's for mappings and page tables.
    pub overhead_bytes: u64,
}
