//! `--vsock`: the socket device in one argument, of fields between commas.

use samepage_spec::VsockSpec;

use super::fields::fields;

/// Returns the device that an argument describes, before `{index}` and `{name}` are replaced in its path.
pub(super) fn parse_vsock(text: &str) -> Result<VsockSpec, String> {
    let mut vsock = VsockSpec { uds: Default::default(), cid: None };
    for field in fields(text) {
        match field.split_once('=') {
            Some(("uds", path)) => vsock.uds = path.into(),
            Some(("cid", cid)) => {
                vsock.cid = Some(cid.parse().map_err(|_| format!("{cid:?} is no guest's address"))?);
            }
            _ => return Err(format!("unknown field {field:?}; fields are uds=PATH and cid=N")),
        }
    }
    match vsock.faults().into_iter().next() {
        Some((_, reason)) => Err(reason),
        None => Ok(vsock),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_has_a_path() {
        assert_eq!(parse_vsock("uds=a,,b"), Ok(VsockSpec { uds: "a,b".into(), cid: None }));
        assert_eq!(parse_vsock("cid=7,uds=v").unwrap().cid(), 7);
        for wrong in ["", "v", "uds=", "cid=7", "uds=v,cid=2", "uds=v,cid=x", "uds=v,port=1"] {
            assert!(parse_vsock(wrong).is_err(), "{wrong}");
        }
    }
}
