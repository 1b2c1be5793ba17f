//! One policy with one workload: guests read a disk through their own page caches and the host's cache.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use samepage_devices::disk::CachePolicy;
use samepage_machine::Hypervisor;
use samepage_resources::demo::client::{BLOCK_BYTES, ClientPlan};
use samepage_resources::demo::plan::Plan;
use samepage_sharing::blocks::CacheSize;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use serde::Serialize;

use super::super::context::Bench;
use super::super::disk::client::{self, Work};
use super::super::disk::image::Image;
use super::super::vms::guests::{self, Guest};
use super::copies::{self, Copies};
use super::page_cache::Limited;
use super::workload::Workload;

/// Passes that fill the caches. Each uses [`USES`] times as many blocks as there are.
const WARMUP: usize = 2;
const USES: u64 = 2;
/// Pause between passes, long enough to read counters.
const PAUSE_MS: u64 = 200;

/// The parameters of a measurement. Sizes are in blocks of 4 KiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting {
    pub(super) workload: Workload,
    pub(super) policy: CachePolicy,
    /// Size of each guest's page cache.
    pub(super) guest: u32,
    /// Size of the host's cache. Without one, the guests get it in equal shares.
    pub(super) host: u32,
    /// Size of the disk.
    pub(super) data: u32,
    /// Guests that read the same disk.
    pub(super) vms: u32,
    /// Other parameters of the guests' reads.
    pub(super) client: ClientPlan,
    /// Requests in flight.
    pub(super) depth: u32,
}

/// The results. Ratios are from 0 to 1. Hits of caches below the guest's own are parts of its misses.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Cell {
    pub(super) workload: String,
    pub(super) policy: String,
    pub(super) vms: u32,
    pub(super) guest_blocks: u32,
    pub(super) host_blocks: u32,
    pub(super) data_blocks: u32,
    /// Part of all reads that the guests' own caches serve.
    pub(super) guest_hit_ratio: f64,
    /// Part of their misses that is served from another guest's memory.
    pub(super) other_guest_hit_ratio: f64,
    /// Part of their misses that the host's cache serves.
    pub(super) host_hit_ratio: f64,
    /// Blocks read from the disk.
    pub(super) disk_reads: u64,
    /// Blocks that the guests read from their disks.
    pub(super) misses: u64,
    /// Blocks used per second by all guests.
    pub(super) blocks_per_second: f64,
    /// Median duration of a guest's requests, in microseconds.
    pub(super) p50_us: f64,
    /// 99th percentile of the duration of a guest's requests, in microseconds.
    pub(super) p99_us: f64,
    /// CPU time without the vCPUs' for each block that a guest misses, in microseconds.
    pub(super) host_cpu_us: f64,
    /// Memory of the host's copies, found by their content.
    pub(super) host_bytes: u64,
    /// Memory of further copies of a block.
    pub(super) twice_bytes: u64,
}

/// Counters at one moment.
#[derive(Clone, Copy, Debug)]
struct Counters {
    /// Blocks that guests read from their disks.
    read: u64,
    from_guests: u64,
    from_host: u64,
    /// Blocks that this process had read from storage.
    storage: u64,
    /// CPU time without that of vCPUs.
    cpu: Duration,
}

impl Counters {
    fn now(guests: &[Guest]) -> Result<Self> {
        let disks = || guests.iter().flat_map(|guest| guest.vm.disks());
        let sum = |counter: fn(&samepage_devices::virtio::block::BlockStats) -> &AtomicU64| -> u64 {
            disks().map(|disk| counter(&disk.stats).load(Ordering::Relaxed)).sum()
        };
        Ok(Self {
            read: sum(|stats| &stats.read_bytes) / BLOCK_BYTES,
            from_guests: sum(|stats| &stats.blocks_from_guests),
            from_host: sum(|stats| &stats.blocks_from_host),
            storage: read_from_storage()? / BLOCK_BYTES,
            cpu: guests::cpu_beside(guests)?,
        })
    }
}

/// Returns the bytes that the kernel read from storage for this process, into its page cache or past it.
fn read_from_storage() -> Result<u64> {
    let text = fs::read_to_string("/proc/self/io").context("ask for what was read from storage")?;
    let bytes = text.lines().find_map(|line| line.strip_prefix("read_bytes: ")?.trim().parse().ok());
    bytes.context("the kernel does not tell what was read from storage")
}

