//! Statistics of a process and its VMs: what they use and share. `--stats` writes one JSON object a second.
//!
//! Pages are of 4 KiB and the terms are KSM's. Memory is counted as the kernel charges it:
//! private pages by `RssAnon`, frames by the blocks of their memory file. The kernel's RSS is of
//! no use here, since it counts a frame at every address that shows it.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use samepage_devices::disk::cache::BLOCK_SIZE;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::blocks::statistics::CacheStatistics;
use samepage_sharing::blocks::working_set::Curve;
use samepage_sharing::budget::{Budget, mappings_of_process};
use samepage_sharing::by_type::{Claimed, TypeStatistics};
use samepage_sharing::pagemap::Pagemap;
use samepage_sharing::pairs::{self, FrameSample};
use samepage_sharing::service::{Membership, Sharing};
use samepage_sharing::statistics::{EngineStatistics, VmStatistics};
use serde::Serialize;

use crate::host_limits::field_kib;
use samepage_api_types::by_type::{self, ByType, TypeSample};
use samepage_api_types::views::DiskStatistics;
use samepage_spec::{SharingMode, SharingSpec};
use samepage_worker::machine::Machine;
use samepage_worker::report::DeviceReport;

/// Upper limit for the pairs of VMs in a sample: all pairs of 32 VMs.
pub const MOST_PAIRS: usize = 32 * 31 / 2;

/// The process at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Seconds since 1970.
    pub time_seconds: f64,
    /// Whether the engine runs.
    pub sharing: bool,
    /// Sum of the VMs' memory, in bytes.
    pub guest_bytes: u64,
    /// Memory of the process, in bytes: its private pages, and each frame once.
    pub resident_bytes: u64,
    /// Private pages among these, in bytes: the guests' and the program's.
    pub private_bytes: u64,
    /// Memory that sharing saves, in bytes, minus `overhead_bytes`; 0 if the overhead is larger.
    pub saved_bytes: u64,
    /// Overhead of sharing, in bytes: the engine's metadata, and the kernel's for mappings and page tables.
    pub overhead_bytes: u64,
    /// The engine's counts.
    #[serde(flatten)]
    pub engine: EngineStatistics,
    /// The host's cache of disk blocks.
    pub cache: CacheStatistics,
    /// The groups within which VMs share, by name.
    pub groups: Vec<GroupSample>,
    /// The VMs, in the order in which they were started.
    pub vms: Vec<VmSample>,
    /// The pairs of VMs that share most.
    pub pairs: Vec<PairSample>,
    /// The worker processes, whose private memory is part of the figures above.
    pub workers: Vec<WorkerSample>,
}

/// What one worker process takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WorkerSample {
    /// The number of the process.
    pub process: u32,
    /// Its private memory, in bytes: the guests' and the program's.
    pub private_bytes: u64,
    /// Its CPU time so far, with that of the vCPUs.
    pub cpu_seconds: f64,
}

impl WorkerSample {
    /// Takes a sample of a process.
    ///
    /// # Errors
    /// Fails if the process is gone.
    pub(crate) fn of(process: u32) -> io::Result<Self> {
        Ok(Self { process, private_bytes: rss_anon_of(process)?, cpu_seconds: cpu_seconds_of(process)? })
    }
}

/// Two VMs, and the memory that they share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PairSample {
    /// The indexes of the VMs in the list of VMs.
    pub vms: [usize; 2],
    /// Pages of content that are in memory once for both: an estimate.
    pub pages: u64,
    /// The standard error of the estimate.
    pub error: u64,
}

/// One group of VMs at one moment, in the terms of [`EngineStatistics`].
#[derive(Clone, Debug, Serialize)]
pub struct GroupSample {
    /// Its name.
    pub name: String,
    /// Whether sharing has stopped for the group.
    pub stopped: bool,
    /// Frames in use by two or more guest pages.
    pub pages_shared: u64,
    /// Further guest pages mapped to those frames.
    pub pages_sharing: u64,
    /// Guest pages of zeros whose memory is freed.
    pub zero_pages: u64,
    /// Pages mapped to frames since the group was created.
    pub merges: u64,
    /// Memory that sharing saves, in bytes, minus `overhead_bytes`; 0 if the overhead is larger.
    pub saved_bytes: u64,
    /// Overhead of sharing, in bytes: the engine's metadata, and the kernel's for mappings and page tables.
    pub overhead_bytes: u64,
}

