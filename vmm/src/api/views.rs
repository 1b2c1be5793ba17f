//! What the API answers.
//!
//! Pages are of 4 KiB, amounts of memory in bytes, and times in seconds since 1970. Fields that say what
//! was counted are in the terms of the kernel's KSM, as in the lines of `--stats`.

use std::sync::atomic::Ordering::Relaxed;

use samepage_devices::virtio::block::BlockStats;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::engine::{Order, Settings};
use samepage_sharing::statistics::{EngineStatistics, VmStatistics};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::disk_spec::{CacheSpec, LimitsSpec};
use super::events::unix_seconds;
use super::lifecycle::{Action, State};
use super::record::Record;
use super::spec::{SharingMode, VmSpec};
use crate::statistics::{GroupSample, Sample, VmSample};

/// Defines what the API says of a structure of the engine's, field by field.
macro_rules! mirror {
    ($(#[$meta:meta])* $name:ident of $source:ty { $($(#[$doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
        pub struct $name { $($(#[$doc])* pub $field: $type,)* }

        impl From<&$source> for $name {
            fn from(source: &$source) -> Self {
                Self { $($field: source.$field,)* }
            }
        }
    };
}

mirror! {
    /// What the engine counts.
    EngineView of EngineStatistics {
        /// Frames in use by two or more guest pages.
        pages_shared: u64,
        /// Further guest pages mapped to those frames: what is saved.
        pages_sharing: u64,
        /// Pages looked at and found unique.
        pages_unshared: u64,
        /// Pages that changed since the pass before.
        pages_volatile: u64,
        /// Guest pages of zeros whose memory was given back.
        zero_pages: u64,
        /// Complete passes over all VMs.
        full_scans: u64,
        /// Frames in use, with those of a single sharer.
        frames: u64,
        /// Pages looked at since the start.
        pages_scanned: u64,
        /// Pages mapped to frames since the start.
        merges: u64,
        /// Of those, the ones found as neighbours of a page that matched.
        merges_lookahead: u64,
        /// Of all merges, those whose runs a device's hint began.
        merges_hinted: u64,
        /// Merged pages that were written to and left their frames since the start.
        breaks: u64,
        /// Runs not merged for want of mappings since the start.
        mappings_denied: u64,
        /// Calls of the kernel that failed since the start; guests are whole.
        refusals: u64,
        /// Bytes that the kernel charges for the frames.
        store_bytes: u64,
        /// Bytes that the engine's books take.
        metadata_bytes: u64,
        /// Mappings that the VMs' memory is made of.
        guest_mappings: u64,
        /// Mappings of the process.
        mappings: u64,
        /// The kernel's limit on them.
        mappings_limit: u64,
        /// The longest time for which writers to a run of pages were made to wait, in microseconds.
        longest_window_us: u64,
        /// CPU time of the sharing threads, in seconds.
        cpu_seconds: f64,
    }
}

mirror! {
    /// What is counted of one VM's memory.
    VmMemoryView of VmStatistics {
        /// Pages of its RAM.
        pages: u64,
        /// Its pages on frames that it shares, counting each frame once for its share.
        pages_shared: u64,
        /// Pages that sharing saves by this VM: each of n sharers of a frame saves 1 - 1/n of a page.
        pages_sharing: u64,
        /// Its pages that are mapped to frames.
        pages_merged: u64,
        /// Its pages looked at and found unique.
        pages_unshared: u64,
        /// Its pages that changed since the pass before.
        pages_volatile: u64,
        /// Its pages of zeros whose memory was given back.
        zero_pages: u64,
        /// Its pages that take memory of their own.
        pages_private: u64,
        /// Huge pages that back a part of them.
        huge_whole: u64,
        /// Its huge pages that were split, to share parts of them.
        huge_split: u64,
        /// Mappings of its RAM.
        mappings: u64,
    }
}

/// A VM in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmSummary {
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: State,
    /// Since when.
    pub since_seconds: f64,
    /// Why it has ended, if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its memory.
    pub memory_bytes: u64,
    /// The group that it shares memory with.
    pub group: String,
    /// What of its memory is shared.
    pub mode: SharingMode,
    /// What it takes of the host: its private pages, and its share of each frame. Not there before this
    /// was looked at, and when it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_bytes: Option<u64>,
    /// What sharing saves by it, pages of zeros included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved_bytes: Option<u64>,
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
    /// Who keeps its blocks in host memory.
    pub cache: CacheSpec,
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
    /// What of its memory is shared.
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
    /// What sharing saves, less what its books and mappings take.
    pub saved_bytes: i64,
    /// What the engine counts.
    pub statistics: EngineView,
    /// The groups within which VMs share.
    pub groups: Vec<GroupView>,
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
    /// Frames in use by two or more guest pages.
    pub pages_shared: u64,
    /// Further guest pages mapped to those frames.
    pub pages_sharing: u64,
    /// Guest pages of zeros whose memory was given back.
    pub zero_pages: u64,
    /// Pages mapped to frames since the group came up.
    pub merges: u64,
    /// What sharing saves, less what its books and mappings take.
    pub saved_bytes: i64,
}

impl VmSummary {
    /// A VM, with what was last counted of it.
    pub(super) fn new(record: &Record, sample: Option<&VmSample>) -> Self {
        let spec = record.spec();
        let sample = sample.filter(|_| record.vm().is_some());
        Self {
            name: spec.name.clone(),
            state: record.state(),
            since_seconds: unix_seconds(record.since()),
            reason: record.reason(),
            memory_bytes: spec.memory.0,
            group: spec.sharing.group.clone(),
            mode: record.mode(),
            resident_bytes: sample.map(|sample| sample.resident_bytes),
            saved_bytes: sample.map(saved_bytes),
        }
    }
}

/// What sharing saves by a VM, in bytes.
pub(super) fn saved_bytes(sample: &VmSample) -> u64 {
    (sample.pages.pages_sharing + sample.pages.zero_pages) * PAGE_SIZE as u64
}

impl VmView {
    pub(super) fn new(record: &Record, sample: Option<&VmSample>) -> Self {
        let mut config = record.spec().clone();
        config.sharing.mode = record.mode();
        // A wish of whoever made it, and no property of the VM.
        config.start = None;
        let vm = record.vm();
        let console = vm.map(|vm| {
            let stats = vm.serial_stats();
            ConsoleView {
                sent_bytes: stats.sent.load(Relaxed),
                lost_bytes: stats.lost.load(Relaxed),
                received_bytes: stats.received.load(Relaxed),
            }
        });
        let summary = VmSummary::new(record, sample);
        let actions = summary.state.actions().collect();
        Self { summary, actions, config, console, disks: DiskView::all(record) }
    }
}

impl DiskView {
    /// The disks of a VM.
    pub(super) fn all(record: &Record) -> Vec<Self> {
        let vm = record.vm();
        let disks = record.spec().to_config().disks.into_iter().map(|disk| {
            let counted = vm.as_ref().and_then(|vm| vm.disks().iter().find(|counted| counted.id == disk.id));
            let statistics = counted.map(|counted| DiskStatistics::from(&*counted.stats));
            let path = disk.path.display().to_string();
            let limits = counted.map_or(disk.limits, |counted| counted.limiter.limits()).into();
            let notices = counted.map_or_else(Vec::new, |counted| counted.notices.clone());
            let cache = disk.cache.into();
            Self { id: disk.id, path, readonly: disk.read_only, cache, limits, notices, statistics }
        });
        disks.collect()
    }
}

impl From<&BlockStats> for DiskStatistics {
    fn from(stats: &BlockStats) -> Self {
        Self {
            reads: stats.reads.load(Relaxed),
            writes: stats.writes.load(Relaxed),
            flushes: stats.flushes.load(Relaxed),
            read_bytes: stats.read_bytes.load(Relaxed),
            written_bytes: stats.written_bytes.load(Relaxed),
            blocks_from_guests: stats.blocks_from_guests.load(Relaxed),
            blocks_from_host: stats.blocks_from_host.load(Relaxed),
            blocks_fetched: stats.blocks_fetched.load(Relaxed),
            throttled: stats.throttled.load(Relaxed),
            errors: stats.errors.load(Relaxed),
            last_error: stats.last_error(),
        }
    }
}

impl VmSharingView {
    pub(super) fn new(record: &Record, sample: Option<(f64, &VmSample)>) -> Self {
        let sample = sample.filter(|_| record.vm().is_some());
        Self {
            group: record.spec().sharing.group.clone(),
            mode: record.mode(),
            time_seconds: sample.map(|(time, _)| time),
            resident_bytes: sample.map(|(_, sample)| sample.resident_bytes),
            statistics: sample.map(|(_, sample)| VmMemoryView::from(&sample.pages)),
        }
    }
}

impl SharingView {
    pub(super) fn new(sample: &Sample, settings: &Settings) -> Self {
        Self {
            enabled: sample.sharing,
            settings: sample.sharing.then(|| SettingsView::from(settings)),
            time_seconds: sample.time_seconds,
            guest_bytes: sample.guest_bytes,
            resident_bytes: sample.resident_bytes,
            private_bytes: sample.private_bytes,
            saved_bytes: sample.saved_bytes,
            statistics: EngineView::from(&sample.engine),
            groups: sample.groups.iter().map(GroupView::from).collect(),
        }
    }
}

impl From<&Settings> for SettingsView {
    fn from(settings: &Settings) -> Self {
        let order = match settings.order {
            Order::Digest => "digest",
            Order::Content => "content",
        };
        Self {
            cpu_percent: settings.cpu_percent,
            lookahead: settings.lookahead,
            order: order.to_owned(),
            follow: settings.follow,
        }
    }
}

impl From<&GroupSample> for GroupView {
    fn from(group: &GroupSample) -> Self {
        let GroupSample { name, pages_shared, pages_sharing, zero_pages, merges, saved_bytes } =
            group.clone();
        Self { name, pages_shared, pages_sharing, zero_pages, merges, saved_bytes }
    }
}
