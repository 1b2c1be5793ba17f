//! `/sharing`, `/cache`: the memory that VMs share, and the disk blocks that the host caches.

use crate::views;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::vms::turn;
use crate::extract::{self, Parameters, Vm, blocking, json, to_json};
use crate::problem::Refusal;
use crate::server::Api;
use samepage_api_types::problem::Kind;
use samepage_api_types::views::{CacheView, PairView, SharingView, VmSharingView, WorkingSetView};
use samepage_host::statistics::MOST_PAIRS;
use samepage_spec::SharingMode;

/// Show what a VM shares
#[utoipa::path(
    get, path = "/vms/{vm}/sharing", operation_id = "get_vm_sharing", tag = "sharing",
    params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = VmSharingView))
)]
pub(super) async fn of_vm(
    State(api): State<Arc<Api>>,
    Vm(record): Vm,
) -> Result<Json<VmSharingView>, Refusal> {
    let seen = api.sampling.current(&api.registry).await.map_err(sampling_failed)?;
    let sample = seen.vm(record.name()).map(|vm| (seen.sample.time_seconds, vm));
    Ok(Json(views::vm_sharing(&record, sample)))
}

/// A change of a VM's sharing.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SharingChange {
    /// Which pages are shared from now on. Pages that are no longer shared get private memory step by step.
    pub mode: SharingMode,
}

/// Change what a VM shares
#[utoipa::path(
    patch, path = "/vms/{vm}/sharing", operation_id = "change_vm_sharing", tag = "sharing",
    params(("vm" = String, Path, description = "The VM's name")),
    request_body = SharingChange, responses((status = 200, body = VmSharingView))
)]
pub(super) async fn change_vm(
    State(api): State<Arc<Api>>,
    Vm(record): Vm,
    extract::Json(SharingChange { mode }): extract::Json<SharingChange>,
) -> Result<Json<VmSharingView>, Refusal> {
    let turn = turn(&api, &record).await?;
    let registry = api.registry.clone();
    blocking(move || registry.set_mode(&turn, mode)).await?;
    Ok(Json(views::vm_sharing(&record, None)))
}

/// Show what is shared
///
/// Returns the engine's settings and statistics, and the groups of VMs that share memory. The sample is at most
/// a second old, or some seconds old after a time without requests.
#[utoipa::path(get, path = "/sharing", operation_id = "get_sharing", tag = "sharing", responses((status = 200, body = SharingView)))]
pub(super) async fn of_process(State(api): State<Arc<Api>>) -> Result<Response, Refusal> {
    let seen = api.sampling.current(&api.registry).await.map_err(sampling_failed)?;
    let (settings, sharing) = (api.registry.settings(), api.registry.sharing().map(Arc::as_ref));
    let write = || to_json(&views::sharing(&seen.sample, settings, sharing));
    Ok(json(api.caches.sharing.get(Some(&seen), 0, write)?))
}

/// The length of a list.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Most {
    /// Upper limit for the number of pairs. 496 are known: all pairs of 32 VMs.
    #[serde(default = "default_pairs")]
    #[param(minimum = 0, maximum = 496, default = 100)]
    limit: u32,
}

fn default_pairs() -> u32 {
    100
}

/// Show which VMs share with each other
///
/// Returns the pairs of VMs that share most, largest first, as estimated from a sample of the frames.
#[utoipa::path(
    get, path = "/sharing/pairs", operation_id = "list_pairs", tag = "sharing", params(Most),
    responses((status = 200, body = Vec<PairView>))
)]
pub(super) async fn pairs(
    State(api): State<Arc<Api>>,
    Parameters(Most { limit }): Parameters<Most>,
) -> Result<Json<Vec<PairView>>, Refusal> {
    if limit as usize > MOST_PAIRS {
        let problem = Refusal::new(Kind::BadRequest, format!("there is no list of {limit} pairs"));
        return Err(problem.help(format!("ask for {MOST_PAIRS} at most")));
    }
    let seen = api.sampling.current(&api.registry).await.map_err(sampling_failed)?;
    Ok(Json(views::most_pairs(&seen.sample, limit as usize)))
}

/// Show the block cache
///
/// Returns which disk blocks the host caches, and where guests' reads came from.
#[utoipa::path(get, path = "/cache", operation_id = "get_cache", tag = "sharing", responses((status = 200, body = CacheView)))]
pub(super) async fn cache(State(api): State<Arc<Api>>) -> Result<Json<CacheView>, Refusal> {
    let seen = api.sampling.current(&api.registry).await.map_err(sampling_failed)?;
    Ok(Json(views::cache(&seen.sample)))
}

/// Show what more memory would save a VM
///
/// Returns an estimate of the disk reads that more memory would save, from the blocks that the guest reads.
#[utoipa::path(
    get, path = "/vms/{vm}/working-set", operation_id = "get_working_set", tag = "sharing",
    params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = WorkingSetView))
)]
pub(super) async fn working_set(
    State(api): State<Arc<Api>>,
    Vm(record): Vm,
) -> Result<Json<WorkingSetView>, Refusal> {
    let seen = api.sampling.current(&api.registry).await.map_err(sampling_failed)?;
    let sample = seen.vm(record.name()).map(|vm| (seen.sample.time_seconds, vm));
    Ok(Json(views::working_set(&record, sample)))
}

/// Returns the problem of a failed sample.
pub(super) fn sampling_failed(error: String) -> Refusal {
    Refusal::new(Kind::Unavailable, error)
}
