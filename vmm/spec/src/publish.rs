//! Ports of the host that lead to ports of a guest.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};

/// What stands for the number of a VM in the host's port.
const INDEX: &str = "{index}";

/// Whoever connects to the host's port reaches the guest's. Written as `[ADDRESS:]HOST:GUEST[/udp]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Publish {
    /// The host's address: by default that of the host alone, 127.0.0.1.
    pub address: IpAddr,
    /// The port of the host.
    pub host: HostPort,
    /// The port of the guest.
    pub guest: u16,
    /// Whether the port is one of UDP and not of TCP.
    pub udp: bool,
}

/// A port of the host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostPort {
    /// Its number.
    Number(u16),
    /// Digits with `{index}`, which the number of a VM replaces: `22{index}` is 220, 221 and so on. Or digits that
    /// are no port.
    Pattern(String),
}

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

impl Publish {
    /// Returns the port for the VM of this number. One that is too large stays text, which [`fault`](Self::fault)
    /// tells.
    #[must_use]
    pub fn for_vm(&self, index: u32) -> Self {
        let host = match &self.host {
            HostPort::Number(port) => HostPort::Number(*port),
            HostPort::Pattern(text) => {
                let text = text.replace(INDEX, &index.to_string());
                port(&text).map_or(HostPort::Pattern(text), HostPort::Number)
            }
        };
        Self { host, ..self.clone() }
    }

    /// Returns why it is not the port of one VM.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        match &self.host {
            HostPort::Number(_) => None,
            HostPort::Pattern(text) if text.contains(INDEX) => Some(format!(
                "{self}: {INDEX} stands for a VM's number in configuration files and on the command line alone; give the \
                 port's number"
            )),
            HostPort::Pattern(text) => Some(format!("{self}: {text} is no port; ports are 1 to 65535")),
        }
    }

    /// Whether both cannot be had at once: they are one port of one address, or of all addresses.
    #[must_use]
    pub fn collides(&self, other: &Self) -> bool {
        let addresses = (self.address, other.address);
        let both = addresses.0 == addresses.1
            || addresses.0.is_ipv4() == addresses.1.is_ipv4()
                && (addresses.0.is_unspecified() || addresses.1.is_unspecified());
        both && self.host == other.host && self.udp == other.udp
    }
}

fn port(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port > 0)
}

impl FromStr for HostPort {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let has_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()) && text.len() <= 5;
        match text.split_once(INDEX) {
            None => port(text).map(Self::Number).ok_or(()),
            Some((before, after)) if has_digits(before) && has_digits(after) => {
                Ok(Self::Pattern(text.to_owned()))
            }
            Some(_) => Err(()),
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(port) => write!(f, "{port}"),
            Self::Pattern(text) => f.write_str(text),
        }
    }
}

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} publishes no port; write HOST:GUEST as in 2222:22, with ADDRESS: before it or /udp behind it"
            )
        };
        let (ports, udp) = match text.rsplit_once('/') {
            None => (text, false),
            Some((ports, "tcp")) => (ports, false),
            Some((ports, "udp")) => (ports, true),
            Some(_) => return Err(wrong()),
        };
        let (rest, guest) = ports.rsplit_once(':').ok_or_else(wrong)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (LOCAL, rest),
            Some((address, host)) => {
                // An IPv6 address has colons, and may stand in brackets.
                let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                (bare.unwrap_or(address).parse().map_err(|_| wrong())?, host)
            }
        };
        let host = host.parse().map_err(|()| wrong())?;
        Ok(Self { address, host, guest: port(guest).ok_or_else(wrong)?, udp })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            LOCAL => {}
            IpAddr::V4(address) => write!(f, "{address}:")?,
            IpAddr::V6(address) => write!(f, "[{address}]:")?,
        }
        write!(f, "{}:{}{}", self.host, self.guest, if self.udp { "/udp" } else { "" })
    }
}

impl Serialize for Publish {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Publish {
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

    use super::Publish;

    impl PartialSchema for Publish {
        fn schema() -> RefOr<Schema> {
            let text = ObjectBuilder::new().schema_type(Type::String);
            let text = text.description(Some(
                "A port of the host that leads to a port of the guest: `[ADDRESS:]HOST:GUEST[/udp]`. The address is \
                 127.0.0.1 by default",
            ));
            // Addresses and numbers in range are checked when the text is read.
            let port = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3})";
            let text = text.pattern(Some(format!("^{port}:{port}(/(tcp|udp))?$")));
            Schema::Object(text.examples(["2222:22"]).build()).into()
        }
    }

    impl ToSchema for Publish {
        fn name() -> Cow<'static, str> {
            "PublishSpec".into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(text: &str) -> Publish {
        text.parse().unwrap()
    }

    #[test]
    fn ports_are_read_and_written() {
        let plain = Publish { address: LOCAL, host: HostPort::Number(2222), guest: 22, udp: false };
        assert_eq!(publish("2222:22"), plain);
        assert_eq!(publish("127.0.0.1:2222:22/tcp"), plain);
        assert_eq!(publish("0.0.0.0:53:53/udp").to_string(), "0.0.0.0:53:53/udp");
        assert_eq!(publish("[::1]:80:8080"), publish("::1:80:8080"));
        assert_eq!(serde_json::to_string(&publish("::1:80:8080")).unwrap(), "\"[::1]:80:8080\"");
        assert_eq!(serde_json::from_str::<Publish>("\"2222:22\"").unwrap(), plain);
        for wrong in [
            "",
            "22",
            "0:22",
            "22:0",
            "22:65536",
            "+22:22",
            "a:22:22",
            "22:22/sctp",
            "22:22/",
            ":22:22",
            "22:{index}",
            "{name}:22",
            "x{index}:22",
            "{index}{index}:22",
            "222222{index}:22",
        ] {
            assert!(wrong.parse::<Publish>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_vm_has_a_port_of_its_own() {
        let several = publish("[::]:22{index}0:22/udp");
        assert_eq!(several.to_string(), "[::]:22{index}0:22/udp");
        assert!(several.fault().unwrap().contains("configuration files"));
        assert_eq!([0, 7, 12].map(|index| several.for_vm(index).host.to_string()), ["2200", "2270", "22120"]);
        assert_eq!(several.for_vm(7), publish("[::]:2270:22/udp"));
        assert_eq!(several.for_vm(7).fault(), None);
        let large = several.for_vm(4000).fault().unwrap();
        assert!(large.contains("2240000 is no port"), "{large}");
        let zero = publish("{index}:22").for_vm(0).fault().unwrap();
        assert!(zero.contains("0 is no port"), "{zero}");
        assert_eq!(publish("2222:22").for_vm(3), publish("2222:22"));
    }

    #[test]
    fn one_port_of_the_host_leads_to_one_guest() {
        let collide = |one: &str, other: &str| publish(one).collides(&publish(other));
        for (one, other) in [
            ("80:80", "80:81"),
            ("80:80", "0.0.0.0:80:80"),
            ("[::1]:80:80", "[::]:80:80"),
            ("5:5/udp", "5:6/udp"),
        ] {
            assert!(collide(one, other) && collide(other, one), "{one} {other}");
        }
        for (one, other) in [
            ("80:80", "81:80"),
            ("80:80", "80:80/udp"),
            ("80:80", "127.0.0.2:80:80"),
            ("0.0.0.0:80:80", "[::]:80:80"),
            ("[::1]:80:80", "80:80"),
        ] {
            assert!(!collide(one, other) && !collide(other, one), "{one} {other}");
        }
    }
}
