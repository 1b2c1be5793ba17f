//! `/vms`: create, list, act on and delete VMs.

use crate::views;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{self, Parameters, Vm, VmAndDisk, blocking, json, to_json};
use crate::filter::VmFilter;
use crate::problem::Refusal;
use crate::server::Api;
use samepage_api_types::lifecycle::Action;
use samepage_api_types::problem::Kind;
use samepage_api_types::views::{DiskView, VmSummary, VmView};
use samepage_host::error::HostError;
use samepage_host::record::{Cause, Record, Turn};
use samepage_host::registry::Registry;
use samepage_host::validated::validate;
use samepage_machine::vm::TimeToEnd;
use samepage_spec::{CachePolicy, RateLimits, VmSpec};
use samepage_worker::machine::{DeviceChange, DeviceError, Machine};

/// List VMs
///
/// Returns VMs by name, including those that have ended: all VMs, or those that match the parameters.
#[utoipa::path(
    get, path = "/vms", operation_id = "list_vms", tag = "vms", params(VmFilter), responses((status = 200, body = Vec<VmSummary>))
)]
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    Parameters(filter): Parameters<VmFilter>,
) -> Result<Response, Refusal> {
    let revision = api.registry.revision();
    let seen = api.sampling.of(&api.registry.list(), &api.registry).await;
    let write = || {
        let sample = |record: &Record| seen.as_ref()?.vm(record.name());
        let vms = api.registry.list();
        let meant = vms.iter().filter(|record| filter.fits(record));
        to_json(&meant.map(|record| views::summary(record, sample(record))).collect::<Vec<_>>())
    };
    // Most clients ask for all VMs, so that response is cached.
    let vms = if filter.is_all() { api.caches.vms.get(seen.as_ref(), revision, write)? } else { write()? };
    Ok(json(vms))
}

/// Create a VM
///
/// If this fails, nothing is left of the VM.
#[utoipa::path(
    post, path = "/vms", operation_id = "create_vm", tag = "vms", request_body = VmSpec,
    responses((status = 201, body = VmView, headers(("Location" = String, description = "The VM's path"))))
)]
pub(super) async fn create(
    State(api): State<Arc<Api>>,
    extract::Json(spec): extract::Json<VmSpec>,
) -> Result<impl IntoResponse, Refusal> {
    let registry = api.registry.clone();
    let record = blocking(move || {
        let start = spec.start.unwrap_or(false);
        let record = registry.create(vec![validate(spec, None).map_err(HostError::from)?])?.remove(0);
        // If the turn is taken, another client has already acted on the VM, and that action wins.
        if start && let Some(turn) = record.try_turn() {
            registry.act(&turn, Action::Start)?;
        }
        Ok(record)
    })
    .await?;
    let location = format!("/vms/{}", record.name());
    Ok((StatusCode::CREATED, [(LOCATION, location)], Json(view(&api, &record))))
}

fn view(api: &Api, record: &Record) -> VmView {
    let seen = api.sampling.latest(&api.registry);
    views::vm(record, seen.as_ref().and_then(|seen| seen.vm(record.name())))
}

/// Show a VM
#[utoipa::path(
    get, path = "/vms/{vm}", operation_id = "get_vm", tag = "vms", params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = VmView))
)]
pub(super) async fn show(State(api): State<Arc<Api>>, Vm(record): Vm) -> Json<VmView> {
    let seen = api.sampling.of(std::slice::from_ref(&record), &api.registry).await;
    Json(views::vm(&record, seen.as_ref().and_then(|seen| seen.vm(record.name()))))
}

/// Delete a VM
///
/// A running VM is killed first, without asking its guest. When the response arrives, all memory of the VM is
/// freed.
#[utoipa::path(
    delete, path = "/vms/{vm}", operation_id = "delete_vm", tag = "vms", params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 204, description = "The VM is deleted"))
)]
pub(super) async fn delete(State(api): State<Arc<Api>>, Vm(record): Vm) -> Result<StatusCode, Refusal> {
    remove(&api, &record).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Ends and deletes a VM.
pub(super) async fn remove(api: &Api, record: &Arc<Record>) -> Result<(), Refusal> {
    // Another operation that waits for the VM can stop waiting.
    if let Some(vm) = record.vm() {
        record.note_cause(Cause::Deleted);
        vm.request_stop();
    }
    let turn = turn(api, record).await?;
    let registry = api.registry.clone();
    let delete = move || {
        registry.delete(&turn);
        Ok(())
    };
    blocking(delete).await
}

/// A request for an action.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ActionRequest {
    /// The action.
    pub action: Action,
    /// How long the guest may take to stop before the VM is killed, in seconds. By default 30. For `stop` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 86_400)]
    pub timeout_seconds: Option<u32>,
}

