//! `/pages`: the use of VMs' pages, how much of it is shared, and maps of memory.

use crate::views;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;

use super::sharing::sampling_failed;
use crate::extract::{Parameters, Vm, json, to_json};
use crate::maps::MOST_CELLS;
use crate::problem::Refusal;
use crate::server::Api;
use samepage_api_types::problem::Kind;
use samepage_api_types::views::pages::{MapView, PagesView, VmPagesView};

/// Show what all VMs' pages are used for
///
/// By the page types that agents in the guests publish: how many pages of each type are shared, for how long,
/// and what that saves.
/// Pages of guests without an agent are of type `unknown`.
#[utoipa::path(get, path = "/pages", operation_id = "get_pages", tag = "sharing", responses((status = 200, body = PagesView)))]
pub(super) async fn of_process(State(api): State<Arc<Api>>) -> Result<Json<PagesView>, Refusal> {
    let seen = api.sampling.current(&api.registry).await.map_err(sampling_failed)?;
    Ok(Json(views::pages::of_all(&seen.sample)))
}

/// Show what a VM's pages are used for
///
/// By the page types that an agent in the guest publishes, and how many pages of each type are shared.
#[utoipa::path(
    get, path = "/vms/{vm}/pages", operation_id = "get_vm_pages", tag = "sharing",
    params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = VmPagesView))
)]
pub(super) async fn of_vm(State(api): State<Arc<Api>>, Vm(record): Vm) -> Result<Json<VmPagesView>, Refusal> {
    let seen = api.sampling.current(&api.registry).await.map_err(sampling_failed)?;
    let sample = seen.vm(record.name()).map(|vm| (seen.sample.time_seconds, vm));
    Ok(Json(views::pages::of_vm(&record, sample)))
}

/// The resolution of a map.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Fineness {
    /// Upper limit for the number of cells.
    #[serde(default = "default_cells")]
    #[param(minimum = 1, maximum = 16_384, default = 1024)]
    cells: u32,
}

fn default_cells() -> u32 {
    1024
}

/// Show a VM's memory as a picture
///
/// Returns the pages in order, in cells of equal size: how each cell is backed, and what it is used for if an
/// agent in the guest publishes that. The sample is at most a second old, or older if sampling takes long.
#[utoipa::path(
    get, path = "/vms/{vm}/pages/map", operation_id = "get_vm_map", tag = "sharing",
    params(("vm" = String, Path, description = "The VM's name"), Fineness),
    responses((status = 200, body = MapView))
)]
pub(super) async fn map(
    State(api): State<Arc<Api>>,
    Vm(record): Vm,
    Parameters(Fineness { cells }): Parameters<Fineness>,
) -> Result<Response, Refusal> {
    if !(1..=MOST_CELLS).contains(&cells) {
        let problem = Refusal::new(Kind::BadRequest, format!("there is no map of {cells} cells"));
        return Err(problem.help(format!("ask for 1 to {MOST_CELLS} cells")));
    }
    let map = api.maps.map(&record, cells).await.map_err(sampling_failed)?;
    Ok(json(to_json(&map)?))
}
