//! `--net`: a network device in one argument, of fields between commas.

use samepage_spec::{MAX_QUEUES, NetworkSpec};
use samepage_text::names;

use super::fields::{fields, parse_limit_field};

/// Returns the device that an argument describes, before `{index}` and `{name}` are replaced in its tap, and `{index}` in
/// the ports that it publishes.
pub(super) fn parse_net(text: &str) -> Result<NetworkSpec, String> {
    let mut net = NetworkSpec { queues: Some(1), ..NetworkSpec::default() };
    for field in fields(text) {
        let (name, value) = field.split_once('=').unwrap_or((&field, ""));
        let number = |range: &str| format!("{value:?} is not {range}");
        match name {
            "tap" if !value.is_empty() => net.tap = Some(value.to_owned()),
            "user" if value.is_empty() => net.user = true,
            "publish" => net.publish.push(value.parse()?),
            "host-loopback" => {
                net.host_loopback = match value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(format!("host-loopback is on or off, not {value:?}")),
                }
            }
            "fd" => net.fd = Some(value.parse().map_err(|_| number("the number of an open file"))?),
            "id" => {
                names::check_network_id(value).map_err(|error| error.to_string())?;
                net.id = Some(value.to_owned());
            }
            "mac" => net.mac = Some(value.parse()?),
            "mtu" => net.mtu = Some(value.parse().map_err(|_| number("a number of bytes"))?),
            "queues" => {
                let wrong = || number(&format!("a number of queues from 1 to {MAX_QUEUES}"));
                net.queues = Some(value.parse().map_err(|_| wrong())?);
            }
            "rx-rate" | "rx-iops" => drop(parse_limit_field(&mut net.receive, &name[3..], value)?),
            "tx-rate" | "tx-iops" => drop(parse_limit_field(&mut net.send, &name[3..], value)?),
            _ => {
                return Err(format!(
                    "unknown field {field:?}; fields are tap=NAME, fd=N, user, publish=HOST:GUEST, \
                     host-loopback=on|off, id=NAME, mac=ADDRESS, mtu=BYTES, queues=N, and the limits \
                     rx-rate=BYTES, rx-iops=N, tx-rate=BYTES and tx-iops=N"
                ));
            }
        }
    }
    // All VMs have the faults of the first.
    match net.for_vm(0, str::to_owned).faults().into_iter().next() {
        Some((_, reason)) => Err(reason),
        None => Ok(net),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use samepage_spec::{RateLimits, Size};

    #[test]
    fn devices_have_a_tap_and_known_fields() {
        let plain = NetworkSpec { tap: Some("tap0".into()), queues: Some(1), ..NetworkSpec::default() };
        assert_eq!(parse_net("tap=tap0"), Ok(plain.clone()));
        assert_eq!(parse_net("fd=7").unwrap().fd, Some(7));
        let all = "tap=tap0,id=lan,mac=02:00:00:00:00:01,mtu=9000,queues=4,rx-rate=10M/s,tx-iops=1000";
        let limits = |rate, iops| RateLimits { rate, iops };
        assert_eq!(
            parse_net(all),
            Ok(NetworkSpec {
                id: Some("lan".into()),
                mac: Some("02:00:00:00:00:01".parse().unwrap()),
                mtu: Some(9000),
                queues: Some(4),
                receive: limits(Some(Size(10 << 20)), None),
                send: limits(None, Some(1000)),
                ..plain
            })
        );
        let user = parse_net("user,publish=2222:22,publish=0.0.0.0:53:53/udp,host-loopback=on").unwrap();
        assert!(user.user && user.host_loopback);
        assert_eq!(user.publish, ["2222:22", "0.0.0.0:53:53/udp"].map(|text| text.parse().unwrap()));
        let several = parse_net("user,publish=22{index}:22,publish=[::]:5{index}:53/udp").unwrap();
        assert_eq!(several.for_vm(4, str::to_owned).publish[1], "[::]:54:53/udp".parse().unwrap());
        for wrong in [
            "",
            "user=x",
            "user,publish={index}:22",
            "user,publish=22{name}:22",
            "user,tap=a",
            "user,queues=2",
            "user,publish=22",
            "user,host-loopback",
            "tap=a,publish=1:1",
            "tap0",
            "tap=",
            "tap=a,fd=3",
            "fd=x",
            "fd=3,queues=2",
            "tap=a,mac=1",
            "tap=a,mac=01:00:00:00:00:01",
            "tap=a,mtu=20",
            "tap=a,queues=0",
            "tap=a,rx-rate=0",
            "tap=a,tx-size=1",
            "tap=a,vhost=on",
        ] {
            assert!(parse_net(wrong).is_err(), "{wrong}");
        }
    }
}
