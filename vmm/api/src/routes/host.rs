//! `/host` and `/version`: the host and the program.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::sharing::sampling_failed;
use crate::extract::blocking;
use crate::problem::Refusal;
use crate::server::Api;
use samepage_api_types::views::memory::{HeldView, MemoryView};
use samepage_host::host_limits::{HostMemory, total_bytes};
use samepage_machine::huge_pages;

/// The host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct HostView {
    /// The release of the kernel.
    pub kernel: String,
    /// Processors that this process may use.
    pub processors: usize,
    /// The memory.
    pub memory: HostMemoryView,
    /// Limits of this process.
    pub limits: LimitsView,
    /// Features for VMs.
    pub features: FeaturesView,
}

/// The host's memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct HostMemoryView {
    /// All memory.
    pub total_bytes: u64,
    /// Memory that new guests may use before the host runs short; absent if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
    /// The limit that `available_bytes` comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limited_by: Option<String>,
    /// Part of the last 10 seconds in which some task waited for memory, in percent
    /// (`/proc/pressure/memory`); absent if the kernel does not report it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pressure_percent: Option<f64>,
}

/// Limits of a process, and what it uses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct LimitsView {
    /// Mappings of this process.
    pub mappings: u64,
    /// The limit for mappings (vm.max_map_count).
    pub mappings_limit: u64,
    /// Files that this process has open.
    pub open_files: u64,
    /// The limit for open files (ulimit -n).
    pub open_files_limit: u64,
}

/// Features of the host for VMs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct FeaturesView {
    /// Whether memory is shared.
    pub sharing: bool,
    /// Whether memory can be backed with huge pages.
    pub huge_pages: bool,
}

/// Show how short memory is, and for how long VMs were held
#[utoipa::path(get, path = "/memory", operation_id = "get_memory", tag = "process", responses((status = 200, body = MemoryView)))]
pub(super) async fn memory(State(api): State<Arc<Api>>) -> Json<MemoryView> {
    let report = api.registry.memory.report();
    let held = api.registry.list().into_iter().filter_map(|record| {
        let held = api.registry.held(&record);
        (held.longest > Duration::ZERO).then(|| HeldView {
            vm: record.name().to_owned(),
            held: held.now.is_some(),
            held_seconds: held.total.as_secs_f64(),
            longest_seconds: held.longest.as_secs_f64(),
        })
    });
    Json(MemoryView {
        governed: report.governed,
        state: report.state,
        room_bytes: report.room_bytes,
        of_bytes: report.of_bytes,
        reserve_bytes: report.reserve_bytes,
        claims_bytes: report.claims_bytes,
        changes: report.changes,
        longest_seconds: report.longest.as_secs_f64(),
        vms: held.collect(),
    })
}

/// Show the host
#[utoipa::path(get, path = "/host", operation_id = "get_host", tag = "process", responses((status = 200, body = HostView)))]
pub(super) async fn host(State(api): State<Arc<Api>>) -> Result<Json<HostView>, Refusal> {
    let seen = api.sampling.current(&api.registry).await.map_err(sampling_failed)?;
    let engine = &seen.sample.engine;
    let (mappings, mappings_limit, sharing) = (engine.mappings, engine.mappings_limit, seen.sample.sharing);
    let view = blocking(move || {
        let memory = HostMemory::measure();
        Ok(HostView {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory: HostMemoryView {
                total_bytes: total_bytes().unwrap_or(0),
                available_bytes: memory.as_ref().map(|memory| memory.available),
                limited_by: memory.map(|memory| memory.limited_by.to_string()),
                pressure_percent: pressure(&read("/proc/pressure/memory")),
            },
            limits: LimitsView {
                mappings,
                mappings_limit,
                open_files: fs::read_dir("/proc/self/fd").map_or(0, |files| files.count() as u64),
                open_files_limit: number_after(&read("/proc/self/limits"), "Max open files").unwrap_or(0),
            },
            features: FeaturesView { sharing, huge_pages: huge_pages::unavailable().is_none() },
        })
    });
    Ok(Json(view.await?))
}

/// Returns a file of the kernel, or an empty text if the file does not exist.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Returns the first number on the line with this start.
fn number_after(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

fn pressure(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    some.split_whitespace().find_map(|field| field.strip_prefix("avg10="))?.parse().ok()
}

/// The program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct VersionView {
    /// The name of the program.
    pub name: String,
    /// The version of the program.
    pub version: String,
    /// The ID of the process.
    pub pid: u32,
}

/// Show the version
#[utoipa::path(get, path = "/version", operation_id = "get_version", tag = "process", responses((status = 200, body = VersionView)))]
pub(super) async fn version() -> Json<VersionView> {
    let (name, version) = ("samepage".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
    Json(VersionView { name, version, pid: std::process::id() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let limits =
            "Limit Soft Limit\nMax open files            1024                 4096                 files\n";
        assert_eq!(number_after(limits, "Max open files"), Some(1024));
        assert_eq!(number_after("MemTotal:  10 kB\n", "MemTotal:"), Some(10));
        assert_eq!(number_after("", "MemTotal:"), None);
        let text = "some avg10=1.25 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00\n";
        assert_eq!(pressure(text), Some(1.25));
        assert_eq!(pressure(""), None);
    }
}
