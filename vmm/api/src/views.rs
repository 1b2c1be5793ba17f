//! Builds the API's responses from the state of VMs and of the process.

pub(super) mod devices;
pub(super) mod pages;

use std::sync::atomic::Ordering::Relaxed;

use samepage_api_types::views::{
    CacheCounters, CacheSources, CacheView, ConsoleView, CurvePoint, DiskStatistics, DiskView, EngineView,
    GroupView, IoView, PairView, SettingsView, SharingView, VmMemoryView, VmSharingView, VmSummary, VmView,
    WorkingSetView,
};
use samepage_devices::disk::cache::BLOCK_SIZE;
use samepage_devices::virtio::block::BlockStats;
use samepage_machine::vm::Disk;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::blocks::statistics::CacheStatistics;
use samepage_sharing::engine::{Order, Settings};
use samepage_sharing::service::Sharing;
use samepage_sharing::statistics::{EngineStatistics, VmStatistics};

use samepage_host::events::unix_seconds;
use samepage_host::record::Record;
use samepage_host::statistics::{GroupSample, IoSample, Sample, VmSample};

/// Conversion of an internal type to the API's type.
trait Shown<View> {
    /// Returns the value as clients see it.
    fn shown(self) -> View;
}

/// Implements [`Shown`] field by field.
macro_rules! mirror {
    ($view:ident of $source:ident: $($field:ident),+) => {
        impl Shown<$view> for &$source {
            fn shown(self) -> $view {
                $view { $($field: self.$field),+ }
            }
        }
    };
}

mirror!(
    EngineView of EngineStatistics:
    pages_shared, pages_sharing, pages_unshared, pages_volatile, zero_pages, full_scans, frames,
    pages_scanned, merges, merges_lookahead, merges_hinted, breaks, mappings_denied, refusals,
    store_bytes, metadata_bytes, guest_mappings, mappings, mappings_limit, longest_window_us,
    groups_stopped, cpu_seconds
);
mirror!(
    VmMemoryView of VmStatistics:
    pages, pages_shared, pages_sharing, pages_merged, pages_unshared, pages_volatile, zero_pages,
    pages_private, huge_whole, huge_split, mappings
);
mirror!(IoView of IoSample: from_guests_bytes, from_host_bytes, from_disk_bytes, written_bytes);
mirror!(
    CacheCounters of CacheStatistics:
    blocks_cached, blocks_limit, blocks_in_guests, blocks_noted, served_from_guests,
    served_from_host, fetched, past, delivered_mapped, delivered_copied, demoted_mapped,
    demoted_copied, refuted, evicted, overwritten, metadata_bytes
);

/// Returns the view of the host's block cache.
pub(super) fn cache(sample: &Sample) -> CacheView {
    let statistics: CacheCounters = (&sample.cache).shown();
    let bytes = |blocks: u64| blocks * BLOCK_SIZE;
    CacheView {
        enabled: sample.sharing,
        time_seconds: sample.time_seconds,
        cached_bytes: bytes(statistics.blocks_cached),
        limit_bytes: bytes(statistics.blocks_limit),
        in_guests_bytes: bytes(statistics.blocks_in_guests),
        sources: CacheSources {
            guests_bytes: bytes(statistics.served_from_guests),
            host_bytes: bytes(statistics.served_from_host),
            disk_bytes: bytes(statistics.fetched + statistics.past),
        },
        statistics,
    }
}

/// Returns the effect of more memory on a VM.
pub(super) fn working_set(record: &Record, sample: Option<(f64, &VmSample)>) -> WorkingSetView {
    let sample = sample.filter(|_| record.vm().is_some());
    let known = sample.and_then(|(_, sample)| sample.working_set.as_ref());
    let points = known.iter().flat_map(|known| &known.curve);
    WorkingSetView {
        memory_bytes: record.spec().memory.0,
        time_seconds: sample.map(|(time, _)| time),
        wanted_bytes: known.map(|known| known.wanted_bytes),
        unavoidable: known.map(|known| known.unavoidable),
        curve: points.map(|&(more_bytes, reads_left)| CurvePoint { more_bytes, reads_left }).collect(),
    }
}

/// Returns the pairs of VMs that share most.
pub(super) fn most_pairs(sample: &Sample, count: usize) -> Vec<PairView> {
    let pairs = sample.pairs.iter().take(count);
    pairs
        .map(|pair| {
            let vms = pair.vms.map(|vm| sample.vms[vm].name.clone()).into();
            PairView { vms, pages: pair.pages, pages_error: pair.error }
        })
        .collect()
}

/// Returns a VM's summary, with the last sample.
pub(super) fn summary(record: &Record, sample: Option<&VmSample>) -> VmSummary {
    let spec = record.spec();
    let vm = record.vm();
    let sample = sample.filter(|_| vm.is_some());
    let bytes =
        |pages: fn(&VmStatistics) -> u64| sample.map(|sample| pages(&sample.pages) * PAGE_SIZE as u64);
    VmSummary {
        name: spec.name.clone(),
        state: record.state(),
        since_time_seconds: unix_seconds(record.since()),
        reason: record.reason(),
        memory_bytes: spec.memory.0,
        vcpus: spec.vcpus,
        group: spec.sharing.group.clone(),
        mode: record.effective_mode(),
        sharing_stopped: vm.as_ref().and_then(|vm| Some(vm.membership()?.stopped()?.to_string())),
        resident_bytes: sample.map(|sample| sample.resident_bytes),
        saved_bytes: sample.map(saved_bytes),
        shared_bytes: bytes(|pages| pages.pages_merged),
        private_bytes: bytes(|pages| pages.pages_private),
        zero_bytes: bytes(|pages| pages.zero_pages),
        wanted_bytes: sample.and_then(|sample| Some(sample.working_set.as_ref()?.wanted_bytes)),
        cpu_seconds: vm.as_ref().map(|vm| vm.cpu_time().as_secs_f64()),
        io: vm.as_ref().map(|vm| (&IoSample::of(vm)).shown()),
    }
}

