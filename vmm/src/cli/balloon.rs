//! `--balloon`: the memory balloon.

use samepage_spec::{BalloonSpec, Size};
use samepage_text::size::parse_size;

use super::fields::fields;

/// Returns the device that an argument describes.
pub(super) fn parse_balloon(text: &str) -> Result<BalloonSpec, String> {
    let mut balloon = BalloonSpec::default();
    match text {
        "on" => return Ok(balloon),
        "off" => return Ok(BalloonSpec { enabled: false, ..balloon }),
        _ => {}
    }
    for field in fields(text) {
        let (name, value) = field.split_once('=').unwrap_or((&field, "on"));
        let switch = || match value {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err(format!("{name}={value}: use on or off")),
        };
        match name {
            "size" => balloon.size = Size(parse_size(value)?),
            "deflate-on-oom" => balloon.deflate_on_oom = switch()?,
            "reporting" => balloon.reporting = switch()?,
            "hinting" => balloon.hinting = switch()?,
            "stats-interval" => {
                let seconds = value.strip_suffix('s').unwrap_or(value).parse();
                balloon.stats_interval =
                    seconds.map_err(|_| format!("stats-interval={value}: use a whole number of seconds"))?;
            }
            _ => {
                return Err(format!(
                    "unknown field {field:?}; write on, off, or some of size=BYTES, deflate-on-oom, \
                     reporting=on|off, hinting and stats-interval=SECONDS"
                ));
            }
        }
    }
    Ok(balloon)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_is_on_off_or_described() {
        assert_eq!(parse_balloon("on"), Ok(BalloonSpec::default()));
        assert!(!parse_balloon("off").unwrap().enabled);
        let all = parse_balloon("size=64M,deflate-on-oom,reporting=off,hinting=on,stats-interval=5s");
        let expected = BalloonSpec {
            enabled: true,
            size: Size(64 << 20),
            deflate_on_oom: true,
            reporting: false,
            hinting: true,
            stats_interval: 5,
        };
        assert_eq!(all, Ok(expected));
        for wrong in ["", "yes", "on,size=1M", "size", "size=x", "reporting=1", "stats-interval=-1", "hints"]
        {
            assert!(parse_balloon(wrong).is_err(), "{wrong}");
        }
    }
}