impl GroupSample {
    fn new(name: String, engine: &EngineStatistics) -> Self {
        let EngineStatistics { pages_shared, pages_sharing, zero_pages, merges, .. } = *engine;
        let (saved_bytes, overhead_bytes) = (engine.saved_bytes(), engine.overhead_bytes());
        let stopped = engine.groups_stopped > 0;
        Self { name, stopped, pages_shared, pages_sharing, zero_pages, merges, saved_bytes, overhead_bytes }
    }
}

/// One VM at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct VmSample {
    /// Its name.
    pub name: String,
    /// The state: `running`, `paused` or `ended`.
    pub state: &'static str,
    /// The group; absent without an engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Which pages are shared; absent without an engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<SharingMode>,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// Memory that the VM takes of the host, in bytes: private pages, and its share of each frame.
    pub resident_bytes: u64,
    /// Counts of its pages.
    #[serde(flatten)]
    pub pages: VmStatistics,
    /// How many disk reads more memory would save, after the VM has read through the block cache.
    pub working_set: Option<WorkingSetSample>,
    /// Number of its vCPUs.
    pub vcpus: u32,
    /// CPU time of its vCPUs, in seconds.
    pub cpu_seconds: f64,
    /// Bytes that the disks read and wrote.
    pub io: IoSample,
    /// Pages by type, with an engine. Written if an agent in the guest publishes types.
    #[serde(skip_serializing_if = "nothing_is_said")]
    pub claimed: Option<ClaimedSample>,
    /// Frames of the VM, from a sample of all frames.
    #[serde(skip)]
    frames: Option<FrameSample>,
}

/// Page types that a guest publishes, and counters of the pages of each type.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ClaimedSample {
    /// Whether an agent in the guest publishes types. Without one, all pages are of type unknown.
    pub publishing: bool,
    /// Passes of the agent that were read, since the start.
    pub passes: u64,
    /// Words that had changed in them.
    pub words: u64,
    /// CPU time of the guest's last pass, in microseconds, as published by the guest.
    pub pass_cpu_us: u32,
    /// Free pages that were freed for the host, since the start.
    pub given_back: u64,
    /// Pages by type, without types that have no pages.
    #[serde(with = "by_type::present")]
    pub types: ByType<TypeSample>,
}

fn nothing_is_said(claimed: &Option<ClaimedSample>) -> bool {
    claimed.as_ref().is_none_or(|claimed| !claimed.publishing)
}

impl From<&Claimed> for ClaimedSample {
    fn from(claimed: &Claimed) -> Self {
        let Claimed { publishing, passes, words, pass_cpu_us, given_back, ref types } = *claimed;
        let types = ByType::new(types.each_ref().map(type_sample));
        Self { publishing, passes, words, pass_cpu_us, given_back, types }
    }
}

impl VmSample {
    /// Returns the pages by type: all unknown if the guest publishes no types.
    #[must_use]
    pub fn types(&self) -> ByType<TypeSample> {
        match &self.claimed {
            Some(claimed) if claimed.types.iter().any(|(_, one)| one.pages > 0) => claimed.types,
            _ => ByType { unknown: all_unknown(&self.pages), ..ByType::default() },
        }
    }
}

/// Returns the engine's counters of pages of one type.
fn type_sample(counted: &TypeStatistics) -> TypeSample {
    let TypeStatistics {
        pages,
        private,
        merged,
        sharing,
        zero,
        merges,
        broken,
        merged_seconds,
        watched_seconds,
    } = *counted;
    TypeSample {
        pages,
        pages_private: private,
        pages_merged: merged,
        pages_sharing: sharing,
        zero_pages: zero,
        merges,
        broken,
        merged_seconds,
        watched_seconds,
    }
}

/// Returns counters of all pages of a VM whose guest publishes no types.
fn all_unknown(vm: &VmStatistics) -> TypeSample {
    TypeSample {
        pages: vm.pages,
        pages_private: vm.pages_private,
        pages_merged: vm.pages_merged,
        pages_sharing: vm.pages_sharing,
        zero_pages: vm.zero_pages,
        ..TypeSample::default()
    }
}

/// Bytes that a VM's disks read, by source, and wrote since the last boot.
///
/// Reads from the guest's own page cache do not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct IoSample {
    /// Read from the memory of a guest in the group.
    pub from_guests_bytes: u64,
    /// Read from the block cache.
    pub from_host_bytes: u64,
    /// Read from the image.
    pub from_disk_bytes: u64,
    /// Written.
    pub written_bytes: u64,
}

impl IoSample {
    /// Adds the counters of another disk or VM.
    pub fn add(&mut self, other: Self) {
        self.from_guests_bytes += other.from_guests_bytes;
        self.from_host_bytes += other.from_host_bytes;
        self.from_disk_bytes += other.from_disk_bytes;
        self.written_bytes += other.written_bytes;
    }

