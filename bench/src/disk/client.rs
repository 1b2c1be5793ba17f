//! Guests that use a disk through their own page cache.

use std::path::Path;

use anyhow::Result;
use samepage_devices::disk::CachePolicy;
use samepage_machine::DiskSpec;
use samepage_resources::demo::client::{BLOCK_BYTES, ClientLayout, ClientPlan};
use samepage_resources::demo::plan::{DiskOp, DiskOps, DiskPlan, Plan};
use samepage_resources::demo::report::Report;

use super::super::context::Bench;
use super::super::vms::guests::Guest;
use super::FIRST_DISK;

/// Memory of a guest in addition to its client's, in bytes.
const BESIDES: u64 = 8 << 20;
const MIB: u64 = 1 << 20;

/// Returns a plan for a guest that only uses its disk: this number of passes, with pauses that are long
/// enough to read counters.
pub(crate) fn plan(client: ClientPlan, depth: u32, passes: u64, pause_ms: u64) -> Plan {
    let disk = DiskPlan { ops: DiskOps::new(&[DiskOp::Client]), depth, client, ..DiskPlan::new(FIRST_DISK) };
    Plan {
        alike: 0,
        own: 0,
        zero: 0,
        pages: Some(0),
        rounds: passes,
        every_ms: pause_ms,
        disk: Some(disk),
        ..Plan::default()
    }
}

/// Returns the memory for a guest with such a plan, in bytes.
pub(crate) fn memory(plan: &Plan) -> u64 {
    let client = plan.disk.as_ref().and_then(ClientLayout::new).map_or(0, |layout| layout.bytes);
    (client + BESIDES).next_multiple_of(MIB)
}

/// Returns the disk of such a guest. It is writable only if the plan writes.
pub(crate) fn disk(image: &Path, policy: CachePolicy, plan: &Plan) -> DiskSpec {
    DiskSpec {
        path: image.to_path_buf(),
        id: Some("bench".to_owned()),
        readonly: plan.disk.is_none_or(|disk| disk.client.writes == 0),
        format: Some(samepage_devices::disk::Format::Raw),
        cache: Some(policy),
        ..DiskSpec::default()
    }
}

/// The work of a guest on its disk.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Work {
    /// Blocks used.
    pub(crate) blocks: u64,
    /// Blocks that the guest's cache held.
    pub(crate) hits: u64,
    pub(crate) requests: u64,
    /// Duration in microseconds.
    pub(crate) us: u64,
    /// Median duration of the requests, in microseconds.
    pub(crate) p50: f64,
    /// 99th percentile of the duration of the requests, in microseconds.
    pub(crate) p99: f64,
}

impl Work {
    /// Returns a guest's report about a pass, or about all passes at the end.
    pub(crate) fn of(report: &Report) -> Option<Self> {
        let micros = |nanoseconds: u64| nanoseconds as f64 / 1000.0;
        match *report {
            Report::Client { blocks, hits, requests, us, p50, p99, .. }
            | Report::ClientTotal { blocks, hits, requests, us, p50, p99, .. } => {
                Some(Self { blocks, hits, requests, us, p50: micros(p50), p99: micros(p99) })
            }
            _ => None,
        }
    }

    /// Returns the bytes used per second.
    pub(crate) fn bytes_per_second(&self) -> f64 {
        (self.blocks * BLOCK_BYTES) as f64 * 1e6 / self.us.max(1) as f64
    }
}

/// Waits for the end of the guest's next pass.
///
/// # Errors
/// Fails like [`Guest::wait_for`].
pub(crate) fn wait_pass(bench: &Bench, guest: &Guest) -> Result<Work> {
    guest.wait_for(bench, "the end of a pass over its disk", Work::of)
}
