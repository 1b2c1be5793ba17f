//! The description of the socket device.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The guest's address if the description has none.
const DEFAULT_CID: u32 = 3;
/// Longest path of a socket, in bytes, and what a port adds to it: `_4294967295`.
const MAX_PATH: usize = 107;
const PORT_BYTES: usize = 11;

/// The device over which programs of guest and host talk without a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The Unix socket to which programs of the host connect. A program that listens on port P for the guest has
    /// the same path with `_` and P behind it.
    #[cfg_attr(feature = "schema", schema(value_type = String, min_length = 1, example = "/run/web.vsock"))]
    pub uds: PathBuf,
    /// The guest's address (CID). By default 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(minimum = 3, maximum = 4_294_967_294_u32))]
    pub cid: Option<u32>,
}

impl VsockSpec {
    /// Returns the guest's address.
    #[must_use]
    pub fn cid(&self) -> u32 {
        self.cid.unwrap_or(DEFAULT_CID)
    }

    /// Returns values that are out of range: the field, and the reason.
    #[must_use]
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let cid = self.cid.filter(|cid| !(3..u32::MAX).contains(cid));
        let cid = cid.map(|cid| ("cid", format!("{cid} is no guest's address: use 3 to {}", u32::MAX - 1)));
        let length = self.uds.as_os_str().len();
        let most = MAX_PATH - PORT_BYTES;
        let uds = match length {
            0 => Some("the path of the socket is missing".to_owned()),
            _ if length > most => Some(format!("the path of the socket has {length} bytes: {most} at most")),
            _ => None,
        };
        uds.map(|reason| ("uds", reason)).into_iter().chain(cid).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_paths_are_bounded() {
        let vsock = |json: &str| serde_json::from_str::<VsockSpec>(json).unwrap();
        let plain = vsock(r#"{"uds": "v"}"#);
        assert_eq!((plain.cid(), plain.faults()), (3, vec![]));
        assert_eq!(vsock(r#"{"uds": "v", "cid": 9}"#).cid(), 9);
        let faults = |spec: VsockSpec| spec.faults().into_iter().map(|fault| fault.0).collect::<Vec<_>>();
        assert_eq!(faults(vsock(r#"{"uds": "", "cid": 2}"#)), ["uds", "cid"]);
        assert_eq!(faults(vsock(r#"{"uds": "v", "cid": 4294967295}"#)), ["cid"]);
        assert_eq!(faults(VsockSpec { uds: "v".repeat(97).into(), cid: None }), ["uds"]);
    }
}