    /// Returns the counters of a VM's disks since the last boot.
    #[must_use]
    pub fn of(devices: &DeviceReport) -> Self {
        let mut all = Self::default();
        devices.disks.iter().for_each(|disk| all.add(Self::from(&disk.statistics)));
        all
    }
}

impl From<&DiskStatistics> for IoSample {
    fn from(disk: &DiskStatistics) -> Self {
        let from_guests_bytes = disk.blocks_from_guests * BLOCK_SIZE;
        let from_host_bytes = disk.blocks_from_host * BLOCK_SIZE;
        Self {
            from_guests_bytes,
            from_host_bytes,
            from_disk_bytes: disk.read_bytes.saturating_sub(from_guests_bytes + from_host_bytes),
            written_bytes: disk.written_bytes,
        }
    }
}

/// How many disk reads more memory would save a VM. Old reads count less than recent ones.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WorkingSetSample {
    /// With this much more memory, in bytes, the VM would save 95 % of the reads that memory can save.
    pub wanted_bytes: u64,
    /// The part of the reads that no memory saves: first reads of blocks.
    pub unavoidable: f64,
    /// Points: additional memory in bytes, and the part of the reads that is left, from 1 down. Linear in
    /// between.
    pub curve: Vec<(u64, f64)>,
}

impl From<Curve> for WorkingSetSample {
    fn from(curve: Curve) -> Self {
        let bytes = |blocks: u64| blocks * PAGE_SIZE as u64;
        Self {
            wanted_bytes: bytes(curve.working_set()),
            unavoidable: curve.floor(),
            curve: curve.points().iter().map(|&(blocks, ratio)| (bytes(blocks), ratio)).collect(),
        }
    }
}

/// Takes samples.
#[derive(Debug)]
pub struct Sampler {
    pagemap: Pagemap,
}

impl Sampler {
    /// Returns a sampler of this process.
    ///
    /// # Errors
    /// Fails if `/proc` hides the page map.
    pub fn new() -> io::Result<Self> {
        Ok(Self { pagemap: Pagemap::open()? })
    }

    /// Takes a sample of the process with these VMs.
    ///
    /// # Errors
    /// Fails if `/proc` cannot be read.
    pub fn sample<'a>(
        &self,
        sharing: Option<&Sharing>,
        vms: impl IntoIterator<Item = &'a dyn Machine>,
    ) -> io::Result<Sample> {
        let vms = vms.into_iter().map(|vm| self.vm(vm)).collect::<io::Result<Vec<_>>>()?;
        self.process(sharing, vms)
    }

    /// Takes a sample of the process, with these samples of its VMs.
    ///
    /// # Errors
    /// Fails if `/proc` cannot be read.
    pub fn process(&self, sharing: Option<&Sharing>, vms: Vec<VmSample>) -> io::Result<Sample> {
        let groups = sharing.map_or_else(Vec::new, Sharing::groups);
        let groups = groups.into_iter().map(|(name, engine)| GroupSample::new(name, &engine)).collect();
        let engine = match sharing {
            Some(sharing) => sharing.statistics(),
            // The figures that do not depend on the engine.
            None => EngineStatistics {
                mappings: mappings_of_process()?,
                mappings_limit: Budget::new(None).limit(),
                ..EngineStatistics::default()
            },
        };
        let private_bytes = rss_anon()?;
        let pairs = pairs(&vms);
        Ok(Sample {
            time_seconds: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64()),
            sharing: sharing.is_some(),
            guest_bytes: vms.iter().map(|vm| vm.memory_bytes).sum(),
            resident_bytes: private_bytes + engine.store_bytes,
            private_bytes,
            saved_bytes: sharing.map_or(0, |_| engine.saved_bytes()),
            overhead_bytes: sharing.map_or(0, |_| engine.overhead_bytes()),
            engine,
            cache: sharing.map(Sharing::cache).unwrap_or_default(),
            groups,
            vms,
            pairs,
            workers: Vec::new(),
        })
    }

    /// Takes a sample of one VM. Takes time in proportion to its memory.
    ///
    /// # Errors
    /// Fails if `/proc` cannot be read.
    pub fn vm(&self, vm: &dyn Machine) -> io::Result<VmSample> {
        let pages = match vm.membership() {
            Some(membership) => membership.statistics()?,
            None => {
                let runs = vm.touched(&self.pagemap)?;
                VmStatistics {
                    pages: vm.memory_bytes() / PAGE_SIZE as u64,
                    pages_private: runs.iter().map(|run| u64::from(run.end - run.start)).sum(),
                    mappings: 1,
                    ..VmStatistics::default()
                }
            }
        };
        let claimed = vm.membership().map(Membership::claimed).transpose()?;
        let participation = vm.membership().map(Membership::participation);
        let (group, mode) = participation.map(|SharingSpec { group, mode }| (group, mode)).unzip();
        let resident = pages.pages_private + pages.pages_merged - pages.pages_sharing;
        let look = vm.look();
        Ok(VmSample {
            name: vm.name().to_owned(),
            state: vm.state().name(),
            group,
            mode,
            memory_bytes: vm.memory_bytes(),
            resident_bytes: resident * PAGE_SIZE as u64,
            pages,
            working_set: vm.membership().and_then(Membership::working_set).map(WorkingSetSample::from),
            vcpus: vm.vcpus(),
            cpu_seconds: look.cpu_time.as_secs_f64(),
            io: IoSample::of(&look.devices),
            claimed: claimed.as_ref().map(ClaimedSample::from),
            frames: vm.membership().map(Membership::frames),
        })
    }
}

