//! `--rng`: the entropy device.

use samepage_spec::RngSpec;

use super::fields::{fields, parse_limit_field};

/// Returns the device that an argument describes.
pub(super) fn parse_rng(text: &str) -> Result<RngSpec, String> {
    let mut rng = RngSpec::default();
    match text {
        "on" => return Ok(rng),
        "off" => return Ok(RngSpec { enabled: false, ..rng }),
        _ => {}
    }
    for field in fields(text) {
        let known = match field.split_once('=') {
            Some((name, value)) => parse_limit_field(&mut rng.limits, name, value)?,
            None => false,
        };
        if !known {
            return Err(format!("unknown field {field:?}; write on, off, or rate=BYTES and iops=N"));
        }
    }
    Ok(rng)
}

#[cfg(test)]
mod tests {
    use super::*;
    use samepage_spec::{RateLimits, Size};

    #[test]
    fn the_device_is_on_off_or_limited() {
        assert_eq!(parse_rng("on"), Ok(RngSpec::default()));
        assert!(!parse_rng("off").unwrap().enabled);
        let limits = RateLimits { rate: Some(Size(64 << 10)), iops: Some(10) };
        assert_eq!(parse_rng("rate=64K/s,iops=10"), Ok(RngSpec { enabled: true, limits }));
        for wrong in ["", "yes", "on,rate=1", "rate=0", "iops=x", "path=/dev/random"] {
            assert!(parse_rng(wrong).is_err(), "{wrong}");
        }
    }
}