/// Default time for a guest to stop, in seconds.
const STOP_TIMEOUT: u32 = 30;
/// Longest time for a guest to stop, in seconds.
pub(super) const LONGEST_STOP_TIMEOUT: u32 = 86_400;

/// Act on a VM
///
/// The response arrives when the action is done. The VM's state determines which actions are possible.
#[utoipa::path(
    post, path = "/vms/{vm}/actions", operation_id = "act_on_vm", tag = "vms", params(("vm" = String, Path, description = "The VM's name")),
    request_body = ActionRequest, responses((status = 200, body = VmSummary))
)]
pub(super) async fn act(
    State(api): State<Arc<Api>>,
    Vm(record): Vm,
    extract::Json(request): extract::Json<ActionRequest>,
) -> Result<Json<VmSummary>, Refusal> {
    let ActionRequest { action, timeout_seconds } = request;
    check_timeout(action, timeout_seconds)?;
    if action == Action::Kill {
        api.registry.check(&record, action)?;
        // Another operation that waits for the VM can stop waiting.
        if let Some(vm) = record.vm() {
            record.note_cause(Cause::Killed);
            vm.request_stop();
        }
    }
    let turn = turn(&api, &record).await?;
    let registry = api.registry.clone();
    match action {
        Action::Stop => stop(registry, turn, timeout_seconds.unwrap_or(STOP_TIMEOUT)).await?,
        Action::Kill => {
            let end = move || {
                registry.end(turn.record(), Cause::Killed);
                Ok(())
            };
            blocking(end).await?;
        }
        _ => blocking(move || registry.act(&turn, action).map(drop)).await?,
    }
    Ok(Json(views::summary(&record, None)))
}

fn check_timeout(action: Action, seconds: Option<u32>) -> Result<(), Refusal> {
    let reason = match seconds {
        None => return Ok(()),
        Some(_) if action != Action::Stop => format!("{} has no timeout", action.name()),
        Some(0..=LONGEST_STOP_TIMEOUT) => return Ok(()),
        Some(seconds) => format!("{seconds} seconds: {LONGEST_STOP_TIMEOUT} is the longest timeout"),
    };
    Err(Refusal::new(Kind::BadRequest, reason).at("/timeout_seconds"))
}

/// Asks a guest to stop, and kills the VM if it does not stop in time. Continues even if the client
/// disconnects.
async fn stop(registry: Arc<Registry>, turn: Turn, seconds: u32) -> Result<(), Refusal> {
    let work = async move {
        let asked = registry.clone();
        let turn = blocking(move || asked.act(&turn, Action::Stop).map(|_| turn)).await?;
        let record = turn.record().clone();
        wait_for_end(&record, TimeToEnd::new(Duration::from_secs(seconds.into()))).await;
        // Whatever happened, end what is left.
        let end = move || {
            registry.end(turn.record(), Cause::NotInTime(seconds));
            Ok(())
        };
        blocking(end).await
    };
    tokio::spawn(work).await.unwrap_or_else(|_| Err(Refusal::new(Kind::Internal, "the operation panicked")))
}

/// Waits for the end of a guest that was asked, up to a time, and asks it again meanwhile.
async fn wait_for_end(record: &Record, time: TimeToEnd) {
    while tokio::time::timeout(time.until_next(), record.collected()).await.is_err() {
        if time.left().is_zero() {
            return;
        }
        if let Some(vm) = record.vm() {
            vm.ask_again(time.is_short());
        }
    }
}

/// Act on a VM
///
/// The same as POST.
#[utoipa::path(
    put, path = "/vms/{vm}/actions", operation_id = "put_vm_action", tag = "vms", params(("vm" = String, Path, description = "The VM's name")),
    request_body = ActionRequest, responses((status = 200, body = VmSummary))
)]
pub(super) async fn put_action(
    api: State<Arc<Api>>,
    vm: Vm,
    body: extract::Json<ActionRequest>,
) -> Result<Json<VmSummary>, Refusal> {
    act(api, vm, body).await
}

/// Returns the right to operate on a VM that still exists.
pub(super) async fn turn(api: &Api, record: &Arc<Record>) -> Result<Turn, Refusal> {
    let busy = || {
        Refusal::new(Kind::Busy, format!("another operation on VM {} is in progress", record.name()))
            .help("try again")
    };
    let turn = record.turn().await.ok_or_else(busy)?;
    // The VM may have been deleted meanwhile, and another VM may have its name.
    match api.registry.find(record.name()) {
        Ok(present) if Arc::ptr_eq(&present, record) => Ok(turn),
        _ => Err(HostError::NoSuchVm(record.name().to_owned()).into()),
    }
}