/// Returns the pairs of VMs that share most. VMs of different groups share nothing.
fn pairs(vms: &[VmSample]) -> Vec<PairSample> {
    let mut groups: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (at, vm) in vms.iter().enumerate() {
        if let Some(group) = &vm.group {
            groups.entry(group).or_default().push(at);
        }
    }
    let mut all = Vec::new();
    for members in groups.into_values() {
        let (places, frames): (Vec<_>, Vec<_>) =
            members.into_iter().filter_map(|at| Some((at, vms[at].frames.as_ref()?))).unzip();
        all.extend(pairs::pairs(&frames, MOST_PAIRS).into_iter().map(|pair| PairSample {
            vms: pair.vms.map(|vm| places[vm]),
            pages: pair.pages,
            error: pair.error,
        }));
    }
    all.sort_by_key(|pair| (Reverse(pair.pages), pair.vms));
    all.truncate(MOST_PAIRS);
    all
}

/// Returns the private anonymous memory of this process, in bytes.
///
/// # Errors
/// Fails if `/proc/self/status` cannot be read or lacks the figure.
pub fn rss_anon() -> io::Result<u64> {
    rss_anon_in("/proc/self/status")
}

/// Returns the private anonymous memory of another process, in bytes.
///
/// # Errors
/// Fails if the process is gone.
pub(crate) fn rss_anon_of(process: u32) -> io::Result<u64> {
    rss_anon_in(&format!("/proc/{process}/status"))
}

fn rss_anon_in(path: &str) -> io::Result<u64> {
    let status = fs::read_to_string(path)?;
    field_kib(&status, "RssAnon:")
        .ok_or_else(|| io::Error::other(format!("{path} has no RssAnon: Linux 4.5 or newer is needed")))
}

/// The unit of times in `/proc`, on x86 whatever the kernel's own clock (USER_HZ).
const TICKS_PER_SECOND: f64 = 100.0;

/// Returns the CPU time of another process, in seconds (proc_pid_stat(5), fields 14 and 15).
fn cpu_seconds_of(process: u32) -> io::Result<f64> {
    let path = format!("/proc/{process}/stat");
    let stat = fs::read_to_string(&path)?;
    // The name in parentheses may contain anything.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let times = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    let ticks = times.sum::<Result<u64, _>>().map_err(io::Error::other)?;
    Ok(ticks as f64 / TICKS_PER_SECOND)
}

impl Sample {
    /// Adds the processes that hold VMs.
    pub(crate) fn add_workers(&mut self, workers: Vec<WorkerSample>) {
        let bytes: u64 = workers.iter().map(|worker| worker.private_bytes).sum();
        self.private_bytes += bytes;
        self.resident_bytes += bytes;
        self.workers = workers;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cost_of_a_process_is_read() {
        let before = WorkerSample::of(std::process::id()).unwrap();
        assert!(before.private_bytes > 0);
        let mut sample = before.clone();
        while sample.cpu_seconds <= before.cpu_seconds {
            sample = WorkerSample::of(std::process::id()).unwrap();
        }
        assert!(sample.cpu_seconds < before.cpu_seconds + 3600.0, "{sample:?}");
        assert!(WorkerSample::of(u32::MAX).is_err());
    }

    #[test]
    fn own_memory_is_counted() {
        let before = rss_anon().unwrap();
        // Other tests take and free some meanwhile.
        let memory = vec![1_u8; 64 << 20];
        let after = rss_anon().unwrap();
        assert!(after >= before + (32 << 20), "{before} to {after} with {} bytes more", memory.len());
    }
}