impl Setting {
    fn plan(&self, vm: u32) -> Plan {
        let share = if self.policy == CachePolicy::None { self.host / self.vms } else { 0 };
        let blocks = self.data;
        let client = ClientPlan {
            pages: self.guest + share,
            blocks,
            units: USES * u64::from(blocks / self.client.run),
            ..self.workload.client(self.client)
        };
        Plan { vm, ..client::plan(client, self.depth, 0, PAUSE_MS) }
    }

    /// Measures with disks on an image.
    ///
    /// # Errors
    /// Fails if VMs cannot be built, or if a guest reads wrong data.
    pub(super) fn measure(&self, bench: &Bench, hypervisor: &Hypervisor, image: &Image) -> Result<Cell> {
        let host_bytes = u64::from(self.host) * BLOCK_BYTES;
        let sharing = if self.policy.wants_cache() {
            let settings = Settings { block_cache: CacheSize::Bytes(host_bytes), ..Settings::default() };
            Some(Arc::new(Sharing::start(settings)?))
        } else {
            None
        };
        image.forget()?;
        let memory = client::memory(&self.plan(0));
        let start = |vm| {
            let plan = self.plan(vm);
            let disks = vec![client::disk(image.path(), self.policy, &plan)];
            Guest::start_with_disks(hypervisor, &plan, memory, sharing.as_ref(), disks)
        };
        let guests = (0..self.vms).map(start).collect::<Result<Vec<_>>>()?;
        let mut limited = None;
        for pass in 0..WARMUP {
            for guest in &guests {
                client::wait_pass(bench, guest)?;
            }
            if pass == 0 && self.policy == CachePolicy::Buffered {
                // Guests already have their memory, so from here on the cgroup limits only the page cache.
                image.forget()?;
                limited = Some(Limited::enter(host_bytes)?);
            }
        }
        let before = Counters::now(&guests)?;
        let work = guests.iter().map(|guest| client::wait_pass(bench, guest)).collect::<Result<Vec<_>>>()?;
        let after = Counters::now(&guests)?;
        guests.iter().for_each(|guest| guest.vm.pause());
        if let Some(sharing) = &sharing {
            // The audit also frees memory that free frames keep for a while.
            let report = sharing.audit().context("audit the frames")?;
            ensure!(report.passed(), "the books of the frames are wrong: {:?}", report.descriptions);
        }
        let resident =
            if self.policy == CachePolicy::Buffered { image.resident(self.data)? } else { Vec::new() };
        let copies = copies::count(&guests, &self.plan(0), memory, &resident)?;
        for guest in &guests {
            guest.vm.stop();
        }
        drop(limited);
        Ok(self.cell(&work, &before, &after, copies))
    }

    fn cell(&self, work: &[Work], before: &Counters, after: &Counters, copies: Copies) -> Cell {
        let sum = |figure: fn(&Work) -> u64| work.iter().map(figure).sum::<u64>();
        let most = |figure: fn(&Work) -> f64| work.iter().map(figure).fold(0.0, f64::max);
        let misses = after.read - before.read;
        let storage = after.storage - before.storage;
        let of_misses = |count: u64| count as f64 / misses.max(1) as f64;
        let host_hit_ratio = match self.policy {
            CachePolicy::None => 0.0,
            // Readahead counts against the policy.
            CachePolicy::Buffered => (1.0 - of_misses(storage)).max(0.0),
            _ => of_misses(after.from_host - before.from_host),
        };
        Cell {
            workload: self.workload.name(self.client, self.depth),
            policy: self.policy.to_string(),
            vms: self.vms,
            guest_blocks: self.guest,
            host_blocks: self.host,
            data_blocks: self.data,
            guest_hit_ratio: sum(|work| work.hits) as f64 / sum(|work| work.blocks).max(1) as f64,
            other_guest_hit_ratio: of_misses(after.from_guests - before.from_guests),
            host_hit_ratio,
            disk_reads: storage,
            misses,
            blocks_per_second: work.iter().map(|work| work.bytes_per_second() / BLOCK_BYTES as f64).sum(),
            p50_us: most(|work| work.p50),
            p99_us: most(|work| work.p99),
            host_cpu_us: after.cpu.saturating_sub(before.cpu).as_secs_f64() * 1e6 / misses.max(1) as f64,
            host_bytes: copies.host * BLOCK_BYTES,
            twice_bytes: copies.twice * BLOCK_BYTES,
        }
    }
}
