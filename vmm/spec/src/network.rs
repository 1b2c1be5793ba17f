//! The description of a network device.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};

use crate::{MAX_QUEUES, Publish, RateLimits};

/// Bounds of the MTU: the least that IPv4 allows, and the most that a packet can have, in bytes.
const MTUS: std::ops::RangeInclusive<u16> = 68..=65_521;

/// Upper limit for the published ports of a device.
const MAX_PUBLISHED: usize = 64;

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// The tap whose frames these are. If the host has no interface of this name, the kernel makes one, if the
    /// process may do so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(min_length = 1, max_length = 15, example = "tap0"))]
    pub tap: Option<String>,
    /// Instead of a name, the number of an open file of the process, which is a tap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(minimum = 0))]
    pub fd: Option<i32>,
    /// Instead of a tap, a network that needs no privileges: a process of passt opens the guest's connections as the
    /// user's own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub user: bool,
    /// Ports of the host that lead to the guest, on a network of the user.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schema(max_items = 64))]
    pub publish: Vec<Publish>,
    /// Whether the guest reaches programs that listen on the host's 127.0.0.1, at the address of its gateway, on a
    /// network of the user. By default it does not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_loopback: bool,
    /// The name of the device within the VM. By default `net` and the number of the device, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "schema",
        schema(pattern = "^(\\.*[A-Za-z0-9_-][A-Za-z0-9._-]*|\\.{3,})$", min_length = 1, max_length = 20)
    )]
    pub id: Option<String>,
    /// The address of the guest's interface. By default it follows from the VM's name and the number of the
    /// device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// The longest packet, in bytes. By default as the tap has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(minimum = 68, maximum = 65_521))]
    pub mtu: Option<u16>,
    /// The number of pairs of queues that the device offers. By default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(minimum = 1, maximum = 16))]
    pub queues: Option<usize>,
    /// Limits per second for what the guest receives. `iops` counts frames.
    #[serde(default)]
    pub receive: RateLimits,
    /// Limits per second for what the guest sends. `iops` counts frames.
    #[serde(default)]
    pub send: RateLimits,
}

impl NetworkSpec {
    /// Returns the name of the device of this number, from 0.
    #[must_use]
    pub fn id(&self, number: usize) -> Cow<'_, str> {
        match &self.id {
            Some(id) => Cow::Borrowed(id),
            None => Cow::Owned(format!("net{number}")),
        }
    }

    /// Returns the address of the device of this number in the VM of this name.
    #[must_use]
    pub fn mac(&self, vm: &str, number: usize) -> Mac {
        self.mac.unwrap_or_else(|| Mac::of(vm, number))
    }

    /// Returns the device of the VM of this number, of which `text` replaces what stands for the VM in texts.
    #[must_use]
    pub fn for_vm(&self, index: u32, text: impl Fn(&str) -> String) -> Self {
        let publish = self.publish.iter().map(|publish| publish.for_vm(index)).collect();
        Self { tap: self.tap.as_deref().map(text), publish, ..self.clone() }
    }

    /// Returns the number of pairs of queues.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.queues.unwrap_or(1)
    }

    /// Returns values that are out of range: the field, and the reason.
    #[must_use]
    pub fn faults(&self) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        let mut fault = |field: &str, reason: String| faults.push((field.to_owned(), reason));
        match (&self.tap, self.fd, self.user) {
            (Some(_), Some(_), _) => fault("fd", "a network device has one tap: give tap or fd".to_owned()),
            (None, None, false) => {
                fault("tap", "a network device has a tap (tap or fd), or is the user's (user)".to_owned());
            }
            (Some(_), _, true) | (_, Some(_), true) => {
                fault("user", "a network device has a tap, or is the user's".to_owned());
            }
            (None, Some(fd), _) if fd < 0 => fault("fd", format!("{fd} is no number of a file")),
            (None, Some(_), _) if self.queues() > 1 => {
                fault("queues", "a file is one queue: name the tap instead, or use one queue".to_owned());
            }
            (None, _, true) if self.queues() > 1 => {
                fault("queues", "a network of the user has one queue".to_owned());
            }
            _ => {}
        }
        if !self.user && !self.publish.is_empty() {
            fault("publish", "ports are published by a network of the user (user)".to_owned());
        }
        if !self.user && self.host_loopback {
            fault("host_loopback", "only a network of the user (user) has this field".to_owned());
        }
        if self.publish.len() > MAX_PUBLISHED {
            fault("publish", format!("{} ports: {MAX_PUBLISHED} at most", self.publish.len()));
        }
        let wrong = self.publish.iter().enumerate();
        for (number, reason) in wrong.filter_map(|(number, publish)| Some((number, publish.fault()?))) {
            fault(&format!("publish/{number}"), reason);
        }
        if let Some(queues) = self.queues.filter(|queues| !(1..=MAX_QUEUES).contains(queues)) {
            fault("queues", format!("{queues} queues: a network device has 1 to {MAX_QUEUES}"));
        }
        if let Some(mtu) = self.mtu.filter(|mtu| !MTUS.contains(mtu)) {
            fault("mtu", format!("an MTU of {mtu}: use {} to {}", MTUS.start(), MTUS.end()));
        }
        if let Some(mac) = self.mac.filter(|mac| !mac.is_unicast()) {
            fault("mac", format!("the address {mac} is not one interface's"));
        }
        for (direction, limits) in [("receive", &self.receive), ("send", &self.send)] {
            for (field, reason) in limits.faults() {
                let field = field.strip_prefix("limits/").unwrap_or(field);
                fault(&format!("{direction}/{field}"), reason);
            }
        }
        faults
    }
}

