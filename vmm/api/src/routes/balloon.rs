//! `/vms/{vm}/balloon`: the memory balloon of a VM.

use axum::Json;
use samepage_api_types::problem::Kind;
use samepage_api_types::views::devices::BalloonView;
use samepage_host::record::Record;
use samepage_spec::{BalloonSpec, Size, optional_balloon_schema};
use samepage_worker::machine::{BALLOON, DeviceChange, DeviceError};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{self, Vm};
use crate::problem::Refusal;
use crate::views::devices::balloon;

/// Show a VM's memory balloon
#[utoipa::path(
    get, path = "/vms/{vm}/balloon", operation_id = "get_balloon", tag = "vms", params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = BalloonView))
)]
pub(super) async fn show(Vm(record): Vm) -> Result<Json<BalloonView>, Refusal> {
    find(&record).map(Json)
}

/// What becomes of hints at free memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum HintsChange {
    /// The guest is asked for hints, and may use the memory again once it has no more.
    Start,
    /// The guest is asked for hints, and keeps the memory unused until they are stopped.
    Hold,
    /// The guest may use the memory again.
    Stop,
}

/// A change of a memory balloon, until the VM boots again.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct BalloonChange {
    /// The memory that the guest is to give up. It gets what is above that back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = optional_balloon_schema)]
    pub(crate) size: Option<Size>,
    /// The time between two questions for statistics of the guest's memory, in seconds; 0 for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 65_535)]
    pub(crate) stats_interval: Option<u32>,
    /// Start or stop hints at free memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hints: Option<HintsChange>,
}

/// Change a memory balloon's size, or ask for statistics or hints
///
/// The answer does not wait until the guest has done its part. An event tells when the balloon has its size.
#[utoipa::path(
    patch, path = "/vms/{vm}/balloon", operation_id = "change_balloon", tag = "vms", params(("vm" = String, Path, description = "The VM's name")),
    request_body = BalloonChange, responses((status = 200, body = BalloonView))
)]
pub(super) async fn change(
    Vm(record): Vm,
    extract::Json(BalloonChange { size, stats_interval, hints }): extract::Json<BalloonChange>,
) -> Result<Json<BalloonView>, Refusal> {
    if size.is_none() && stats_interval.is_none() && hints.is_none() {
        let problem = Refusal::new(Kind::BadRequest, "the body changes nothing");
        return Err(problem.help("give size, stats_interval or hints"));
    }
    let memory = record.spec().memory;
    let too_much = size.and_then(|size| BalloonSpec::fault_of_size(size, memory)).map(|why| ("/size", why));
    let too_long =
        stats_interval.and_then(BalloonSpec::fault_of_interval).map(|why| ("/stats_interval", why));
    if let Some((place, reason)) = too_much.or(too_long) {
        return Err(Refusal::new(Kind::InvalidConfiguration, reason).at(place));
    }
    find(&record)?;
    let closed = || {
        let name = record.state().name();
        let detail = format!("VM {} is {name} and has no balloon until it is started", record.name());
        Refusal::new(Kind::IllegalTransition, detail).help("start the VM first")
    };
    let vm = record.vm().ok_or_else(closed)?;
    let hints = hints.map(|hints| match hints {
        HintsChange::Start => DeviceChange::BalloonHints(true),
        HintsChange::Hold => DeviceChange::BalloonHints(false),
        HintsChange::Stop => DeviceChange::BalloonHintsEnd,
    });
    // What may be refused comes first.
    let changes =
        [hints, size.map(DeviceChange::BalloonSize), stats_interval.map(DeviceChange::BalloonStatsInterval)];
    for change in changes.into_iter().flatten() {
        vm.change_device(BALLOON, change).map_err(|error| match error {
            DeviceError::Missing => closed(),
            DeviceError::Refused(reason) => Refusal::new(Kind::InvalidConfiguration, reason).at("/hints"),
        })?;
    }
    find(&record).map(Json)
}

fn find(record: &Record) -> Result<BalloonView, Refusal> {
    balloon(record).ok_or_else(|| {
        Refusal::new(Kind::NoSuchResource, format!("VM {} has no memory balloon", record.name()))
            .help("create the VM with a balloon (--balloon on)")
    })
}
