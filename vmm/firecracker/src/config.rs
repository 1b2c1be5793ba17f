//! Firecracker's configuration files: the requests of a client in one JSON object.

use std::fs;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

use super::controller::Controller;
use super::fault::Fault;
use super::requests::{missing, put};

/// The parts that correspond to requests, in the order of the requests.
const PARTS: [&str; 8] =
    ["logger", "metrics", "machine-config", "boot-source", "serial", "vsock", "entropy", "balloon"];

/// Configures the VM from a file and starts it.
///
/// # Errors
/// Fails with the fault and its part of the file.
pub(super) fn apply(path: &Path, controller: &mut Controller) -> anyhow::Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    apply_text(&text, controller).with_context(|| format!("configure the VM from {}", path.display()))
}

fn apply_text(text: &str, controller: &mut Controller) -> anyhow::Result<()> {
    let mut config: serde_json::Map<String, Value> = serde_json::from_str(text)?;
    // Null and an empty list request nothing.
    config.retain(|_, value| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty()));
    let refused = |part: &str, fault: Fault| anyhow!("{part}: {}", fault.message);
    for part in PARTS {
        if let Some(value) = config.remove(part) {
            put(controller, part, &value).map_err(|fault| refused(part, fault))?;
        }
    }
    for (part, name) in [("drives", "drive_id"), ("network-interfaces", "iface_id")] {
        let Some(devices) = config.remove(part) else { continue };
        for device in devices.as_array().with_context(|| format!("{part}: not a list"))? {
            let id = device[name].as_str().with_context(|| format!("{part}: one has no {name}"))?;
            put(controller, &format!("{part}/{id}"), device).map_err(|fault| refused(part, fault))?;
        }
    }
    // It names network interfaces.
    if let Some(value) = config.remove("mmds-config") {
        put(controller, "mmds/config", &value).map_err(|fault| refused("mmds-config", fault))?;
    }
    if let Some(part) = config.keys().next() {
        match missing(part) {
            Some(what) => bail!("{part}: samepage has no {what}"),
            None => bail!("unknown part {part}"),
        }
    }
    controller.start().map_err(|fault| anyhow!(fault.message))
}