/// Returns the memory that sharing saves for a VM, in bytes.
pub(super) fn saved_bytes(sample: &VmSample) -> u64 {
    (sample.pages.pages_sharing + sample.pages.zero_pages) * PAGE_SIZE as u64
}

/// Returns the full view of a VM.
pub(super) fn vm(record: &Record, sample: Option<&VmSample>) -> VmView {
    let mut config = record.spec().clone();
    config.sharing.mode = record.mode();
    // This field is an option of the request, not a property of the VM.
    config.start = None;
    let vm = record.vm();
    let vsock = vm.as_deref().and_then(devices::vsock);
    let rng = vm.as_deref().and_then(devices::rng);
    let console = vm.map(|vm| {
        let stats = vm.serial_stats();
        ConsoleView {
            sent_bytes: stats.sent.load(Relaxed),
            lost_bytes: stats.lost.load(Relaxed),
            received_bytes: stats.received.load(Relaxed),
        }
    });
    let summary = summary(record, sample);
    let actions = summary.state.actions().collect();
    let (disks, networks) = (disks(record), devices::networks(record));
    VmView { summary, actions, config, console, disks, networks, vsock, rng }
}

/// Returns the disks of a VM.
pub(super) fn disks(record: &Record) -> Vec<DiskView> {
    let vm = record.vm();
    let disks = record.spec().disks.iter().enumerate().map(|(number, disk)| {
        let id = disk.id(number).into_owned();
        let counted = vm.as_ref().and_then(|vm| vm.disks().iter().find(|counted| counted.id == id));
        let statistics = counted.map(|counted| (&*counted.stats).shown());
        let path = disk.path.display().to_string();
        let limits = counted.map_or(disk.limits, |counted| counted.limiter.limits());
        let notices = counted.map_or_else(Vec::new, |counted| counted.notices.clone());
        let cache = counted.map_or(disk.cache(), Disk::cache);
        let size_bytes = counted.map(|counted| counted.size.bytes());
        let readonly = disk.readonly;
        DiskView { id, path, readonly, size_bytes, cache, limits, notices, statistics }
    });
    disks.collect()
}

/// Returns how a VM shares memory.
pub(super) fn vm_sharing(record: &Record, sample: Option<(f64, &VmSample)>) -> VmSharingView {
    let sample = sample.filter(|_| record.vm().is_some());
    VmSharingView {
        group: record.spec().sharing.group.clone(),
        mode: record.effective_mode(),
        time_seconds: sample.map(|(time, _)| time),
        resident_bytes: sample.map(|(_, sample)| sample.resident_bytes),
        statistics: sample.map(|(_, sample)| (&sample.pages).shown()),
    }
}

/// Returns the last sample with the present CPU time.
pub(super) fn sharing(sample: &Sample, settings: &Settings, sharing: Option<&Sharing>) -> SharingView {
    let mut statistics: EngineView = (&sample.engine).shown();
    if let Some(sharing) = sharing {
        statistics.cpu_seconds = sharing.cpu_time().as_secs_f64();
    }
    SharingView {
        enabled: sample.sharing,
        settings: sample.sharing.then(|| settings.shown()),
        time_seconds: sample.time_seconds,
        guest_bytes: sample.guest_bytes,
        resident_bytes: sample.resident_bytes,
        private_bytes: sample.private_bytes,
        saved_bytes: sample.saved_bytes,
        overhead_bytes: sample.overhead_bytes,
        statistics,
        groups: sample.groups.iter().map(Shown::shown).collect(),
        pairs: most_pairs(sample, 10),
    }
}

impl Shown<DiskStatistics> for &BlockStats {
    fn shown(self) -> DiskStatistics {
        let stats = self;
        DiskStatistics {
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

impl Shown<SettingsView> for &Settings {
    fn shown(self) -> SettingsView {
        let settings = self;
        let order = match settings.order {
            Order::Digest => "digest",
            Order::Content => "content",
        };
        SettingsView {
            cpu_percent: settings.cpu_percent,
            lookahead: settings.lookahead,
            order: order.to_owned(),
            follow: settings.follow,
        }
    }
}

impl Shown<GroupView> for &GroupSample {
    fn shown(self) -> GroupView {
        let GroupSample {
            name,
            stopped,
            pages_shared,
            pages_sharing,
            zero_pages,
            merges,
            saved_bytes,
            overhead_bytes,
        } = self.clone();
        GroupView {
            name,
            stopped,
            pages_shared,
            pages_sharing,
            zero_pages,
            merges,
            saved_bytes,
            overhead_bytes,
        }
    }
}
