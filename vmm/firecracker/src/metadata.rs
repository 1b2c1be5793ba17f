//! The metadata service (MMDS): its data, and where the guest reaches it.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use hyper::StatusCode;
use samepage_metadata::{DEFAULT_ADDRESS, Metadata, StoreError, Version};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::args::FirecrackerArgs;
use super::controller::Controller;
use super::fault::Fault;
use super::machine::Services;

/// `/mmds/config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MmdsConfig {
    #[serde(default)]
    version: Version,
    network_interfaces: Vec<String>,
    #[serde(default)]
    ipv4_address: Option<Ipv4Addr>,
    #[serde(default)]
    imds_compat: bool,
}

/// The service of the VM, before and after its start.
pub(super) struct Mmds {
    vm: String,
    /// Upper limit for the data, in bytes of JSON.
    bytes: usize,
    /// There once a client has written to it.
    service: Option<Arc<Metadata>>,
    config: Option<MmdsConfig>,
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        let status = match error {
            StoreError::TooLong => StatusCode::PAYLOAD_TOO_LARGE,
            _ => StatusCode::BAD_REQUEST,
        };
        Self { status, message: error.to_string() }
    }
}

impl Mmds {
    pub(super) fn new(args: &FirecrackerArgs) -> Self {
        let bytes = args.mmds_size_limit.unwrap_or(args.http_api_max_payload_size);
        Self { vm: args.id.clone(), bytes, service: None, config: None }
    }

    pub(super) fn config(&self) -> Option<&MmdsConfig> {
        self.config.as_ref()
    }

    fn service(&mut self) -> Result<&Arc<Metadata>, Fault> {
        if self.service.is_none() {
            let made = Metadata::new(&self.vm, self.bytes);
            let failed = |error| Fault::new(format!("The metadata service has no random bytes: {error}."));
            self.service = Some(made.map_err(failed)?);
        }
        self.service.as_ref().ok_or_else(|| Fault::missing("metadata service (MMDS)"))
    }

    /// Returns the service for each network device that it is configured for. `name` returns the device's name in the
    /// VM for that of a client.
    pub(super) fn services(&self, name: impl Fn(&str) -> Option<String>) -> Services {
        let (Some(service), Some(config)) = (&self.service, &self.config) else { return Vec::new() };
        let names = config.network_interfaces.iter().filter_map(|id| name(id));
        names.map(|name| (name, service.at(config.ipv4_address.unwrap_or(DEFAULT_ADDRESS)))).collect()
    }
}

impl Controller {
    pub(super) fn set_mmds_config(&mut self, config: MmdsConfig) -> Result<(), Fault> {
        self.before_start()?;
        self.check_services()?;
        if config.ipv4_address.is_some_and(|address| !is_link_local(address)) {
            return Err(Fault::new("The MMDS IPv4 address is not link local."));
        }
        if config.network_interfaces.is_empty() {
            return Err(Fault::new(
                "The list of network interface IDs that allow forwarding MMDS requests is empty.",
            ));
        }
        if !config.network_interfaces.iter().all(|id| self.has_network(id)) {
            return Err(Fault::new(
                "The list of network interface IDs provided contains at least one ID that does not correspond \
                 to any existing network interface.",
            ));
        }
        self.mmds.service()?.configure(config.version, config.imds_compat);
        self.mmds.config = Some(config);
        Ok(())
    }

    pub(super) fn mmds(&self) -> Result<Value, Fault> {
        self.check_services()?;
        Ok(self.mmds.service.as_ref().map_or(Value::Null, |service| service.data()))
    }

    pub(super) fn put_mmds(&mut self, data: Value) -> Result<(), Fault> {
        self.check_services()?;
        Ok(self.mmds.service()?.put(data)?)
    }

    pub(super) fn patch_mmds(&mut self, patch: &Value) -> Result<(), Fault> {
        self.check_services()?;
        Ok(self.mmds.service()?.patch(patch)?)
    }

    /// Takes the data from a file.
    ///
    /// # Errors
    /// Fails if the file cannot be read, is no JSON or is too long.
    pub(super) fn read_mmds(&mut self, path: &Path) -> anyhow::Result<()> {
        let shown = path.display();
        let text = fs::read_to_string(path).with_context(|| format!("read {shown}"))?;
        let data = serde_json::from_str(&text).with_context(|| format!("read {shown} as JSON"))?;
        self.put_mmds(data).map_err(|fault| anyhow::anyhow!("metadata of {shown}: {}", fault.message))
    }

    /// The data are in this process, and a VM in another one has its network there.
    fn check_services(&self) -> Result<(), Fault> {
        if self.machine.has_services() {
            Ok(())
        } else {
            Err(Fault::missing("metadata service (MMDS) for a VM in another process (--host)"))
        }
    }
}

/// Whether hosts may have this address on a link (RFC 3927, section 2.1).
fn is_link_local(address: Ipv4Addr) -> bool {
    address.is_link_local() && (1..=254).contains(&address.octets()[2])
}