/// List a VM's disks
#[utoipa::path(
    get, path = "/vms/{vm}/disks", operation_id = "list_disks", tag = "vms", params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = Vec<DiskView>))
)]
pub(super) async fn disks(Vm(record): Vm) -> Json<Vec<DiskView>> {
    Json(views::disks(&record))
}

/// Show a disk
#[utoipa::path(
    get, path = "/vms/{vm}/disks/{disk}", operation_id = "get_disk", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name"), ("disk" = String, Path, description = "The disk's name")),
    responses((status = 200, body = DiskView))
)]
pub(super) async fn disk(VmAndDisk(record, id): VmAndDisk) -> Result<Json<DiskView>, Refusal> {
    find_disk(&record, &id).map(Json)
}

/// A change of a disk.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DiskChange {
    /// Limits per second, until the VM boots again. Omitted limits are removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) limits: Option<RateLimits>,
    /// The cache policy for further reads, until the VM boots again. Disks that were opened with `exclusive`,
    /// `scrub` or `inclusive` can change between these and `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cache: Option<CachePolicy>,
}

/// Change a disk's limits or cache
#[utoipa::path(
    patch, path = "/vms/{vm}/disks/{disk}", operation_id = "change_disk", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name"), ("disk" = String, Path, description = "The disk's name")),
    request_body = DiskChange, responses((status = 200, body = DiskView))
)]
pub(super) async fn change_disk(
    VmAndDisk(record, id): VmAndDisk,
    extract::Json(DiskChange { limits, cache }): extract::Json<DiskChange>,
) -> Result<Json<DiskView>, Refusal> {
    if limits.is_none() && cache.is_none() {
        let problem = Refusal::new(Kind::BadRequest, "the body changes nothing");
        return Err(problem.help("give limits, cache or both"));
    }
    if let Some((place, reason)) = limits.iter().flat_map(RateLimits::faults).next() {
        return Err(Refusal::new(Kind::InvalidConfiguration, reason).at(format!("/{place}")));
    }
    let vm = running(&record, &id)?;
    if let Some(cache) = cache {
        // Check first what can be refused, so that the whole change is made or nothing.
        change(&record, &vm, &id, DeviceChange::DiskCache(cache))
            .map_err(|refusal| refusal.at("/cache").help("create the VM with this cache policy"))?;
    }
    if let Some(limits) = limits {
        change(&record, &vm, &id, DeviceChange::DiskLimits(limits))?;
    }
    find_disk(&record, &id).map(Json)
}

/// Adopt a disk's new size
///
/// For an image or a block device that has grown or shrunk. The guest gets the new size, and requests beyond the
/// end fail from then on. Images in qcow2 format keep their size while a VM uses them.
#[utoipa::path(
    post, path = "/vms/{vm}/disks/{disk}/resize", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name"), ("disk" = String, Path, description = "The disk's name")),
    responses((status = 200, body = DiskView))
)]
pub(super) async fn resize_disk(VmAndDisk(record, id): VmAndDisk) -> Result<Json<DiskView>, Refusal> {
    // A file system may take its time.
    let resize = move || {
        let vm = running(&record, &id)?;
        change(&record, &vm, &id, DeviceChange::DiskSize)?;
        find_disk(&record, &id).map(Json)
    };
    blocking(move || Ok(resize())).await?
}

/// The VM, if it has a disk of that name and is there to use it.
fn running(record: &Record, id: &str) -> Result<Arc<dyn Machine>, Refusal> {
    find_disk(record, id)?;
    record.vm().ok_or_else(|| no_disks(record))
}

fn change(record: &Record, vm: &Arc<dyn Machine>, id: &str, change: DeviceChange) -> Result<(), Refusal> {
    vm.change_device(id, change).map_err(|error| match error {
        DeviceError::Missing => no_disks(record),
        DeviceError::Refused(reason) => Refusal::new(Kind::IllegalTransition, reason),
    })
}

fn no_disks(record: &Record) -> Refusal {
    let detail = format!("VM {} is {} and has no open disks", record.name(), record.state().name());
    Refusal::new(Kind::IllegalTransition, detail).help("start the VM first")
}

fn find_disk(record: &Record, id: &str) -> Result<DiskView, Refusal> {
    views::disks(record).into_iter().find(|disk| disk.id == id).ok_or_else(|| {
        Refusal::new(Kind::NoSuchResource, format!("VM {} has no disk {id}", record.name()))
            .help(format!("GET /vms/{}/disks lists its disks", record.name()))
    })
}