/// The address of an Ethernet interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Returns the address of an interface that has none: always the same for this VM and this number, and from
    /// the range of addresses that no maker has.
    fn of(vm: &str, number: usize) -> Self {
        // FNV-1a, 64 bits: its purpose is that different names have different addresses.
        let number = (number as u64).to_le_bytes();
        let bytes = vm.bytes().chain([0]).chain(number);
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let [a, b, c, d, e, f, g, h] = (hash ^ hash.rotate_left(29)).to_le_bytes();
        // Locally administered, for one interface.
        Self([(a ^ g) & 0xfc | 2, b ^ h, c, d, e, f])
    }

    /// Whether it can be one interface's address.
    fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no address of an interface; write one as in 02:00:00:12:34:56");
        let mut address = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut address {
            let part = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+'));
            *byte = part.and_then(|part| u8::from_str_radix(part, 16).ok()).ok_or_else(wrong)?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(Self(address)) }
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'_, str>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(feature = "schema")]
mod schema {
    use std::borrow::Cow;

    use utoipa::openapi::RefOr;
    use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
    use utoipa::{PartialSchema, ToSchema};

    use super::Mac;

    impl PartialSchema for Mac {
        fn schema() -> RefOr<Schema> {
            let text = ObjectBuilder::new().schema_type(Type::String);
            let text = text.description(Some("The address of an Ethernet interface"));
            let text = text.pattern(Some("^[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}$"));
            Schema::Object(text.examples(["02:00:00:12:34:56"]).build()).into()
        }
    }

    impl ToSchema for Mac {
        fn name() -> Cow<'static, str> {
            "MacSpec".into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_stable_local_and_different() {
        let plain = NetworkSpec::default();
        assert_eq!(plain.mac("web-0", 0), plain.mac("web-0", 0));
        let mut all: Vec<_> =
            (0..1000).flat_map(|vm| [0, 1].map(|number| plain.mac(&format!("web-{vm}"), number))).collect();
        assert!(all.iter().all(|mac| mac.0[0] & 3 == 2 && mac.is_unicast()));
        all.sort_by_key(|mac| mac.0);
        all.dedup();
        assert_eq!(all.len(), 2000);
        // An address that a user has written down somewhere.
        assert_eq!(Mac::of("vm", 0).to_string(), Mac::of("vm", 0).to_string());
    }

    #[test]
    fn addresses_are_read_and_written() {
        let mac: Mac = "02:00:00:ab:CD:56".parse().unwrap();
        assert_eq!(mac, Mac([2, 0, 0, 0xab, 0xcd, 0x56]));
        assert_eq!(serde_json::to_string(&mac).unwrap(), "\"02:00:00:ab:cd:56\"");
        assert_eq!(serde_json::from_str::<Mac>("\"02-00-00-ab-cd-56\"").unwrap(), mac);
        for wrong in ["", "02:00:00:ab:cd", "02:00:00:ab:cd:56:78", "0:1:2:3:4:5", "02:00:00:ab:cd:+5", "x"] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_device_has_one_tap_and_values_in_range() {
        let faults = |json: &str| {
            let spec: NetworkSpec = serde_json::from_str(json).unwrap();
            spec.faults().into_iter().map(|fault| fault.0).collect::<Vec<_>>()
        };
        assert!(
            faults(r#"{"tap": "tap0", "mtu": 1500, "queues": 4, "mac": "02:00:00:00:00:01"}"#).is_empty()
        );
        assert!(faults(r#"{"fd": 5}"#).is_empty());
        assert_eq!(faults("{}"), ["tap"]);
        assert_eq!(faults(r#"{"tap": "a", "fd": 3}"#), ["fd"]);
        assert!(faults(r#"{"user": true, "publish": ["2222:22"], "host_loopback": true}"#).is_empty());
        assert_eq!(faults(r#"{"user": true, "tap": "a"}"#), ["user"]);
        assert_eq!(faults(r#"{"user": true, "fd": 3}"#), ["user"]);
        assert_eq!(faults(r#"{"user": true, "queues": 2}"#), ["queues"]);
        assert_eq!(
            faults(r#"{"tap": "a", "publish": ["1:1"], "host_loopback": true}"#),
            ["publish", "host_loopback"]
        );
        assert_eq!(faults(r#"{"fd": -3}"#), ["fd"]);
        assert_eq!(faults(r#"{"fd": 3, "queues": 2}"#), ["queues"]);
        assert_eq!(faults(r#"{"tap": "a", "queues": 0, "mtu": 60}"#), ["queues", "mtu"]);
        assert_eq!(faults(r#"{"tap": "a", "mac": "01:00:00:00:00:01"}"#), ["mac"]);
        assert_eq!(
            faults(r#"{"tap": "a", "receive": {"rate": 0}, "send": {"iops": 0}}"#),
            ["receive/rate", "send/iops"]
        );
    }
}
