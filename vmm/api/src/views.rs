//! Builds the API's responses from the state of VMs and of the process.

pub(super) mod devices;
pub(super) mod pages;

use samepage_api_types::views::{
    CacheCounters, CacheSources, CacheView, CurvePoint, DiskView, EngineView, GroupView, IoView, PairView,
    SettingsView, SharingView, VmMemoryView, VmSharingView, VmSummary, VmView, WorkerView, WorkingSetView,
};
use samepage_devices::disk::cache::BLOCK_SIZE;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::blocks::statistics::CacheStatistics;
use samepage_sharing::engine::{Order, Settings};
use samepage_sharing::service::Sharing;
use samepage_sharing::statistics::{EngineStatistics, VmStatistics};

use samepage_host::events::unix_seconds;
use samepage_host::record::Record;
use samepage_host::statistics::{GroupSample, IoSample, Sample, VmSample, WorkerSample};
use samepage_worker::machine::{Look, Machine};
use samepage_worker::report::DeviceReport;

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
    summary_with(record, sample, record.vm().map(|vm| vm.look()).as_ref())
}

fn summary_with(record: &Record, sample: Option<&VmSample>, look: Option<&Look>) -> VmSummary {
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
        worker: vm.as_ref().and_then(|vm| vm.worker()),
        group: spec.sharing.group.clone(),
        mode: record.effective_mode(),
        sharing_stopped: vm.as_deref().and_then(sharing_stopped),
        resident_bytes: sample.map(|sample| sample.resident_bytes),
        saved_bytes: sample.map(saved_bytes),
        shared_bytes: bytes(|pages| pages.pages_merged),
        private_bytes: bytes(|pages| pages.pages_private),
        zero_bytes: bytes(|pages| pages.zero_pages),
        wanted_bytes: sample.and_then(|sample| Some(sample.working_set.as_ref()?.wanted_bytes)),
        cpu_seconds: look.map(|look| look.cpu_time.as_secs_f64()),
        io: look.map(|look| (&IoSample::of(&look.devices)).shown()),
    }
}

fn sharing_stopped(vm: &dyn Machine) -> Option<String> {
    match vm.membership() {
        Some(membership) => Some(membership.stopped()?.to_string()),
        None => vm.unshared().map(str::to_owned),
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
    let look = record.vm().map(|vm| vm.look());
    let summary = summary_with(record, sample, look.as_ref());
    let devices = look.map(|look| look.devices);
    let actions = summary.state.actions().collect();
    let disks = disks_of(record, devices.as_ref());
    let networks = devices::networks_of(record, devices.as_ref());
    let balloon = devices::balloon_of(record, devices.as_ref());
    let (vsock, rng) =
        devices.as_ref().map_or((None, None), |devices| (devices.vsock.clone(), devices.rng.clone()));
    let console = devices.map(|devices| devices.console);
    VmView { summary, actions, config, console, disks, networks, vsock, rng, balloon }
}

/// Returns the disks of a VM.
pub(super) fn disks(record: &Record) -> Vec<DiskView> {
    disks_of(record, record.vm().map(|vm| vm.look().devices).as_ref())
}

pub(super) fn disks_of(record: &Record, devices: Option<&DeviceReport>) -> Vec<DiskView> {
    let disks = record.spec().disks.iter().enumerate().map(|(number, disk)| {
        let id = disk.id(number).into_owned();
        let counted = devices.and_then(|devices| devices.disk(&id));
        DiskView {
            path: disk.path.display().to_string(),
            readonly: disk.readonly,
            size_bytes: counted.map(|counted| counted.size_bytes),
            cache: counted.map_or(disk.cache(), |counted| counted.cache),
            limits: counted.map_or(disk.limits, |counted| counted.limits),
            notices: counted.map_or_else(Vec::new, |counted| counted.notices.clone()),
            statistics: counted.map(|counted| counted.statistics.clone()),
            id,
        }
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
        workers: sample.workers.iter().map(Shown::shown).collect(),
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

impl Shown<WorkerView> for &WorkerSample {
    fn shown(self) -> WorkerView {
        let WorkerSample { process, private_bytes, cpu_seconds } = *self;
        WorkerView { process, private_bytes, cpu_seconds }
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
