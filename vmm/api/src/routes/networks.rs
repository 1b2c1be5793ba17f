//! `/vms/{vm}/networks`: the network devices of a VM.

use axum::Json;
use samepage_api_types::problem::Kind;
use samepage_api_types::views::devices::NetworkView;
use samepage_host::record::Record;
use samepage_spec::RateLimits;
use samepage_worker::machine::DeviceChange;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{self, Vm, VmAndDisk};
use crate::problem::Refusal;
use crate::views::devices::networks;

/// List a VM's network devices
#[utoipa::path(
    get, path = "/vms/{vm}/networks", operation_id = "list_networks", tag = "vms", params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = Vec<NetworkView>))
)]
pub(super) async fn list(Vm(record): Vm) -> Json<Vec<NetworkView>> {
    Json(networks(&record))
}

/// Show a network device
#[utoipa::path(
    get, path = "/vms/{vm}/networks/{network}", operation_id = "get_network", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name"), ("network" = String, Path, description = "The device's name")),
    responses((status = 200, body = NetworkView))
)]
pub(super) async fn show(VmAndDisk(record, id): VmAndDisk) -> Result<Json<NetworkView>, Refusal> {
    find(&record, &id).map(Json)
}

/// A change of a network device, until the VM boots again.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NetworkChange {
    /// Whether frames pass. The guest sees the link go up or down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) link_up: Option<bool>,
    /// Limits per second for what the guest receives. Omitted limits are removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) receive: Option<RateLimits>,
    /// Limits per second for what the guest sends. Omitted limits are removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) send: Option<RateLimits>,
}

/// Change a network device's link or limits
#[utoipa::path(
    patch, path = "/vms/{vm}/networks/{network}", operation_id = "change_network", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name"), ("network" = String, Path, description = "The device's name")),
    request_body = NetworkChange, responses((status = 200, body = NetworkView))
)]
pub(super) async fn change(
    VmAndDisk(record, id): VmAndDisk,
    extract::Json(NetworkChange { link_up, receive, send }): extract::Json<NetworkChange>,
) -> Result<Json<NetworkView>, Refusal> {
    if link_up.is_none() && receive.is_none() && send.is_none() {
        let problem = Refusal::new(Kind::BadRequest, "the body changes nothing");
        return Err(problem.help("give link_up, receive or send"));
    }
    for (direction, limits) in [("receive", receive), ("send", send)] {
        if let Some((place, reason)) = limits.iter().flat_map(RateLimits::faults).next() {
            let place = place.strip_prefix("limits/").unwrap_or(place);
            return Err(Refusal::new(Kind::InvalidConfiguration, reason).at(format!("/{direction}/{place}")));
        }
    }
    find(&record, &id)?;
    let closed = || {
        let name = record.state().name();
        let detail = format!("VM {} is {name} and has no open network devices", record.name());
        Refusal::new(Kind::IllegalTransition, detail).help("start the VM first")
    };
    let vm = record.vm().ok_or_else(closed)?;
    let changes = [
        receive.map(DeviceChange::NetworkReceive),
        send.map(DeviceChange::NetworkSend),
        link_up.map(DeviceChange::NetworkLink),
    ];
    for change in changes.into_iter().flatten() {
        vm.change_device(&id, change).map_err(|_| closed())?;
    }
    find(&record, &id).map(Json)
}

fn find(record: &Record, id: &str) -> Result<NetworkView, Refusal> {
    networks(record).into_iter().find(|network| network.id == id).ok_or_else(|| {
        Refusal::new(Kind::NoSuchResource, format!("VM {} has no network device {id}", record.name()))
            .help(format!("GET /vms/{}/networks lists its network devices", record.name()))
    })
}
