//! The requests of the API, and their handling.

use hyper::{Method, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::VERSION;
use super::balloon::StartHinting;
use super::controller::Controller;
use super::fault::Fault;
use super::model::{
    ActionInfo, ActionType, Drive, DriveUpdate, NetworkInterface, NetworkInterfaceUpdate, VmUpdate,
};

/// The response to a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    /// A JSON body, if there is one.
    pub(super) body: Option<Vec<u8>>,
}

impl Answer {
    fn done() -> Self {
        Self { status: StatusCode::NO_CONTENT, body: None }
    }

    fn of(value: &impl Serialize) -> Result<Self, Fault> {
        let body = serde_json::to_vec(value).map_err(|error| Fault {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            message: format!("The answer cannot be written: {error}."),
        })?;
        Ok(Self { status: StatusCode::OK, body: Some(body) })
    }
}

impl From<Fault> for Answer {
    fn from(fault: Fault) -> Self {
        let body = json!({ "fault_message": fault.message }).to_string().into_bytes();
        Self { status: fault.status, body: Some(body) }
    }
}

/// Carries out a request.
pub(super) fn answer(controller: &mut Controller, method: &Method, path: &str, body: &[u8]) -> Answer {
    route(controller, method, path, body).unwrap_or_else(Answer::from)
}

fn route(controller: &mut Controller, method: &Method, path: &str, body: &[u8]) -> Result<Answer, Fault> {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty()).collect();
    check_body(method, &parts, body)?;
    let done = |()| Answer::done();
    match (method.as_str(), parts.as_slice()) {
        ("GET", []) => Answer::of(&controller.info()),
        ("GET", ["version"]) => Answer::of(&json!({ "firecracker_version": VERSION })),
        ("GET", ["vm", "config"]) => Answer::of(&controller.configuration()),
        ("GET", ["machine-config"]) => Answer::of(controller.machine_config()),
        ("PUT", ["machine-config"]) => controller.set_machine_config(parse(body)?).map(done),
        ("PATCH", ["machine-config"]) => controller.change_machine_config(parse(body)?).map(done),
        ("PUT", ["boot-source"]) => controller.set_boot_source(parse(body)?).map(done),
        ("PUT", ["drives", id]) => {
            let drive: Drive = parse(body)?;
            check_id(id, &drive.drive_id)?;
            controller.set_drive(drive).map(done)
        }
        ("PATCH", ["drives", id]) => {
            let change: DriveUpdate = parse(body)?;
            check_id(id, &change.drive_id)?;
            controller.change_drive(&change).map(done)
        }
        ("PUT", ["actions"]) => match parse::<ActionInfo>(body)?.action_type {
            ActionType::InstanceStart => controller.start().map(done),
            ActionType::SendCtrlAltDel => controller.ctrl_alt_del().map(done),
            ActionType::FlushMetrics => controller.flush_metrics().map(done),
        },
        ("PATCH", ["vm"]) => controller.want(parse::<VmUpdate>(body)?.state).map(done),
        ("PUT", ["logger"]) => controller.set_logger(parse(body)?).map(done),
        ("PUT", ["metrics"]) => controller.set_metrics(parse(body)?).map(done),
        ("PUT", ["serial"]) => controller.set_serial(parse(body)?).map(done),
        ("PUT", ["network-interfaces", id]) => {
            let interface: NetworkInterface = parse(body)?;
            check_id(id, &interface.iface_id)?;
            controller.set_network(interface).map(done)
        }
        ("PATCH", ["network-interfaces", id]) => {
            let change: NetworkInterfaceUpdate = parse(body)?;
            check_id(id, &change.iface_id)?;
            controller.change_network(&change).map(done)
        }
        ("GET", ["mmds"]) => Answer::of(&controller.mmds()?),
        ("PUT", ["mmds"]) => controller.put_mmds(parse(body)?).map(done),
        ("PATCH", ["mmds"]) => controller.patch_mmds(&parse(body)?).map(done),
        ("PUT", ["mmds", "config"]) => controller.set_mmds_config(parse(body)?).map(done),
        ("PUT", ["vsock"]) => controller.set_vsock(parse(body)?).map(done),
        ("PUT", ["entropy"]) => controller.set_entropy(parse(body)?).map(done),
        ("GET", ["balloon"]) => Answer::of(&controller.balloon()?),
        ("PUT", ["balloon"]) => controller.set_balloon(parse(body)?).map(done),
        ("PATCH", ["balloon"]) => controller.change_balloon(parse(body)?).map(done),
        ("GET", ["balloon", "statistics"]) => Answer::of(&controller.balloon_stats()?),
        ("PATCH", ["balloon", "statistics"]) => controller.change_balloon_stats(parse(body)?).map(done),
        ("GET", ["balloon", "hinting", "status"]) => Answer::of(&controller.hinting_status()?),
        ("PATCH", ["balloon", "hinting", "start"]) => {
            let start = if body.is_empty() { StartHinting::default() } else { parse(body)? };
            controller.start_hinting(start).map(done)
        }
        ("PATCH", ["balloon", "hinting", "stop"]) => controller.stop_hinting().map(done),
        (_, [resource, ..]) if let Some(what) = missing(resource) => Err(Fault::missing(what)),
        ("DELETE", ["network-interfaces", ..]) => Err(Fault::missing("way to unplug a network device")),
        ("DELETE", ["drives", ..]) => Err(Fault::missing("way to unplug a drive")),
        _ => Err(Fault::new(format!("Invalid request method and/or path: {method} {path}."))),
    }
}

/// Returns the feature that samepage lacks for a resource of Firecracker's, or for a part of its
/// configuration file.
pub(super) fn missing(resource: &str) -> Option<&'static str> {
    Some(match resource {
        "snapshot" => "snapshots",
        "cpu-config" => "CPU templates",
        "pmem" => "persistent memory devices",
        "hotplug" | "memory-hotplug" => "memory hot-plug",
        _ => return None,
    })
}

fn check_body(method: &Method, parts: &[&str], body: &[u8]) -> Result<(), Fault> {
    match (method, body.is_empty()) {
        // Their bodies may be left out.
        (&Method::PATCH, true) if parts.starts_with(&["balloon", "hinting"]) => Ok(()),
        (&Method::GET, false) => Err(Fault::new("GET request cannot have a body.")),
        (&Method::PUT, true) => Err(Fault::new("Empty PUT request.")),
        (&Method::PATCH, true) => Err(Fault::new("Empty PATCH request.")),
        _ => Ok(()),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|error| {
        Fault::new(format!("An error occurred when deserializing the json body of a request: {error}."))
    })
}

fn check_id(path: &str, body: &str) -> Result<(), Fault> {
    if path != body {
        return Err(Fault::new(format!(
            "The id from the path [{path}] does not match the id from the body [{body}]!"
        )));
    }
    if !path.chars().all(|c| c.is_alphanumeric() || c == '_') {
        return Err(Fault::new("API Resource IDs can only contain alphanumeric characters and underscores."));
    }
    Ok(())
}

/// Applies a part of a configuration file like a client's request.
pub(super) fn put(controller: &mut Controller, path: &str, value: &Value) -> Result<(), Fault> {
    route(controller, &Method::PUT, path, value.to_string().as_bytes()).map(drop)
}
